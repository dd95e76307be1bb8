"""Patch sizes from a network: at each step, the window with which the machine agrees best with the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pyels import metrics
from pyels.denoiser import Denoiser, eps_from_x0
from pyels.machines import Machine
from pyels.sampling import Step, sample
from pyels.schedules import Schedule


@dataclass(frozen=True)
class Calibration:
    """Agreement of a machine with a network at every step and patch size.

    Attributes
    ----------
    times         (steps,) ascending
    sizes         (K,) the patch sizes tried
    cosine        (steps, K) median over samples of the cosine between network's and machine's noise estimates
    mse           (steps, K) median over samples of the mean squared difference of their x0 estimates
    patch_sizes   (steps,) the size with the largest cosine at each step: `patch_sizes` of `pyels.sample`
    """

    times: list[float]
    sizes: list[int]
    cosine: Tensor
    mse: Tensor

    @property
    def patch_sizes(self) -> list[int]:
        return [self.sizes[i] for i in self.cosine.argmax(dim=1).tolist()]


def calibrate(
    network: Denoiser,
    machine: Machine,
    noise: Tensor,
    labels: Tensor | None = None,
    sizes: Sequence[int] = tuple(range(3, 19, 2)),
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    progress: bool = True,
) -> Calibration:
    """Compare `machine` at every size with `network` along the network's own reverse trajectories.

    The paper's calibration (section 4, figure 4b): for each step, the size whose estimate has the largest median cosine
    similarity to the network's.

    Parameters
    ----------
    noise   (B, C, H, W) float32 starting noise of the trajectories
    labels  (B,) classes of the samples, for the network and, as a restriction of the bank, for the machine
    sizes   odd patch sizes to try
    """
    cosines, errors, times = [], [], []
    bar = tqdm(total=steps, desc="calibrating", disable=not progress)

    def compare(step: Step) -> None:
        x, level = step.x, step.level
        network_eps = eps_from_x0(step.x0, x, level.alpha, level.sigma)
        row_cosine, row_error = [], []
        for x0 in machine.denoise_over_sizes(x, level.alpha, level.sigma, sizes, labels):
            machine_eps = eps_from_x0(x0, x, level.alpha, level.sigma)
            row_cosine.append(metrics.cosine(network_eps, machine_eps).median())
            row_error.append(metrics.mse(step.x0, x0).median())
        bar.update()
        cosines.append(torch.stack(row_cosine))
        errors.append(torch.stack(row_error))
        times.append(level.t)

    with bar:
        sample(network, noise, steps, schedule, labels=labels, callback=compare)
    return Calibration(times[::-1], list(sizes), torch.stack(cosines[::-1]), torch.stack(errors[::-1]))
