"""What a network looks at: at each step, the window with which a machine agrees best with it, and its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.bank import PatchBank
from pyels.bank.selection import Selection, as_numbers
from pyels.denoiser import Denoiser, eps_from_x0
from pyels.networks import Network
from pyels.networks.adapters import NetworkDenoiser, NotDifferentiable
from pyels.sampling import Level, Step, sample
from pyels.schedules import Schedule

# What is tried of each parameter.
TRIED: dict[str, tuple[float, ...]] = {
    "patch_size": tuple(range(3, Network.LARGEST_SIZE + 1, 2)),
    "threshold": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "width": (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6),
    "mass": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}


@dataclass(frozen=True)
class Calibration:
    """Agreement of a machine with a network at every step and patch size, or other parameter, sample by sample.

    Attributes
    ----------
    times      (steps,) ascending
    sizes      (K,) the patch sizes, or values of the parameter, that were tried
    cosines    (B, steps, K) float64 cosine between network's and machine's noise estimates
    mses       (B, steps, K) float64 mean squared difference of their x0 estimates
    gradients  (B, steps, H, W) the network's `centre_gradient`; None for a denoiser that torch
               cannot differentiate
    parameter  the machine's
    """

    times: list[float]
    sizes: list[Any]
    cosines: Tensor
    mses: Tensor
    gradients: Tensor | None = None
    parameter: str = "patch_size"

    @property
    def cosine(self) -> Tensor:
        """Median over the samples, (steps, K)."""
        return self.cosines.quantile(0.5, dim=0)

    @property
    def mse(self) -> Tensor:
        """Median over the samples, (steps, K)."""
        return self.mses.quantile(0.5, dim=0)

    @property
    def best(self) -> list[Any]:
        """The value with the largest median cosine at each step, for `pyels.sample`."""
        return [self.sizes[i] for i in self.cosine.argmax(dim=1).tolist()]

    @property
    def best_by_mse(self) -> list[Any]:
        """The value with the least median squared difference at each step."""
        return [self.sizes[i] for i in self.mse.argmin(dim=1).tolist()]

    @property
    def series(self) -> dict[str, list[Any]]:
        """The best values, by what they are best in."""
        return {"largest cosine similarity": self.best, "least squared error": self.best_by_mse}

    @property
    def lost(self) -> tuple[str, Tensor]:
        """What every other value costs, in words and (steps, K)."""
        below = self.cosine.amax(dim=1, keepdim=True) - self.cosine
        return "median cosine similarity below the best", below

    def record(self) -> dict[str, Any]:
        """What `scales.json` holds: the best values, called patch_sizes where they are, and all scores."""
        best = "patch_sizes" if self.parameter == "patch_size" else "values"
        return {
            "times": [round(t, 9) for t in self.times],
            "parameter": self.parameter,
            best: self.best,
            f"{best}_by_mse": self.best_by_mse,
            "sizes": self.sizes,
            "cosine": self.cosine.tolist(),
            "mse": self.mse.tolist(),
        }


def calibrate(
    network: Denoiser,
    machine: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    sizes: Sequence[float] | None = None,
    steps: int = 20,
    schedule: str | Schedule = "cosine",
    callback: Callable[[Step], Any] | None = None,
    images: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Compare `machine` at every size with `network` along the network's own reverse trajectories.

    The paper's calibration (section 4, figure 4b): for each step, the size whose estimate has the largest median cosine
    similarity to the network's. Of machines with another parameter than a patch size, its values take the sizes' place.

    Parameters
    ----------
    noise     (B, C, H, W) float32 starting noise of the trajectories
    labels    (B,) classes of the samples, for the network and, as a restriction of the bank, for the machine
    sizes     values of `machine.parameter` to try, such as odd patch sizes; None: those in `TRIED`
    callback  called with a `Step` after every step of the network
    images    let the machine look at so many of the images that a sample draws on, which `share` chooses; None: at all
    seed      of that choice, for sample b seed + b

    Raises ValueError for a machine without a parameter, and values that it cannot have.
    """
    parameter = machine.parameter
    if parameter is None:
        raise ValueError(f"{type(machine).__name__} has none of {', '.join(TRIED)}, and nothing to calibrate")
    tried = fitting(machine, TRIED[parameter])
    if sizes is not None:
        tried = [machine.check_wish(parameter, value) for value in sizes]
    drawn_on: dict[str, Any] = {"labels": labels}
    if images is not None:
        drawn_on = {"selection": share(machine.bank, labels, len(noise), images, seed)}  # type: ignore[attr-defined]
    times: list[float] = []
    cosines: list[Tensor] = []
    mses: list[Tensor] = []
    gradients: list[Tensor] = []

    def compare(step: Step) -> None:
        x, level = step.x, step.level
        network_eps = eps_from_x0(step.x0, x, level.alpha, level.sigma)
        means = [machine.denoise(x, level.alpha, level.sigma, **drawn_on, **{parameter: value}) for value in tried]
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

    scores = ascending(cosines), ascending(mses), ascending(gradients) if gradients else None
    return Calibration(times[::-1], tried, *scores, parameter)


def share(bank: PatchBank, labels: Tensor | None, batch: int, images: int, seed: int) -> Selection:
    """For each of so many samples at most so many images, at random of its class, (B,), or of all.

    Every sample has a draw of its own, by seed + b: what a draw does to its scores, the median over samples evens out.
    """
    everything = bank.select(labels).expand(batch)
    if int(everything.counts.max()) <= images:
        return everything
    chosen = []
    for b in range(batch):
        numbers = as_numbers(everything.of([b]).images())
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + b))
        chosen.append(numbers[order[:images]])
    return bank.select(images=chosen)


def fitting(machine: Denoiser, values: Iterable[float]) -> list[Any]:
    """Those of the values that the machine's parameter can have."""
    some = []
    for value in values:
        with contextlib.suppress(ValueError):
            some.append(machine.check_wish(str(machine.parameter), value))
    return some


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
