"""What a network looks at: at each step, the window with which a machine agrees best with it, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.adapters import NetworkDenoiser
from pyels.denoiser import Denoiser, eps_from_x0
from pyels.machines import Machine
from pyels.sampling import Level, Step, noise_levels, sample
from pyels.schedules import Schedule, make_schedule

SIZES = tuple(range(3, 19, 2))


@dataclass(frozen=True)
class Calibration:
    """Agreement of a machine with a network at every step and patch size.

    Attributes
    ----------
    times     (steps,) ascending
    sizes     (K,) the patch sizes tried
    cosine    (steps, K) median over samples of the cosine between network's and machine's noise estimates
    mse       (steps, K) median over samples of the mean squared difference of their x0 estimates
    gradient  (steps, H, W) average over samples of the absolute gradient of the network's noise estimate at the centre
              pixel (H // 2, W // 2) with respect to its input; None for a denoiser that is not a `NetworkDenoiser`
    """

    times: list[float]
    sizes: list[int]
    cosine: Tensor
    mse: Tensor
    gradient: Tensor | None = None

    @property
    def patch_sizes(self) -> list[int]:
        """The size with the largest cosine at each step: `patch_sizes` of `pyels.sample`."""
        return [self.sizes[i] for i in self.cosine.argmax(dim=1).tolist()]

    @property
    def patch_sizes_by_mse(self) -> list[int]:
        """The size with the least squared difference at each step."""
        return [self.sizes[i] for i in self.mse.argmin(dim=1).tolist()]

    @classmethod
    def of(
        cls, samples: dict[str, Tensor], sizes: Sequence[int], steps: int, schedule: str | Schedule = "cosine"
    ) -> Calibration:
        """The medians over samples of what `agreement` gives."""
        times = [level.t for level in noise_levels(steps, make_schedule(schedule))][::-1]
        gradient = samples["gradient"].mean(dim=0) if "gradient" in samples else None
        cosine, mse = (samples[name].quantile(0.5, dim=0) for name in ("cosine", "mse"))
        return cls(times, list(sizes), cosine, mse, gradient)

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
    return Calibration.of(
        agreement(network, machine, noise, labels, sizes, steps, schedule, callback), sizes, steps, schedule
    )


def agreement(
    network: Denoiser,
    machine: Machine,
    noise: Tensor,
    labels: Tensor | None = None,
    sizes: Sequence[int] = SIZES,
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    callback: Callable[[Step], Any] | None = None,
) -> dict[str, Tensor]:
    """What `calibrate` takes the medians of, sample by sample; arguments as there.

    Returns
    -------
    cosine, mse (B, steps, K) float64 and, of a `NetworkDenoiser`, gradient (B, steps, H, W); steps in ascending time
    """
    rows: dict[str, list[Tensor]] = {}

    def compare(step: Step) -> None:
        x, level = step.x, step.level
        network_eps = eps_from_x0(step.x0, x, level.alpha, level.sigma)
        means = machine.denoise_over_sizes(x, level.alpha, level.sigma, sizes, labels)
        found = {
            "cosine": [metrics.cosine(network_eps, eps_from_x0(x0, x, level.alpha, level.sigma)) for x0 in means],
            "mse": [metrics.mse(step.x0, x0) for x0 in means],
        }
        for name, values in found.items():
            rows.setdefault(name, []).append(torch.stack(values, dim=1))
        if isinstance(network, NetworkDenoiser):
            rows.setdefault("gradient", []).append(centre_gradient(network, x, level, labels))
        if callback is not None:
            callback(step)

    sample(network, noise, steps, schedule, labels=labels, callback=compare)
    return {name: torch.stack(values[::-1], dim=1) for name, values in rows.items()}


def centre_gradient(network: NetworkDenoiser, x: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
    """How much each input pixel moves the network's noise estimate at the centre pixel (the paper's figure 4a).

    Returns (B, H, W): |d eps(centre) / d x|, averaged over the channels of input and output.
    """
    _, channels, height, width = x.shape
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        eps = eps_from_x0(network.estimate(x, level.alpha, level.sigma, labels), x, level.alpha, level.sigma)
        centre = eps[:, :, height // 2, width // 2].sum(dim=0)  # samples do not meet in a network
        gradients = [torch.autograd.grad(centre[c], x, retain_graph=True)[0].abs() for c in range(channels)]
    return torch.stack(gradients).mean(dim=(0, 2))
