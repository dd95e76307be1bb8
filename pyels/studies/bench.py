"""Pairs per second of the machines, beside what one would otherwise run, on the same images and in the same run.

A pair is one query window against one bank patch: a distance, a weight, an accumulation.

The alternatives all evaluate ELS "interior", whose query windows wrap around and whose patches lie wholly inside the
images. They work on any dense list of patches, so their pairs/s would be the same for another boundary's list. Their
patches are unfolded beforehand, outside the timing, which is in their favour: unfolding takes a per cent or two,
and for a large bank there is no memory for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyels import presets
from pyels.bank import PatchBank
from pyels.machines import ELS
from pyels.schedules import make_schedule
from pyels.studies import plots, resumable
from pyels.studies.alternatives import RELEASED_WAY, Alternative, Evaluation, alternatives, windows
from pyels.studies.hardware import Ceilings, seconds_of, this_computer, torch_threads

OURS = "pyels"
PRESET = "fashion-mnist-resnet-zeros"
CHECKED_IMAGES = 8  # the oracle is slow
OURS_WITHIN = 1e-4  # of the oracle, or there is nothing worth timing
ALTERNATIVES_WITHIN = 1e-3  # of the oracle; what is further off is marked
UNFOLDED_BYTES = 1 << 27


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
        "computer": this_computer(settings.threads, device),
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
    noise = torch.stack([resumable.noise_of_seed(settings.seed + i, bank.shape) for i in range(len(x0))])
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
        n = min(method.most_images, max(1, int(checked * settings.seconds / seconds_of(few, device=x.device))))
        evaluation = method.prepare(n)
        evaluation()  # warms up
        calls.append(max(1, round(settings.seconds / seconds_of(evaluation, device=x.device))))
        errors.append(error)
        images.append(n)
        evaluations.append(evaluation)
        progress()
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(settings.repeats):  # in turn, so that a machine whose speed drifts treats all alike
        ceilings.measure()
        for own, evaluation, n in zip(seconds, evaluations, calls, strict=True):
            own.append(seconds_of(evaluation, n, x.device))
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
    """pairs/s against k: ours by boundary, the alternatives, and what this computer allows those that multiply matrices
    and take an exponential for every pair. Ours does neither, and may lie above."""
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
    drawn.append(plots.Curve("most by matrix products", products, "ceiling"))
    drawn.append(
        plots.Curve("most with one torch.exp a pair", dict.fromkeys(sizes, top["exponentials_per_second"]), "ceiling")
    )
    return drawn
