"""Pairs per second of the machines, beside what one would otherwise run, on the same images and in the same run.

A pair is one query window against one bank patch: a distance, a weight, an accumulation.

The alternatives all evaluate ELS "interior", whose query windows wrap around and whose patches lie wholly inside the
images. They work on any dense list of patches, so their pairs/s would be the same for another boundary's list. Their
patches are unfolded beforehand, outside the timing, which is in their favour: unfolding takes a per cent or two,
and for a large bank there is no memory for it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyels import _core, plots, presets, runs
from pyels.bank import PatchBank
from pyels.checks import CPU
from pyels.machines import ELS
from pyels.schedules import make_schedule

OURS, RELEASED_WAY = "pyels", "conv2d"
PRESET = "fashion-mnist-resnet-zeros"
CHECKED_IMAGES = 8  # the oracle is slow
OURS_WITHIN = 1e-4  # of the oracle, or there is nothing worth timing
ALTERNATIVES_WITHIN = 1e-3  # of the oracle; what is further off is marked
UNFOLDED_BYTES = 1 << 27
CACHED_WEIGHTS = 1 << 18  # weights of a chunk that stay in one core's cache: larger chunks are up to twice as slow
CACHED_QUERIES = 1 << 10
LEAST_LOG_WEIGHT = -80.0  # below the largest; exp of less is denormal, many times slower to sum, and adds nothing
MATERIALISED_WEIGHTS = 1 << 25

Evaluation = Callable[[], Tensor]  # -> (B, C, H, W)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes
    ----------
    sizes       patch sizes k
    boundaries  of ELS
    time        noise level t of all queries; None: `time_of_size` for each k
    repeats     timings of each method, of which the median counts
    seconds     about how long one timing takes: slow methods run on fewer images, fast ones several times
    seed        query i gets the noise of seed + i
    engine      of ELS; with "cuda" the alternatives run on the same GPU
    precision   of ELS
    threads     of ELS, and of torch for the alternatives
    """

    sizes: Sequence[int]
    boundaries: Sequence[str]
    time: float | None
    repeats: int
    seconds: float
    seed: int
    engine: str
    precision: str
    threads: int


@dataclass(frozen=True)
class Record:
    """One method at one patch size. `error` is max |x0_hat - oracle| on the first `CHECKED_IMAGES` images;
    `ceiling_share`, of engine "cuda" without tensor cores only, what share its float32 operations are of the
    multiply-adds that the same GPU does in a matrix product (see `operations`)."""

    method: str
    boundary: str
    patch_size: int
    time: float
    images: int
    pairs: int
    seconds_median: float
    seconds_min: float
    seconds_max: float
    pairs_per_second: float
    error: float
    ceiling_share: float | None


@dataclass(frozen=True)
class Method:
    """`prepare(n)` makes ready whatever is not to be timed, and returns the evaluation over the first n images."""

    name: str
    boundary: str
    most_images: int
    prepare: Callable[[int], Evaluation]


def run(bank: PatchBank, x0: Tensor, settings: Settings, progress: Callable[[], object]) -> dict[str, Any]:
    """Measure every method at every size; returns ceilings, records and ratios, ready for JSON.

    Parameters
    ----------
    bank      the images
    x0        (B, C, H, W) float32 clean images of the queries, not of the bank
    settings  what to measure; see `check`
    progress  called `steps(settings)` times

    Raises
    ------
    ValueError  a result of ours is further than `OURS_WITHIN` from the oracle
    """
    device = ELS(bank, settings.sizes[0], settings.boundaries[0], settings.engine).device
    full_float32 = torch.backends.cudnn.flags(allow_tf32=False)
    with torch_threads(settings.threads), full_float32:
        ceilings = Ceilings(device)
        bank, x0 = bank.to(device), x0.to(device)
        records = [record for k in settings.sizes for record in _measure(bank, x0, k, settings, ceilings, progress)]
    return {
        "machine": this_machine(settings.threads, device),
        "ceilings": ceilings.rates,
        "records": [asdict(record) for record in records],
        "ratios": ratios(records),
    }


def check(bank: PatchBank, settings: Settings) -> None:
    """Raise what ELS raises for a size, boundary, engine or number of threads that it refuses."""
    for boundary in (*settings.boundaries, "interior"):
        for k in settings.sizes:
            _machine(bank, k, boundary, settings)


def steps(settings: Settings) -> int:
    """How often `run` reports progress."""
    return len(settings.sizes) * (len(settings.boundaries) + len(alternatives())) * (1 + settings.repeats)


def time_of_size(patch_size: int) -> float:
    """The noise level t at which the paper uses patches of this size, or of the nearest size that it uses.

    The median over the steps of preset fashion-mnist-resnet-zeros.
    """
    sizes = presets.patch_sizes(PRESET)
    nearest = min(sizes, key=lambda k: abs(k - patch_size))
    return statistics.median(i / len(sizes) for i, k in enumerate(sizes, start=1) if k == nearest)


def _machine(bank: PatchBank, k: int, boundary: str, settings: Settings) -> ELS:
    return ELS(bank, k, boundary, settings.engine, settings.threads, precision=settings.precision)


def _measure(
    bank: PatchBank, x0: Tensor, k: int, settings: Settings, ceilings: Ceilings, progress: Callable[[], object]
) -> Iterator[Record]:
    t = time_of_size(k) if settings.time is None else settings.time
    schedule = make_schedule("cosine")
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    noise = torch.stack([runs.noise_of_seed(settings.seed + i, bank.shape) for i in range(len(x0))])
    x = alpha * x0 + sigma * noise.to(x0.device)
    checked = min(CHECKED_IMAGES, len(bank))
    oracle = {
        boundary: ELS(bank[:checked].to("cpu"), k, boundary, "reference").denoise(x.cpu(), alpha, sigma)
        for boundary in {*settings.boundaries, "interior"}
    }
    methods = _methods(bank, x, alpha, sigma, k, settings)
    images, calls, evaluations, errors = [], [], [], []
    for method in methods:
        few = method.prepare(checked)
        error = float((few().cpu() - oracle[method.boundary]).abs().max())
        if method.name == OURS and not error <= OURS_WITHIN:
            raise ValueError(
                f"ELS {method.boundary} with patch size {k} is {error:.1e} off the float64 oracle, more than "
                f"{OURS_WITHIN:g}; not worth timing"
            )
        n = min(method.most_images, max(1, int(checked * settings.seconds / _seconds(few, device=x.device))))
        evaluation = method.prepare(n)
        evaluation()  # warms up
        calls.append(max(1, round(settings.seconds / _seconds(evaluation, device=x.device))))
        errors.append(error)
        images.append(n)
        evaluations.append(evaluation)
        progress()
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(settings.repeats):  # in turn, so that a machine whose speed drifts treats all alike
        ceilings.measure()
        for own, evaluation, n in zip(seconds, evaluations, calls, strict=True):
            own.append(_seconds(evaluation, n, x.device))
            progress()
    for method, n, own, error in zip(methods, images, seconds, errors, strict=True):
        pairs = ELS(bank[:n], k, method.boundary).pairs(None, batch=len(x))
        median = statistics.median(own)
        share = None
        if x.is_cuda and method.name == OURS and settings.precision == "highest":
            share = (
                pairs / median * operations(k, method.boundary, bank.shape) / ceilings.rates["multiply_adds_per_second"]
            )
        yield Record(
            method.name, method.boundary, k, t, n, pairs, median, min(own), max(own), pairs / median, error, share
        )


def _methods(bank: PatchBank, x: Tensor, alpha: float, sigma: float, k: int, settings: Settings) -> list[Method]:
    def ours(boundary: str, n: int) -> Evaluation:
        return partial(_machine(bank[:n], k, boundary, settings).denoise, x, alpha, sigma)

    channels, height, width = bank.shape
    positions = (height - k + 1) * (width - k + 1)
    most = min(len(bank), max(1, UNFOLDED_BYTES // (4 * positions * channels * k * k)))
    patches = windows(bank.read(slice(0, most)).to(x.device), k)

    def theirs(alternative: Alternative, n: int) -> Evaluation:
        return alternative(patches[: n * positions], x, alpha, sigma)

    return [
        *(Method(OURS, boundary, len(bank), partial(ours, boundary)) for boundary in settings.boundaries),
        *(Method(name, "interior", most, partial(theirs, f)) for name, f in alternatives().items()),
    ]


def operations(k: int, boundary: str, shape: tuple[int, int, int]) -> float:
    """Float32 operations, a fused multiply-add being one, that engine "cuda" takes for a pair, where the weight matters
    and no lane is idle (docs/performance.md): two for each channel and place of a map, additions along columns and then
    along rows, and for the weight a scaling, a comparison, the sum, and one product for each channel."""
    channels, _, width = shape
    wide = max(1, width - k + 1) if boundary == "zeros" else width
    pieces = 1 if boundary == "circular" else 2
    columns = 1 + pieces * (k - 1) / wide  # of sums along columns, for each pixel
    group = 8 if k > 7 else 4 if k > 3 else 2 if k > 1 else 1
    additions = (k + 2 * group - 4) / group if k > 1 else 0.0
    return columns * (2 * channels * (k + 7) / 8 + additions) + additions + 3 + channels


def _seconds(evaluation: Callable[[], object], calls: int = 1, device: torch.device = CPU) -> float:
    """Of one call."""
    if device.type == "cuda":  # by the device's own clock
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(torch.cuda.current_stream(device))
        for _ in range(calls):
            evaluation()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / calls
    start = time.perf_counter()
    for _ in range(calls):
        evaluation()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- The alternatives. Each prepares, from patches (P, C, k, k) and queries x (B, C, H, W), what is then timed. ------

Alternative = Callable[[Tensor, Tensor, float, float], Evaluation]


def alternatives() -> dict[str, Alternative]:
    """By name; KeOps where it is installed."""
    found: dict[str, Alternative] = {"SDPA": sdpa, "matmul": chunked_matmul, RELEASED_WAY: conv2d}
    if importlib.util.find_spec("pykeops") is not None:
        found["KeOps"] = keops
    return found


def windows(images: Tensor, k: int) -> Tensor:
    """All k x k windows that lie wholly inside images (n, C, H, W): (n * (H-k+1) * (W-k+1), C, k, k)."""
    views = images.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5)
    return views.reshape(-1, *views.shape[3:])


def sdpa(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """torch's scaled_dot_product_attention; an extra coordinate holds the patches' squared norms.

    q.k = (alpha * x.phi - alpha^2 * ||phi||^2 / 2) / sigma^2 is log w up to a constant of the query. The values are the
    keys once more, because the fused kernel wants both of one width; the centre pixel of the mean patch is the answer.
    """
    k = patches.shape[-1]
    queries = _queries(x, k).flatten(1)
    flat = patches.flatten(1)
    queries = torch.cat(
        [queries * (alpha / sigma**2), queries.new_full((len(queries), 1), -((alpha / sigma) ** 2) / 2)], 1
    )
    keys = torch.cat([flat, flat.square().sum(dim=1, keepdim=True)], dim=1)
    if x.is_cuda:  # whose fused kernel wants rows of whole 32 bytes
        queries, keys = (F.pad(rows, (0, -rows.shape[1] % 8)) for rows in (queries, keys))

    def evaluate() -> Tensor:
        mean = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=1.0)
        return _images(mean[0, 0, :, k * k // 2 : flat.shape[1] : k * k], x)

    return evaluate


def chunked_matmul(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """||a||^2 - 2ab + ||b||^2 by matrix products, chunk by chunk with a running softmax.

    As fast as torch makes it: ||a||^2, the same for all patches, is left out, the weights of a chunk stay in cache, and
    none is denormal.
    """
    queries = _queries(x, patches.shape[-1]).flatten(1)
    weights = MATERIALISED_WEIGHTS if x.is_cuda else CACHED_WEIGHTS * torch.get_num_threads()
    chunk = max(1, weights // min(len(queries), CACHED_QUERIES))
    flat = torch.split(patches.flatten(1), chunk)
    norms = [phi.square().sum(dim=1) for phi in flat]
    centres = torch.split(_centres(patches), chunk)

    def evaluate() -> Tensor:
        means = []
        for q in torch.split(queries, CACHED_QUERIES):
            log_w = (
                torch.addmm(n, q, phi.T, beta=-((alpha / sigma) ** 2) / 2, alpha=alpha / sigma**2)
                for n, phi in zip(norms, flat, strict=True)
            )
            means.append(_softmax_mean(log_w, centres, LEAST_LOG_WEIGHT))
        return _images(torch.cat(means), x)

    return evaluate


def conv2d(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """The paper's released code's way: patches of a batch of images are filters of a convolution of the query, and
    distances and weights are written out as whole tensors, here of up to 128 MB.

    Unlike there, the softmaxes of the batches are merged, not averaged.
    """
    chunks = torch.split(patches, max(1, MATERIALISED_WEIGHTS // x[0, 0].numel()))
    centres = [_centres(phi) for phi in chunks]
    wrapped = _wrapped(x, patches.shape[-1])

    def log_weights(image: Tensor, phi: Tensor) -> Tensor:
        image_norms = F.conv2d(image.square(), torch.ones_like(phi[:1]))
        phi_norms = phi.square().sum(dim=(1, 2, 3))[:, None, None]
        distances = image_norms - 2 * alpha * F.conv2d(image, phi) + alpha**2 * phi_norms
        return (-distances / (2 * sigma**2)).flatten(1).T

    def evaluate() -> Tensor:
        means = [_softmax_mean((log_weights(image, phi) for phi in chunks), centres) for image in wrapped]
        return _images(torch.cat(means), x)

    return evaluate


def keops(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """KeOps' symbolic matrices: squared differences and softmax in one compiled loop."""
    with contextlib.redirect_stdout(sys.stderr):  # where it says what it found
        importlib.import_module("pykeops").set_verbose(False)
        lazy = importlib.import_module("pykeops.torch").LazyTensor
    queries = _queries(x, patches.shape[-1]).flatten(1)[:, None]
    flat, centres = alpha * patches.flatten(1)[None], _centres(patches)[None]

    def evaluate() -> Tensor:
        distances = ((lazy(queries) - lazy(flat)) ** 2).sum(-1)
        return _images((distances / (-2 * sigma**2)).sumsoftmaxweight(lazy(centres), dim=1), x)

    return evaluate


def _softmax_mean(log_w: Iterable[Tensor], centres: Iterable[Tensor], least: float | None = None) -> Tensor:
    """Means (Q, C) of centres (P, C) with weights from log_w (Q, P), both in chunks along P; overwrites log_w."""
    m, s, y = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for chunk, chunk_centres in zip(log_w, centres, strict=True):
        higher = torch.maximum(m, chunk.amax(dim=1))
        below = chunk.sub_(higher[:, None])
        w = (below if least is None else below.clamp_(min=least)).exp_()
        rescale = (m - higher).exp()
        s = rescale * s + w.sum(dim=1)
        y = rescale[:, None] * y + w @ chunk_centres
        m = higher
    return y / s[:, None]


def _wrapped(x: Tensor, k: int) -> Tensor:
    return F.pad(x, (k // 2,) * 4, mode="circular")


def _queries(x: Tensor, k: int) -> Tensor:
    """The wrapped windows of all pixels, (B * H * W, C, k, k)."""
    return windows(_wrapped(x, k), k)


def _centres(patches: Tensor) -> Tensor:
    """(P, C)"""
    r = patches.shape[-1] // 2
    return patches[:, :, r, r].contiguous()


def _images(means: Tensor, x: Tensor) -> Tensor:
    """Means (B * H * W, C) as images (B, C, H, W)."""
    batch, channels, height, width = x.shape
    return means.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


# ---- What the machine can do at best -------------------------------------------------------------------------------


class Ceilings:
    """Float32 multiply-adds/s (matrix product), exponentials/s (in cache) and bytes copied/s (in memory), with torch.

    They bound pairs/s: a product of matrices takes k * k * C multiply-adds a pair, and who skips none takes one
    exponential. On a GPU, torch's exponentials are bound by its cache. `rates` holds the best seen in all calls of
    `measure`.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        on_gpu = device.type == "cuda"
        n, calls = (8192, 20) if on_gpu else (2048, 2000)
        a, product = torch.rand(n, n, device=device), torch.empty(n, n, device=device)
        cached = torch.rand(1 << 21 if on_gpu else (1 << 16) * torch.get_num_threads(), device=device)
        exponentials = torch.empty_like(cached)
        memory = torch.zeros(1 << (28 if on_gpu else 25), device=device)
        copy = torch.zeros_like(memory)

        def exp() -> None:
            for _ in range(calls):
                torch.exp(cached, out=exponentials)

        self._device = device
        self.rates: dict[str, float] = {}
        self._work: dict[str, tuple[int, Callable[[], object]]] = {
            "multiply_adds_per_second": (n**3, lambda: torch.mm(a, a, out=product)),
            "exponentials_per_second": (calls * len(cached), exp),
            "copied_bytes_per_second": (4 * len(memory), lambda: copy.copy_(memory)),
        }

    def measure(self) -> None:
        for name, (amount, work) in self._work.items():
            self.rates[name] = max(self.rates.get(name, 0.0), amount / _seconds(work, device=self._device))


def this_machine(threads: int, device: torch.device = CPU) -> dict[str, Any]:
    """What timings depend on, beside what is timed."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"cpu": _cpu_model(), "isa": _core.isa_in_use(), "threads": threads, "torch": torch.__version__, **gpu}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---- Ratios --------------------------------------------------------------------------------------------------------


def ratios(records: Sequence[Record]) -> dict[str, Any]:
    """How many times faster ours is than the fastest alternative and than the released code's way.

    Returns
    -------
    by_size     one entry a size: its noise level, the best alternative, its rate and that of the released way, and for
                each boundary our rate and the two ratios
    boundaries  for each boundary and ratio the geometric mean over the sizes, and the worst
    """
    by_size = [
        _ratios_of_size([record for record in records if record.patch_size == k])
        for k in dict.fromkeys(record.patch_size for record in records)
    ]
    boundaries: dict[str, Any] = {}
    for boundary in by_size[0]["boundaries"]:
        boundaries[boundary] = {}
        for ratio in ("over_best_alternative", "over_released_way"):
            values = [row["boundaries"][boundary][ratio] for row in by_size]
            boundaries[boundary][ratio] = {"geometric_mean": statistics.geometric_mean(values), "worst": min(values)}
    return {"by_size": by_size, "boundaries": boundaries}


def _ratios_of_size(records: Sequence[Record]) -> dict[str, Any]:
    others = {record.method: record for record in records if record.method != OURS}
    released, best = others[RELEASED_WAY], max(others.values(), key=lambda record: record.pairs_per_second)
    return {
        "patch_size": best.patch_size,
        "time": best.time,
        "best_alternative": best.method,
        "best_alternative_error": best.error,
        "best_alternative_pairs_per_second": best.pairs_per_second,
        "released_way_pairs_per_second": released.pairs_per_second,
        "boundaries": {
            record.boundary: {
                "pairs_per_second": record.pairs_per_second,
                "over_best_alternative": record.pairs_per_second / best.pairs_per_second,
                "over_released_way": record.pairs_per_second / released.pairs_per_second,
            }
            for record in records
            if record.method == OURS
        },
    }


# ---- The picture ---------------------------------------------------------------------------------------------------


def curves(result: dict[str, Any], channels: int) -> list[plots.Curve]:
    """pairs/s against k: ours by boundary, the alternatives, and what the machine's ceilings allow."""
    rates: dict[str, dict[int, float]] = {}
    for record in result["records"]:
        name = record["method"] + f" {record['boundary']}" * (record["method"] == OURS)
        rates.setdefault(name, {})[record["patch_size"]] = record["pairs_per_second"]
    drawn = [
        plots.Curve(
            name + " (released code's way)" * (name == RELEASED_WAY),
            by_size,
            "ours" if name.startswith(OURS) else "alternative",
        )
        for name, by_size in rates.items()
    ]
    sizes, top = result["settings"]["sizes"], result["ceilings"]
    products = {k: top["multiply_adds_per_second"] / (k * k * channels) for k in sizes}
    drawn.append(plots.Curve("ceiling of matrix products", products, "ceiling"))
    drawn.append(plots.Curve("one torch.exp a pair", dict.fromkeys(sizes, top["exponentials_per_second"]), "ceiling"))
    return drawn
