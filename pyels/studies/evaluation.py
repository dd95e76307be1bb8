"""How well denoisers denoise images that they have not seen, at every noise level, beside the linear filter.

To predict what a network draws is another thing, which `comparison` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.bank import PatchBank
from pyels.denoiser import Denoiser
from pyels.networks.adapters import OutOfReach
from pyels.sampling import Level, Step
from pyels.studies import resumable
from pyels.studies.intervals import bootstrap

WIENER = "wiener"
_AT_ONCE = 1024  # images of a bank


def evaluate(
    contenders: Mapping[str, tuple[Denoiser, Sequence[Level]]],
    images: PatchBank,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    folder: str | Path,
    settings: Mapping[str, Any],
    progress: resumable.Progress,
    jobs: int = 1,
) -> Tensor:
    """The squared error of every denoiser at every one of its levels, image by image; resumable in `folder`.

    Parameters
    ----------
    contenders  each with the noise levels, as many for all, and what it is told there
    images      (n, C, H, W) that are denoised
    labels      of the images, which networks that are told classes are told, and machines are not
    seeds       (n,) of the noise of each image, which is the same at all levels

    Returns
    -------
    (n, levels, contenders) float64 mean squared errors, pixels in [-1, 1]; NaN where a network's own schedule does not
    reach the level
    """

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        x0 = images.read(slice(i, i + 1))
        noise = resumable.noise_of_seed(seeds[i], images.shape)[None]
        label = None if labels is None else torch.tensor([labels[i]])
        errors = []
        for denoiser, levels in contenders.values():
            own, told = [], label if getattr(denoiser, "conditional", False) else None
            for index, level in enumerate(levels):
                x = level.alpha * x0 + level.sigma * noise
                try:
                    found = denoiser.denoise(x, level.alpha, level.sigma, labels=told, **level.told)
                    own.append(float(metrics.mse(x0, found)))
                except OutOfReach:
                    found = x
                    own.append(math.nan)
                on_step(Step(index, len(levels), level, x, found, found))
            errors.append(own)
        return {"errors": torch.tensor(errors, dtype=torch.float64).T.contiguous()}

    return resumable.resumable(folder, settings, len(seeds), one, progress, jobs)["errors"]


def report(errors: Tensor, names: Sequence[str], levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Level by level, noisiest first: t, alpha, sigma, and by name

    error        mean squared error over the images; None where the level is out of reach
    ratio        of that error to the linear filter's
    interval_95  of the ratio, images being drawn again
    """
    rows = []
    for i, level in enumerate(levels):
        row: dict[str, Any] = {"t": level.t, "alpha": level.alpha, "sigma": level.sigma}
        row.update(error={}, ratio={}, interval_95={})
        linear = errors[:, i, names.index(WIENER)]
        for j, name in enumerate(names):
            own = errors[:, i, j]
            reached = bool(torch.isfinite(own).all())
            pairs = torch.stack([own, linear], dim=1)
            row["error"][name] = float(own.mean()) if reached else None
            row["ratio"][name] = float(own.mean() / linear.mean()) if reached else None
            row["interval_95"][name] = bootstrap(pairs, _ratio).tolist() if reached else None
        rows.append(row)
    return rows


def _ratio(pairs: Tensor) -> Tensor:
    """Of the means of (.., n, 2)."""
    first, second = pairs.mean(dim=-2).unbind(dim=-1)
    return first / second


def held_by(bank: PatchBank, images: PatchBank) -> list[int]:
    """The numbers of those images that the bank holds, pixel by pixel."""
    wanted: dict[bytes, list[int]] = {}
    for i, image in enumerate(images.read(slice(None))):
        wanted.setdefault(image.numpy().tobytes(), []).append(i)
    found: set[int] = set()
    for start in range(0, len(bank), _AT_ONCE):
        for image in bank.read(slice(start, min(len(bank), start + _AT_ONCE))):
            found.update(wanted.get(image.numpy().tobytes(), ()))
    return sorted(found)
