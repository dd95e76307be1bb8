"""What a network looks at: at each step, the window with which a machine agrees best with it, and its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.denoiser import Denoiser, eps_from_x0
from pyels.machines import Machine
from pyels.networks import Network
from pyels.networks.adapters import NetworkDenoiser, NotDifferentiable
from pyels.sampling import Level, Step, sample
from pyels.schedules import Schedule

SIZES = tuple(range(3, Network.LARGEST_SIZE + 1, 2))


@dataclass(frozen=True)
class Calibration:
    """Agreement of a machine with a network at every step and patch size, sample by sample.

    Attributes
    ----------
    times      (steps,) ascending
    sizes      (K,) the patch sizes tried
    cosines    (B, steps, K) float64 cosine between network's and machine's noise estimates
    mses       (B, steps, K) float64 mean squared difference of their x0 estimates
    gradients  (B, steps, H, W) the network's `centre_gradient`; None for a denoiser that torch
               cannot differentiate
    """

    times: list[float]
    sizes: list[int]
    cosines: Tensor
    mses: Tensor
    gradients: Tensor | None = None

    @property
    def cosine(self) -> Tensor:
        """Median over the samples, (steps, K)."""
        return self.cosines.quantile(0.5, dim=0)

    @property
    def mse(self) -> Tensor:
        """Median over the samples, (steps, K)."""
        return self.mses.quantile(0.5, dim=0)

    @property
    def patch_sizes(self) -> list[int]:
        """The size with the largest median cosine at each step: `patch_sizes` of `pyels.sample`."""
        return [self.sizes[i] for i in self.cosine.argmax(dim=1).tolist()]

    @property
    def patch_sizes_by_mse(self) -> list[int]:
        """The size with the least median squared difference at each step."""
        return [self.sizes[i] for i in self.mse.argmin(dim=1).tolist()]

    def record(self) -> dict[str, Any]:
        """What `scales.json` holds: times, sizes, patch_sizes, and every size's scores at every step."""
        return {
            "times": [round(t, 9) for t in self.times],
            "patch_sizes": self.patch_sizes,
            "patch_sizes_by_mse": self.patch_sizes_by_mse,
            "sizes": self.sizes,
            "cosine": self.cosine.tolist(),
            "mse": self.mse.tolist(),
        }


def calibrate(
    network: Denoiser,
    machine: Machine,
    noise: Tensor,
    labels: Tensor | None = None,
    sizes: Sequence[int] = SIZES,
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    callback: Callable[[Step], Any] | None = None,
) -> Calibration:
    """Compare `machine` at every size with `network` along the network's own reverse trajectories.

    The paper's calibration (section 4, figure 4b): for each step, the size whose estimate has the largest median cosine
    similarity to the network's.

    Parameters
    ----------
    noise     (B, C, H, W) float32 starting noise of the trajectories
    labels    (B,) classes of the samples, for the network and, as a restriction of the bank, for the machine
    sizes     odd patch sizes to try
    callback  called with a `Step` after every step of the network
    """
    times: list[float] = []
    cosines: list[Tensor] = []
    mses: list[Tensor] = []
    gradients: list[Tensor] = []

    def compare(step: Step) -> None:
        x, level = step.x, step.level
        network_eps = eps_from_x0(step.x0, x, level.alpha, level.sigma)
        means = machine.denoise_over_sizes(x, level.alpha, level.sigma, sizes, labels)
        estimates = [eps_from_x0(x0, x, level.alpha, level.sigma) for x0 in means]
        times.append(level.t)
        cosines.append(torch.stack([metrics.cosine(network_eps, eps) for eps in estimates], dim=1))
        mses.append(torch.stack([metrics.mse(step.x0, x0) for x0 in means], dim=1))
        if isinstance(network, NetworkDenoiser):
            with contextlib.suppress(NotDifferentiable):
                gradients.append(centre_gradient(network, x, level, labels))
        if callback is not None:
            callback(step)

    sample(network, noise, steps, schedule, labels=labels, callback=compare)

    def ascending(values: list[Tensor]) -> Tensor:
        return torch.stack(values[::-1], dim=1)

    return Calibration(
        times[::-1], list(sizes), ascending(cosines), ascending(mses), ascending(gradients) if gradients else None
    )


def centre_gradient(network: NetworkDenoiser, x: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
    """How much each input pixel moves the network's noise estimate at the centre pixel (the paper's figure 4a).

    Returns (B, H, W): |d eps(centre) / d x|, averaged over the channels of input and output. Raises NotDifferentiable.
    """
    _, channels, height, width = x.shape
    query = network.query(x, level.alpha, level.sigma, labels)
    x = query.x.requires_grad_(True)
    with torch.enable_grad():
        eps = eps_from_x0(network.estimate(query), x, level.alpha, level.sigma)
        centre = eps[:, :, height // 2, width // 2].sum(dim=0)  # samples do not meet in a network
        gradients = [torch.autograd.grad(centre[c], x, retain_graph=True)[0].abs() for c in range(channels)]
    return torch.stack(gradients).mean(dim=(0, 2))
