"""Theory against network: samples from the same noise, and how alike they are."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyels import adapters, metrics
from pyels.bank import PatchBank
from pyels.denoiser import Denoiser
from pyels.sampling import Step, sample
from pyels.studies import resumable
from pyels.studies.intervals import median_interval, share_interval

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pearson_r": metrics.pearson_r,
    "pearson_r2": metrics.pearson_r2,
    "r2_score": metrics.r2_score,
}
NETWORK = "network"


@dataclass(frozen=True)
class Contender:
    """A denoiser to compare, the number of its steps, and by parameter values for each, of which it is told its own."""

    denoiser: Denoiser
    steps: int
    per_step: Mapping[str, Sequence[Any]] = field(default_factory=dict)


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
) -> dict[str, Tensor]:
    """Draw every seed with every contender from the same noise; resumable in `folder` (see `resumable.resumable`).

    Returns `noise` and one tensor (n, C, H, W) for each contender by its name.
    """

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        noise = resumable.noise_of_seed(seeds[i], bank.shape)
        label = None if labels is None else torch.tensor([labels[i]])
        images = {"noise": noise}
        for name, contender in contenders.items():
            own = {one: values for one, values in contender.per_step.items() if one == contender.denoiser.parameter}
            images[name] = sample(
                contender.denoiser,
                noise[None],
                contender.steps,
                schedule,
                labels=label,
                callback=on_step,
                per_step=own,
            )[0]
        return images

    return resumable.resumable(folder, settings, len(seeds), one, progress, jobs)


def nearest_images(bank: PatchBank, images: Tensor) -> Tensor:
    """For each of `images` (n, C, H, W) the bank image with the least squared distance to it."""

    n = max(1, (1 << 20) // images[0].numel())  # in a few MB

    def nearest(image: Tensor) -> Tensor:
        distances = [(bank.read(slice(i, i + n)) - image).square().sum(dim=(1, 2, 3)) for i in range(0, len(bank), n)]
        return bank.read(torch.cat(distances).argmin()[None])[0]

    return torch.stack([nearest(image) for image in images])


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
    if "is" in figures:
        result["beats_is"] = {}
        for machine in machines:
            if machine != "is":
                wins = int((figures[machine]["pearson_r"] > figures["is"]["pearson_r"]).sum())
                share = wins / len(seeds)
                result["beats_is"][machine] = {"share": share, "interval_95": share_interval(wins, len(seeds))}
                if machine.startswith("els"):
                    result.setdefault("els_beats_is", share)
    return result


def load_demo_network() -> tuple[adapters.NetworkDenoiser, dict[str, Any]]:
    """The ResNet that comes with the package, and the record of its training and calibration."""
    data = importlib.resources.files("pyels") / "data"
    record: dict[str, Any] = json.loads((data / "fashion_resnet.json").read_text(encoding="utf-8"))
    with importlib.resources.as_file(data / "fashion_resnet.safetensors") as path:
        network, identity = adapters.load(path)
    assert isinstance(network, adapters.NetworkDenoiser)
    return network, {**record, "crc32": identity["crc32"]}
