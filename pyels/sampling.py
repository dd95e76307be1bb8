"""From noise to a sample: one function for each solver, and `sample`, which prepares what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.checks import CPU, Levels, check_labels, check_number, numbers_of
from pyels.denoiser import Denoiser, eps_from_x0, underived
from pyels.schedules import Schedule, make_schedule

Estimate = Callable[[Tensor, "Level"], Tensor]


@dataclass(frozen=True)
class Level:
    """One noise level on the way: its time, alpha, sigma, and what else the denoiser is told there, by name."""

    t: float
    alpha: float
    sigma: float
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patch_size(self) -> int | None:
        return self.told.get("patch_size")


@dataclass(frozen=True)
class Step:
    """What `callback` gets after each step.

    Attributes
    ----------
    index  0 .. steps - 1
    steps  number of steps
    level  the noise level the step started from
    x      (B, C, H, W) the noisy image it started from
    x0     (B, C, H, W) the denoiser's estimate there
    to     (B, C, H, W) where the step led
    """

    index: int
    steps: int
    level: Level
    x: Tensor
    x0: Tensor
    to: Tensor


CLEAN = Level(0.0, 1.0, 0.0)


def ddim(
    estimate: Estimate,
    x: Tensor,
    levels: Sequence[Level],
    on_step: Callable[[Step], Any],
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, equation 12); eta = 0 is deterministic, eta = 1 is ancestral sampling.

    Written for any (alpha, sigma): the posterior standard deviation of equation 16 becomes
    eta * (sigma' / sigma) * sqrt(sigma^2 - (sigma' * alpha / alpha')^2).
    """
    for index, (level, to) in enumerate(zip(levels, [*levels[1:], CLEAN], strict=True)):
        x0 = estimate(x, level)
        eps = eps_from_x0(x0, x, level.alpha, level.sigma)
        added = 0.0
        if eta > 0 and to.sigma > 0:
            lost = level.sigma**2 - (to.sigma * level.alpha / to.alpha) ** 2
            added = eta * to.sigma / level.sigma * max(0.0, lost) ** 0.5
        ahead = to.alpha * x0 + (max(0.0, to.sigma**2 - added**2)) ** 0.5 * eps
        if added:
            home = CPU if generator is None else generator.device
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=home)
            ahead = ahead + added * drawn.to(x.device)
        on_step(Step(index, len(levels), level, x, x0, ahead))
        x = ahead
    return x


def euler(estimate: Estimate, x: Tensor, levels: Sequence[Level], on_step: Callable[[Step], Any]) -> Tensor:
    """Euler's method for the probability-flow ODE dx = x0_hat d(alpha) + eps_hat d(sigma).

    In these coordinates a step is that of DDIM with eta = 0: the two agree to rounding for every schedule.
    """
    for index, (level, to) in enumerate(zip(levels, [*levels[1:], CLEAN], strict=True)):
        x0 = estimate(x, level)
        eps = eps_from_x0(x0, x, level.alpha, level.sigma)
        ahead = x + (to.alpha - level.alpha) * x0 + (to.sigma - level.sigma) * eps
        on_step(Step(index, len(levels), level, x, x0, ahead))
        x = ahead
    return x


def heun(estimate: Estimate, x: Tensor, levels: Sequence[Level], on_step: Callable[[Step], Any]) -> Tensor:
    """Heun's second-order method for the ODE of `euler` (the trapezoidal rule of Karras et al., arXiv 2206.00364,
    algorithm 1, in these coordinates); the last step, to sigma = 0, is Euler's. Two estimates a step."""
    for index, (level, to) in enumerate(zip(levels, [*levels[1:], CLEAN], strict=True)):
        x0 = estimate(x, level)
        eps = eps_from_x0(x0, x, level.alpha, level.sigma)
        d_alpha, d_sigma = to.alpha - level.alpha, to.sigma - level.sigma
        ahead = x + d_alpha * x0 + d_sigma * eps
        if to.sigma > 0:
            x0_ahead = estimate(ahead, to)
            eps_ahead = eps_from_x0(x0_ahead, ahead, to.alpha, to.sigma)
            ahead = x + 0.5 * d_alpha * (x0 + x0_ahead) + 0.5 * d_sigma * (eps + eps_ahead)
        on_step(Step(index, len(levels), level, x, x0, ahead))
        x = ahead
    return x


SOLVERS = ("ddim", "euler", "heun")


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int | Levels = 20,
    schedule: str | Schedule = "cosine",
    patch_sizes: Sequence[int] | None = None,
    labels: Any = None,
    solver: str = "ddim",
    callback: Callable[[Step], Any] | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    per_step: Mapping[str, Sequence[Any]] | None = None,
) -> Tensor:
    """Draw samples from noise with a machine or a network.

    Parameters
    ----------
    denoiser     a machine (`pyels.ELS`, ...) or any other `pyels.Denoiser`
    noise        (B, C, H, W) float32, standard normal. Sampling starts from noise * max(1, sigma) of the first level,
                 which is the noise itself unless the schedule has larger levels (edm)
    steps        n visits t = n/n, (n-1)/n .. 1/n and ends at the clean image; a list, an array or a tensor gives the
                 times themselves, in any order, each in (0, 1]
    schedule     a name (see `pyels.schedules.make_schedule`) or an object with alpha(t) and sigma(t)
    patch_sizes  one window size for each time, the cleanest first: patch_sizes[i-1] is used at t = i/n.
                 None: the machine's own patch_size throughout
    labels       (B,) integers, classes of the samples, or None
    solver       "ddim", "euler" (the same for eta = 0) or "heun" (second order, two estimates a step)
    callback     called with a `Step` after every step; an exception in it ends the sampling
    eta          DDIM only: 0 is deterministic, 1 is ancestral sampling
    generator    source of the noise that eta > 0 adds; give a seeded one for the same picture every time
    per_step     what else `denoise` is told at each time, as patch_sizes: {"threshold": [.02, .02, .05]}

    Returns
    -------
    (B, C, H, W) float32 samples; differentiable in the noise where the denoiser is in x

    Raises
    ------
    TypeError, ValueError  bad arguments, as `Machine.denoise` raises them, or a number of patch sizes that is not the
                           number of steps
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser must be a machine or another pyels.Denoiser, got {type(denoiser).__name__}")
    underived(denoiser.check_images)(noise)  # refuses torch.vmap in words
    labels = check_labels(labels, len(noise))
    levels = levels_of(denoiser, steps, schedule, patch_sizes, per_step)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    eta = check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0 and solver != "ddim":
        raise ValueError(f"eta is an option of solver 'ddim', but solver is {solver!r}")

    def estimate(x: Tensor, level: Level) -> Tensor:
        x0 = denoiser.denoise(x.clone(), level.alpha, level.sigma, labels=labels, **level.told)
        return x0.to(x.dtype)

    def on_step(step: Step) -> None:
        if callback is not None:
            callback(replace(step, to=step.to.clone()))  # nobody else's to change, as x is not

    x = noise * max(1.0, levels[0].sigma)
    if solver == "heun":
        return heun(estimate, x, levels, on_step)
    if solver == "euler":
        return euler(estimate, x, levels, on_step)
    return ddim(estimate, x, levels, on_step, eta, generator)


def levels_of(
    denoiser: Denoiser,
    steps: int | Levels,
    schedule: str | Schedule,
    patch_sizes: Sequence[int] | None = None,
    per_step: Mapping[str, Sequence[Any]] | None = None,
) -> list[Level]:
    """`noise_levels`, with what the denoiser is told there checked: all of it now, not each at its step."""
    return [
        replace(level, told={name: denoiser.check_wish(name, value) for name, value in level.told.items()})
        for level in noise_levels(steps, make_schedule(schedule), patch_sizes, per_step)
    ]


def noise_levels(
    steps: int | Levels,
    schedule: Schedule,
    patch_sizes: Sequence[int] | None = None,
    per_step: Mapping[str, Sequence[Any]] | None = None,
) -> list[Level]:
    """The noise levels of `sample`, noisiest first; arguments as there."""
    try:
        given = numbers_of(steps)
        if given.dim() > 1 or not given.numel() or (given.dim() == 0 and given.is_floating_point()):
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"steps must be a number of steps or a sequence of times, got {steps!r}") from None
    if given.dim() == 0:
        count = int(given)
        if count < 1:
            raise ValueError(f"steps must be at least 1, got {count}")
        times = [i / count for i in range(1, count + 1)]
    else:
        times = sorted(map(float, given.tolist()))
        if not all(0 < t <= 1 for t in times):
            raise ValueError(f"times must lie in (0, 1], got {given.tolist()}")
    told = {**(per_step or {}), **({} if patch_sizes is None else {"patch_size": patch_sizes})}
    for name, values in told.items():
        what = "patch_sizes" if name == "patch_size" else f"per_step[{name!r}]"
        if np.ndim(values) != 1:
            raise TypeError(f"{what} must be a sequence with one value for each step, got {values!r}")
        if len(values) != len(times):
            raise ValueError(f"{what} has {len(values)} entries for {len(times)} steps; give one for each")
    levels = []
    for i, t in enumerate(times):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        if not sigma > 0 or not alpha >= 0:
            raise ValueError(
                f"the schedule gives alpha {alpha}, sigma {sigma} at t = {t:g}; allowed: alpha >= 0, sigma > 0"
            )
        levels.append(Level(t, alpha, sigma, {name: values[i] for name, values in told.items()}))
    return levels[::-1]
