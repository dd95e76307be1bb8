"""Cost, memory and error of the methods of `pyels.methods`, against the size of the bank.

At every size the exact machine draws samples. At every step on the way each other method is given the same noisy image,
and its posterior mean is timed and compared with the exact one: errors of one step do not add to those of the next.
Pixels that method top leaves out count as right and as free, both in its favour.
"""

from __future__ import annotations

import ctypes
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyels.bank import PatchBank
from pyels.denoiser import eps_from_x0
from pyels.engines.index.building import can_build
from pyels.files import remove_temporary, temporary_name
from pyels.machines import ELS
from pyels.sampling import Level, Step
from pyels.studies import hardware, resumable, rivals
from pyels.studies.rivals import Method, Prepared

LEAST_SIZES = 3  # of which an exponent and its standard error can be fitted
LEAST_IMAGES = 10  # with fewer, the fixed costs of a call are what is timed
_PICTURES = ("x", "exact_mean")
_MADE_AT_ONCE = 4096  # synthetic images; another number makes others


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    images        sizes of the bank, ascending
    methods       the first is the exact one
    levels        noise levels of at most sigma = 1, noisiest first, each with its patch size
    boundary      of ELS
    seeds         of the noise that samples are drawn from, one each
    threads       of every method
    memory_limit  bytes that building an index may take; methods that take more are left out
    """

    images: Sequence[int]
    methods: Sequence[Method]
    levels: Sequence[Level]
    boundary: str
    seeds: Sequence[int]
    threads: int
    memory_limit: int

    @property
    def sizes(self) -> list[int]:
        """The patch size of every level."""
        return [level.patch_size for level in self.levels if level.patch_size is not None]

    def left_out(self, method: Method, images: int, shape: tuple[int, int, int]) -> str | None:
        """Why a method is not measured on so many images (C, H, W); None: it is."""
        reasons = (
            rivals.left_out(method, images, shape, self.boundary, k, self.memory_limit) for k in sorted(self.sizes)
        )
        return next((reason for reason in reasons if reason), None)


def grown(bank: PatchBank, images: int, seed: int) -> PatchBank:
    """A bank of so many images: those of `bank` shuffled, followed by synthetic ones where these are not enough.

    A synthetic image is a real one, mirrored or not, rotated by up to 15 degrees, scaled by 0.85 to 1.15, moved by up
    to a twelfth of its size, and 0.7 to 1.3 times as bright. A smaller bank is the beginning of a larger one of the
    same seed. Holds all images in memory, as the dtype of `bank`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(bank), generator=generator)[:images]
    made = torch.empty((images, *bank.shape), dtype=bank.dtype)
    made[: len(order)] = bank.images[order]
    for start in range(len(order), images, _MADE_AT_ONCE):
        part = made[start : start + _MADE_AT_ONCE]
        sources = torch.randint(len(bank), (_MADE_AT_ONCE,), generator=generator)
        mirrored, angle, scale, right, down, light = torch.rand((6, _MADE_AT_ONCE), generator=generator)
        angle, scale = (2 * angle - 1) * math.radians(15), 0.85 + 0.3 * scale
        mirror = torch.where(mirrored < 0.5, -1.0, 1.0)
        c, s = angle.cos() / scale, angle.sin() / scale
        rows = [mirror * c, -mirror * s, (right - 0.5) / 3, s, c, (down - 0.5) / 3]  # coordinates run from -1 to 1
        grid = F.affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), [_MADE_AT_ONCE, *bank.shape], False)
        n = len(part)
        moved = F.grid_sample(bank.read(sources[:n]), grid[:n], padding_mode="border", align_corners=False)
        bright = ((moved + 1) * (0.7 + 0.6 * light[:n, None, None, None]) - 1).clamp(-1, 1)
        part[:] = ((bright + 1) * 127.5).round() if bank.dtype == torch.uint8 else bright
    return PatchBank(made)


def this_computer(threads: int) -> dict[str, Any]:
    """What timings depend on, beside what is timed."""
    version = None
    if can_build():
        import faiss

        version = faiss.__version__
    return {**hardware.this_computer(threads), "faiss": version}


# ---- Measuring -----------------------------------------------------------------------------------------------------


def measure(
    bank: PatchBank, plan: Plan, folder: str | Path, settings: Mapping[str, Any], progress: resumable.Progress
) -> dict[str, Tensor]:
    """Measure every method at every size and step; resumable in `folder` after every step (see `resumable.resumable`).

    Parameters
    ----------
    bank      as many images as the largest size; a smaller bank is its beginning
    progress  told of every step once for each method

    Returns
    -------
    x            (sizes, steps, seeds, C, H, W) float32 the noisy images; exact_mean  likewise, of the exact machine
    seconds      (sizes, steps, methods, seeds) float64, NaN where a method was left out, as in all that follow
    rms, worst   likewise, of mean - exact mean over the image
    estimated    likewise, number of pixels for which the method states a 95% interval
    missed       likewise, number of these whose exact mean lies outside
    working      (sizes, steps, methods) most bytes that an evaluation added to the resident memory, parts of mapped
                 files apart; NaN also where the system does not tell
    index_bytes, index_seconds  (sizes, steps, methods) of the index for the step's patch size; 0 where there is none
    """
    steps = len(plan.levels)
    study: _Study | None = None

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        nonlocal study
        images, number = plan.images[i // steps], i % steps
        if study is None or len(study.bank) != images:
            if study is not None:
                study.close()
            study = _Study(bank[:images], plan, Path(folder) / resumable.UNFINISHED)
        if number == 0:
            x = torch.stack([resumable.noise_of_seed(seed, bank.shape) for seed in plan.seeds])
        else:
            before = resumable.read_item(folder, i - 1)
            x = _ddim(before["x"], before["exact_mean"], plan.levels[number - 1], plan.levels[number])
        return study.step(number, x, on_step)

    with hardware.torch_threads(plan.threads), _faiss_threads(plan.threads):
        ELS(bank[:1], plan.sizes[0], plan.boundary).denoise(bank.read(slice(1)), 1.0, 1.0)  # the first call loads code
        try:
            items = resumable.resumable(folder, settings, len(plan.images) * steps, one, progress)
        finally:
            if study is not None:
                study.close()
    return {name: values.reshape(len(plan.images), steps, *values.shape[1:]) for name, values in items.items()}


def _ddim(x: Tensor, mean: Tensor, level: Level, to: Level) -> Tensor:
    """One step of `pyels.sampling.ddim`."""
    return to.alpha * mean + to.sigma * eps_from_x0(mean, x, level.alpha, level.sigma)


class _Study:
    """All methods on one bank, with what they need for one patch size at a time."""

    def __init__(self, bank: PatchBank, plan: Plan, folder: Path) -> None:
        self.bank, self.plan, self._folder = bank, plan, temporary_name(folder / "index")
        self._patch_size: int | None = None
        self._prepared: dict[str, Prepared] = {}
        self._working: dict[Method, float] = {}

    def close(self) -> None:
        """Forget what was prepared for a patch size."""
        self._prepared, self._working = {}, {}
        remove_temporary(self._folder)

    def step(self, number: int, x: Tensor, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        """Ask every method for the means of x (seeds, C, H, W); what came of it, as `measure` returns it."""
        plan, level = self.plan, self.plan.levels[number]
        if level.patch_size != self._patch_size:
            self.close()
            self._patch_size = level.patch_size
        records: list[dict[str, Tensor]] = []
        exact_mean = x
        for method in plan.methods:
            if plan.left_out(method, len(self.bank), self.bank.shape):
                records.append(_nothing(len(x)))
            else:
                mean, stated, record = self._evaluate(method, level, x)
                exact_mean = exact_mean if records else mean
                records.append({**record, **_compare(mean, stated, exact_mean)})
            on_step(Step(number, len(plan.levels), level, x, exact_mean, x))
        figures = {name: torch.stack([record[name] for record in records]) for name in records[0]}
        return {"x": x, "exact_mean": exact_mean, **figures}

    def _evaluate(self, method: Method, level: Level, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The means of all seeds, their stated errors, and what they took."""
        plan = self.plan
        if method.kind not in self._prepared:
            assert level.patch_size is not None
            self._prepared[method.kind] = rivals.prepare(
                method.kind, self.bank, plan.boundary, level.patch_size, plan.threads, self._folder
            )
        prepared = self._prepared[method.kind]
        if method not in self._working:  # also warms up what is timed
            self._working[method] = _added(lambda: prepared.evaluate(x[:1], level, method.value))
        means, errors, seconds = [], [], []
        for one in torch.split(x, 1):
            started = time.perf_counter()
            mean, stated = prepared.evaluate(one, level, method.value)
            seconds.append(time.perf_counter() - started)
            means.append(mean)
            errors.append(stated)
        record = {
            "seconds": seconds,
            "working": self._working[method],
            "index_bytes": prepared.index_bytes,
            "index_seconds": prepared.index_seconds,
        }
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in record.items()}
        return torch.cat(means), torch.cat(errors), tensors


def _compare(mean: Tensor, stated: Tensor, exact_mean: Tensor) -> dict[str, Tensor]:
    """Figures (seeds,) of means (seeds, C, h, w) of the central pixels, with stated errors (seeds, h, w)."""
    down, right = ((exact_mean.shape[i] - mean.shape[i]) // 2 for i in (2, 3))
    inner = exact_mean[:, :, down : down + mean.shape[2], right : right + mean.shape[3]]
    error = (mean - inner).double()
    return {
        "rms": (error.square().sum((1, 2, 3)) / exact_mean[0].numel()).sqrt(),
        "worst": error.abs().amax((1, 2, 3)),
        "estimated": stated.isfinite().sum((1, 2)).double(),
        "missed": (error.abs().amax(1) > stated).sum((1, 2)).double(),
    }


def _nothing(seeds: int) -> dict[str, Tensor]:
    """The record of a method that was left out."""
    nothing = torch.full((seeds,), math.nan, dtype=torch.float64)
    of_seeds = dict.fromkeys(("seconds", "rms", "worst", "estimated", "missed"), nothing)
    return {**of_seeds, **dict.fromkeys(("working", "index_bytes", "index_seconds"), nothing[0])}


def _added(evaluate: Callable[[], object]) -> float:
    """Bytes that an evaluation adds to the resident memory at its peak, parts of mapped files apart."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory kept for reuse would not show
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    except (AttributeError, OSError):  # not Linux with the GNU C library, or not allowed
        evaluate()
        return math.nan
    evaluate()
    after = _resident()
    return max(0.0, after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]))


def _resident() -> dict[str, float]:
    """What Linux says of this process's memory, in bytes: resident now, of that in mapped files, and at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {name: 1024.0 * int(number) for name, number in re.findall(r"(\w+):\s*(\d+) kB", status)}


@contextmanager
def _faiss_threads(threads: int) -> Iterator[None]:
    if not can_build():
        yield
        return
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# ---- The report ----------------------------------------------------------------------------------------------------


def report(plan: Plan, bank: PatchBank, real: int, measured: Mapping[str, Tensor]) -> dict[str, Any]:
    """What was measured on banks of which `real` images are not synthetic, ready for JSON.

    Returns
    -------
    steps      t, alpha, sigma and patch size of every step, the noisiest first
    records    one for each size and method, see `_record`; or why it was left out
    exponents  method -> range of sizes -> a of seconds ~ images^a, see `fit`
    """
    records: list[dict[str, Any]] = []
    for n, images in enumerate(plan.images):
        for m, method in enumerate(plan.methods):
            record: dict[str, Any] = {"method": method.name, "images": images, "synthetic": max(0, images - real)}
            reason = plan.left_out(method, images, bank.shape)
            if reason:
                record["left_out"] = reason
            else:
                of_method = {name: values[n, :, m] for name, values in measured.items() if name not in _PICTURES}
                share = method.value if method.kind == "subset" else 1
                record |= _record(plan, of_method, share * images * bank.nbytes / len(bank), method.kind == "exact")
            records.append(record)
    exponents: dict[str, Any] = {}
    for method in plan.methods:
        costs = {
            record["images"]: record["seconds_per_sample"]["median"]
            for record in records
            if record["method"] == method.name and "left_out" not in record and record["images"] >= LEAST_IMAGES
        }
        of_real = {images: seconds for images, seconds in costs.items() if images <= real}
        fits = {"all": costs, "real": of_real} if len(of_real) < len(costs) else {"real": of_real}
        exponents[method.name] = {name: fit(of) for name, of in fits.items() if len(of) >= LEAST_SIZES}
    steps = [{"t": level.t, "alpha": level.alpha, "sigma": level.sigma} for level in plan.levels]
    for step, k in zip(steps, plan.sizes, strict=True):
        step["patch_size"] = k
    return {"steps": steps, "records": records, "exponents": exponents}


def _record(plan: Plan, of: Mapping[str, Tensor], bank_bytes: float, is_exact: bool) -> dict[str, Any]:
    """Of one method at one size.

    Returns
    -------
    seconds_per_sample, seconds_per_step  median, least and most of the seeds'; of a step: the mean of its steps'
    seconds_of_steps     median over the seeds, of every step
    rms_error            over all pixels, of all steps: median, least and most of the seeds'
    worst_rms_error      likewise, of the step at which it is largest
    rms_error_of_steps   over the pixels and seeds, of every step
    max_error            of any pixel
    stated_error_missed  share of the pixels with an estimated error whose exact mean lies outside the interval; null
                         where no error is estimated
    bank_megabytes       of the images that are used
    index_megabytes      of the largest index; index_megabytes_of_all and index_seconds_of_all: for all patch sizes
    working_megabytes    what an evaluation takes at its peak, parts of the index that are mapped apart; or null
    """
    seconds, rms = of["seconds"], of["rms"]
    firsts = [plan.sizes.index(k) for k in dict.fromkeys(plan.sizes)]
    working = of["working"].max()
    record = {
        "seconds_per_sample": _over_seeds(seconds.sum(0)),
        "seconds_per_step": _over_seeds(seconds.mean(0)),
        "seconds_of_steps": [statistics.median(step) for step in seconds.tolist()],
        "bank_megabytes": bank_bytes / 1e6,
        "index_megabytes": float(of["index_bytes"].max()) / 1e6,
        "index_megabytes_of_all": float(of["index_bytes"][firsts].sum()) / 1e6,
        "index_seconds_of_all": float(of["index_seconds"][firsts].sum()),
        "working_megabytes": None if working.isnan() else float(working) / 1e6,
    }
    if not is_exact:
        estimated = float(of["estimated"].sum())
        record |= {
            "rms_error": _over_seeds(rms.square().mean(0).sqrt()),
            "worst_rms_error": _over_seeds(rms.amax(0)),
            "rms_error_of_steps": rms.square().mean(1).sqrt().tolist(),
            "max_error": float(of["worst"].max()),
            "stated_error_missed": float(of["missed"].sum()) / estimated if estimated else None,
        }
    return record


def _over_seeds(values: Tensor) -> dict[str, float]:
    return {"median": statistics.median(values.tolist()), "min": float(values.min()), "max": float(values.max())}


def fit(costs: Mapping[int, float]) -> dict[str, Any]:
    """The exponent a of cost ~ images^a with its standard error, by least squares of log cost on log images.

    Takes the cost by number of images, of at least three; returns exponent, standard_error, factor (the cost of a
    single image, extrapolated), and the sizes it was fitted to.
    """
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (costs, costs.values()))
    dx = x - x.mean()
    exponent = (dx * y).sum() / dx.square().sum()
    residuals = y - y.mean() - exponent * dx
    variance = residuals.square().sum() / (len(x) - 2)
    return {
        "exponent": float(exponent),
        "standard_error": float((variance / dx.square().sum()).sqrt()),
        "factor": float((y.mean() - exponent * x.mean()).exp()),
        "images": list(costs),
    }
