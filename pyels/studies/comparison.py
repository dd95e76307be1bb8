"""Theory against network: samples from the same noise, and how alike they are."""

from __future__ import annotations

import copy
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyels import adapters, metrics
from pyels.bank import PatchBank
from pyels.denoiser import Composite, Denoiser
from pyels.engines import Sampled
from pyels.machines import Machine
from pyels.sampling import Step, noise_levels, sample
from pyels.schedules import make_schedule
from pyels.studies import resumable
from pyels.studies.intervals import bootstrap, median, median_interval, resampled, share_interval

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pearson_r": metrics.pearson_r,
    "pearson_r2": metrics.pearson_r2,
    "r2_score": metrics.r2_score,
}
# Of the estimates of x0 at a step.
STEP_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": metrics.mse,
    "cosine": metrics.cosine,
    "r2_score": metrics.r2_score,
}
T = TypeVar("T")
WAYS = ("at the network's x", "along its own")
NETWORK = "network"
CURVES = "steps of "  # begins the name of a tensor that holds a machine's measures at every step
AGAIN = "other dice of "  # and of one that holds what it draws with other dice
DRAWN_AGAIN = 10  # of the seeds, the first: enough for what dice do to r, to a quarter or so


def is_network(name: str) -> bool:
    """Whether a contender of this name is the network, with whatever number of steps."""
    return name.partition("@")[0] == NETWORK


@dataclass(frozen=True)
class Contender:
    """A denoiser to compare, the number of its steps, and by parameter values for each, of which it is told its own."""

    denoiser: Denoiser
    steps: int
    per_step: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Sequence[Any]]:
        return {name: values for name, values in self.per_step.items() if name == self.denoiser.parameter}


def other_dice(denoiser: Denoiser) -> Denoiser | None:
    """The same but for the dice of its engine, of independent draws; None where none are thrown: the engine is exact,
    or there is nothing to search among."""
    if isinstance(denoiser, Composite):
        inner = other_dice(denoiser.denoiser)
        return None if inner is None else _but(denoiser, denoiser=inner)
    if isinstance(denoiser, Machine) and isinstance(denoiser.engine, Sampled) and denoiser.boundary is not None:
        engine = denoiser.engine
        return _but(denoiser, engine=_but(engine, dice=engine.dice ^ 1, _indexes=engine._indexes))  # not read twice
    return None


def _but(one: T, **changed: Any) -> T:
    other = copy.copy(one)
    vars(other).update(changed)
    return other


def by_other_dice(contenders: Mapping[str, Contender]) -> dict[str, Contender]:
    """The machines that throw dice, with others."""
    others = {name: other_dice(one.denoiser) for name, one in contenders.items() if not is_network(name)}
    return {name: replace(contenders[name], denoiser=other) for name, other in others.items() if other is not None}


def compare(
    contenders: Mapping[str, Contender],
    bank: PatchBank,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    schedule: str,
    folder: str | Path,
    settings: Mapping[str, Any],
    progress: resumable.Progress,
    jobs: int = 1,
    per_step: bool = False,
) -> dict[str, Tensor]:
    """Draw every seed with every contender from the same noise; resumable in `folder` (see `resumable.resumable`).

    Returns `noise` and one tensor (n, C, H, W) for each contender by its name. With `per_step`, for which all take as
    many steps, also "steps of NAME" for each machine, (n, 2, steps, 3) float64: `STEP_MEASURES` of its estimates of x0
    with the network's at every step, the cleanest first; asked at the network's x, and along its own trajectory. For
    each machine that throws dice also "other dice of NAME", (min(n, DRAWN_AGAIN), C, H, W): the first seeds once more.
    """
    again = by_other_dice(contenders)

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        noise = resumable.noise_of_seed(seeds[i], bank.shape)
        label = None if labels is None else torch.tensor([labels[i]])
        images, seen = {"noise": noise}, {name: list[Step]() for name in contenders}

        def drawn(contender: Contender, callback: Callable[[Step], None]) -> Tensor:
            steps, told = contender.steps, contender.told
            x = noise[None]
            return sample(contender.denoiser, x, steps, schedule, labels=label, callback=callback, per_step=told)[0]

        for name, contender in contenders.items():

            def callback(step: Step, own: list[Step] = seen[name]) -> None:
                if per_step:
                    own.append(step)
                on_step(step)

            images[name] = drawn(contender, callback)
        for name, contender in again.items():  # of all seeds alike, as items have to be
            images[AGAIN + name] = drawn(contender, on_step) if i < DRAWN_AGAIN else images[name].clone()
        for name, contender in contenders.items():
            if per_step and name != NETWORK:
                images[CURVES + name] = _along(contender, schedule, seen[NETWORK], seen[name], label, on_step)
        return images

    images = resumable.resumable(folder, settings, len(seeds), one, progress, jobs)
    return images | {AGAIN + name: images[AGAIN + name][:DRAWN_AGAIN] for name in again}


def _along(
    contender: Contender,
    schedule: str,
    network: Sequence[Step],
    own: Sequence[Step],
    label: Tensor | None,
    on_step: Callable[[Step], None],
) -> Tensor:
    levels = noise_levels(contender.steps, make_schedule(schedule), per_step=contender.told)
    rows = []
    for level, theirs, mine in zip(levels, network, own, strict=True):
        x0 = contender.denoiser.denoise(theirs.x, level.alpha, level.sigma, labels=label, **level.told)
        on_step(theirs)
        rows.append([[float(f(theirs.x0, one)) for f in STEP_MEASURES.values()] for one in (x0, mine.x0)])
    return torch.tensor(rows[::-1], dtype=torch.float64).transpose(0, 1).contiguous()


def nearest_images(bank: PatchBank, images: Tensor) -> Tensor:
    """For each of `images` (n, C, H, W) the bank image with the least squared distance to it."""
    return bank.read(metrics.nearest_image(images, bank).image)


def report(images: Mapping[str, Tensor], machines: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Each machine against the network.

    Returns
    -------
    median        machine -> measure -> median over the seeds
    quartiles     machine -> measure -> [25%, 75%]
    interval_95   machine -> measure -> 95% interval of the median, by `median_interval`
    per_seed      machine -> measure -> the figure of each seed
    beats_is      machine -> share of the seeds at which its pearson_r is above that of IS, and the interval_95 of that
                  share, by `share_interval`; where IS is one of the machines
    els_beats_is  the share of the first of the ELS machines
    seeds         the seeds
    matrix        Pearson r of each of the `names` with each, median and interval_95 of the median, rows of rows
    per_step      with `compare(per_step=True)`: machine -> way -> measure -> median and interval_95, the cleanest first
    dice          machine, of those that throw dice -> what these have to do with its pearson_r, as `_of_dice` says
    """
    result: dict[str, Any] = {"median": {}, "quartiles": {}, "interval_95": {}, "seeds": list(seeds), "per_seed": {}}
    figures = {
        machine: {name: measure(images[NETWORK], images[machine]) for name, measure in MEASURES.items()}
        for machine in machines
    }
    for machine, row in figures.items():
        for part, summary in (
            ("median", lambda values: float(values.quantile(0.5))),
            ("quartiles", lambda values: [float(values.quantile(q)) for q in (0.25, 0.75)]),
            ("interval_95", median_interval),
            ("per_seed", Tensor.tolist),
        ):
            result[part][machine] = {name: summary(values) for name, values in row.items()}
    result["matrix"] = _matrix(images, [NETWORK, *machines])
    curves = {machine: images[CURVES + machine] for machine in machines if CURVES + machine in images}
    if curves:
        result["per_step"] = {machine: _summary(values) for machine, values in curves.items()}
    again = {machine: images[AGAIN + machine] for machine in machines if AGAIN + machine in images}
    if again:
        r = {one: metrics.pearson_r(images[NETWORK][: len(drawn)], drawn) for one, drawn in again.items()}
        result["dice"] = {machine: _of_dice(figures[machine]["pearson_r"], r[machine]) for machine in again}
    if "is" in figures:
        result["beats_is"] = {}
        for machine in machines:
            if machine != "is" and not is_network(machine):
                wins = int((figures[machine]["pearson_r"] > figures["is"]["pearson_r"]).sum())
                share = wins / len(seeds)
                result["beats_is"][machine] = {"share": share, "interval_95": share_interval(wins, len(seeds))}
                if machine.startswith("els"):
                    result.setdefault("els_beats_is", share)
    return result


def _of_dice(r: Tensor, again: Tensor) -> dict[str, Any]:
    """How much of the uncertainty of r (n,), a figure of n seeds, is by dice; `again` (m,) is r of the first m of them
    with other, independent ones.

    Returns
    -------
    seeds            m
    sd               standard deviation over dice of r of a seed: sqrt(mean((r - again)^2) / 2)
    interval_95      of sd, by `bootstrap` over the m seeds
    sd_over_seeds    that of r over seeds, in which the one over dice is contained; None: there is one seed
    share_of_median  of dice in the variance over seeds of the median of r, and so of its interval, in which they are
                     contained: by `resampled`, the variance of median(r_i + d_i), where each d_i is one of the
                     +-(r - again) / sqrt(2), over that of the median of n of the r_i. None: all r are the same

    Of the mean of r over seeds the share is q = (sd / sd_over_seeds)^2. That of the median is larger, as it hangs on
    the few seeds in the middle: for many seeds and normal r, 2 / pi * arccos(1 - q), or about sqrt(q). With ten seeds
    drawn twice it is known to a factor of about two. What is off alike for all dice is in none of these.
    """
    apart = r[: len(again)] - again
    moves = torch.cat([apart, -apart]) / math.sqrt(2)
    by_dice, by_seeds = resampled(moves, lambda some: median(r + some), len(r)).var(), resampled(r, median).var()
    return {
        "seeds": len(again),
        "sd": float(_sd(apart[None])),
        "interval_95": bootstrap(apart, _sd).tolist(),
        "sd_over_seeds": float(r.std()) if len(r) > 1 else None,
        "share_of_median": min(1.0, float(by_dice / by_seeds)) if (r != r[0]).any() else None,
    }


def _sd(apart: Tensor) -> Tensor:
    """Of each of two values, from differences (R, m) of such pairs: (R,)."""
    return (apart.square().mean(1) / 2).sqrt()


def _matrix(images: Mapping[str, Tensor], names: list[str]) -> dict[str, Any]:
    medians, intervals = [[1.0] * len(names) for _ in names], [[[1.0, 1.0]] * len(names) for _ in names]
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            r = metrics.pearson_r(images[one], images[other])
            medians[i][j] = medians[j][i] = float(r.quantile(0.5))
            intervals[i][j] = intervals[j][i] = median_interval(r)
    return {"names": names, "median": medians, "interval_95": intervals}


def _summary(values: Tensor) -> dict[str, Any]:
    """Of (n, 2, steps, 3)."""
    medians, ends = values.quantile(0.5, dim=0), bootstrap(values, median)
    return {
        way: {
            measure: {"median": medians[i, :, j].tolist(), "interval_95": ends[:, i, :, j].T.tolist()}
            for j, measure in enumerate(STEP_MEASURES)
        }
        for i, way in enumerate(WAYS)
    }


def load_demo_network() -> tuple[adapters.NetworkDenoiser, dict[str, Any]]:
    """The ResNet that comes with the package, and the record of its training and calibration."""
    data = importlib.resources.files("pyels") / "data"
    record: dict[str, Any] = json.loads((data / "fashion_resnet.json").read_text(encoding="utf-8"))
    with importlib.resources.as_file(data / "fashion_resnet.safetensors") as path:
        network, identity = adapters.load(path)
    assert isinstance(network, adapters.NetworkDenoiser)
    return network, {**record, "crc32": identity["crc32"]}
