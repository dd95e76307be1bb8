"""Theory against network: samples from the same noise, and how alike they are."""

from __future__ import annotations

import importlib.resources
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pyels import metrics, runs
from pyels.bank import PatchBank
from pyels.denoiser import Denoiser
from pyels.nets import NetworkDenoiser, ResNet
from pyels.sampling import Step, sample

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pearson_r": metrics.pearson_r,
    "pearson_r2": metrics.pearson_r2,
    "r2_score": metrics.r2_score,
}


class Progress(Protocol):
    """What is told of a comparison's progress."""

    def reach(self, item: int) -> None: ...

    def step(self, step: Step) -> None: ...


@dataclass(frozen=True)
class Contender:
    """A denoiser to compare, with its patch sizes (None where it has none)."""

    denoiser: Denoiser
    patch_sizes: Sequence[int] | None = None


def compare(
    contenders: Mapping[str, Contender],
    bank: PatchBank,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    steps: int,
    folder: str | Path,
    settings: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Tensor]:
    """Draw every seed with every contender from the same noise; resumable in `folder` (see `runs.resumable`).

    Returns `noise`, one tensor (n, C, H, W) for each contender by its name, and `nearest`, the training image nearest
    to the first contender's sample.
    """

    def one(i: int) -> dict[str, Tensor]:
        progress.reach(i)
        noise = runs.noise_of_seed(seeds[i], bank.shape)
        label = None if labels is None else torch.tensor([labels[i]])
        images = {"noise": noise}
        for name, contender in contenders.items():
            images[name] = sample(
                contender.denoiser, noise[None], steps, "cosine", contender.patch_sizes, label, callback=progress.step
            )[0]
        images["nearest"] = nearest_image(bank, images[next(iter(contenders))])
        return images

    return runs.resumable(folder, settings, len(seeds), one)


def nearest_image(bank: PatchBank, image: Tensor) -> Tensor:
    """The bank image (C, H, W) with the least squared distance to `image`."""
    distances = torch.cat(
        [(bank.read(slice(i, i + 1024)) - image).square().sum(dim=(1, 2, 3)) for i in range(0, len(bank), 1024)]
    )
    return bank.read(distances.argmin()[None])[0]


def report(images: Mapping[str, Tensor], network: str, machines: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Each machine against the network: every measure for every seed, their medians, and how often ELS beats IS."""
    figures = {
        machine: {name: measure(images[network], images[machine]).tolist() for name, measure in MEASURES.items()}
        for machine in machines
    }
    median = {
        machine: {name: float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) for name, values in row.items()}
        for machine, row in figures.items()
    }
    result: dict[str, Any] = {"median": median, "seeds": list(seeds), "per_seed": figures}
    if "els" in figures and "is" in figures:
        wins = [a > b for a, b in zip(figures["els"]["pearson_r"], figures["is"]["pearson_r"], strict=True)]
        result["els_beats_is"] = sum(wins) / len(wins)
    return result


def load_demo_network() -> tuple[NetworkDenoiser, dict[str, Any]]:
    """The ResNet that comes with the package, and the record of its training and calibration."""
    data = importlib.resources.files("pyels") / "data"
    record: dict[str, Any] = json.loads((data / "fashion_resnet.json").read_text(encoding="utf-8"))
    with importlib.resources.as_file(data / "fashion_resnet.safetensors") as path:
        record["crc32"] = f"{zlib.crc32(path.read_bytes()):08x}"
        return NetworkDenoiser(ResNet.load(path)), record
