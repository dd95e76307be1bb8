"""Scales without a network: what a machine's own posterior says of its windows, or its error on images of its bank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.bank.selection import as_numbers
from pyels.checks import CPU
from pyels.definition import Masks
from pyels.machines import Machine, PCALocality
from pyels.sampling import Level, Step, ddim, noise_levels
from pyels.schedules import Schedule, make_schedule
from pyels.studies.resumable import noise_of_seed

RULES = ("entropy", "validation", "sure")
SHARE = 0.8  # of the largest entropy that there can be; .7 to .9 in arXiv 2607.08041
OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Scores:
    """What a rule says of every value that is tried, at every step.

    Attributes
    ----------
    rule       "entropy": the posterior's entropy as a share of the logarithm of the number of sources, each a mean over
               the pixels, along the machine's own trajectory; the value with the largest share up to `share` counts, or
               the one with the least of all (arXiv 2607.08041)
               "validation": the squared error on images of the bank, each left out of its own posterior
               "sure": Stein's unbiased estimate of that error, which does not look at the clean image:
               |x0_hat - x / alpha|^2 - D sigma^2 / alpha^2 + 2 sum_p L_p(p) Var(p), over D values, as
               d x0_hat(p) / d x(p) = alpha / sigma^2 L_p(p) Var(p); L_p(p) = 1 in squares. Of these two the least
               counts
    times      (steps,) ascending
    sizes      (K,) the values tried
    scores     (B, steps, K) float64
    parameter  the machine's
    share      of rule "entropy"
    """

    rule: str
    times: list[float]
    sizes: list[Any]
    scores: Tensor
    parameter: str
    share: float = SHARE

    @property
    def score(self) -> Tensor:
        """Mean over the samples, (steps, K)."""
        return self.scores.mean(dim=0)

    @property
    def best(self) -> list[Any]:
        """The value that counts at each step, for `pyels.sample`."""
        return [self.sizes[i] for i in chosen(self.rule, self.score, self.share).tolist()]

    @property
    def series(self) -> dict[str, list[Any]]:
        """As of `Calibration`, and the next."""
        return {f"rule {self.rule}": self.best}

    @property
    def lost(self) -> tuple[str, Tensor]:
        if self.rule == "entropy":
            return f"share of the largest entropy, from {self.share:g}", (self.score - self.share).abs()
        return "mean squared error above the least", self.score - self.score.amin(dim=1, keepdim=True)

    def record(self) -> dict[str, Any]:
        """What `scales.json` holds, as that of a calibration by a network."""
        return {
            "times": [round(t, 9) for t in self.times],
            "rule": self.rule,
            "parameter": self.parameter,
            "patch_sizes" if self.parameter == "patch_size" else "values": self.best,
            "sizes": self.sizes,
            "score": self.score.tolist(),
        }


def chosen(rule: str, score: Tensor, share: float = SHARE) -> Tensor:
    """Which of the K values counts, from scores (.., K)."""
    if rule != "entropy":
        return score.argmin(dim=-1)
    fallen = score <= share
    return torch.where(fallen.any(-1), torch.where(fallen, score, -math.inf).argmax(-1), score.argmin(-1))


def scores(
    rule: str,
    machine: Machine,
    seed: int,
    label: Tensor | None,
    sizes: Sequence[Any],
    steps: int,
    schedule: str | Schedule,
    on_step: OnStep,
    share: float = SHARE,
) -> Tensor:
    """Of one sample, (steps, K) float64, the cleanest first; see `Scores`.

    Parameters
    ----------
    seed     of the noise, and of the image where there is one
    label    (1,) its class; None: all images are sources, and images of all classes are taken
    sizes    values of `machine.parameter`
    on_step  called after every step
    """
    if isinstance(machine, PCALocality):
        machine = machine.stacked  # every value has a posterior
    levels = noise_levels(steps, make_schedule(schedule))
    noise = noise_of_seed(seed, machine.bank.shape)[None]
    if rule == "entropy":
        rows = _along(machine, noise, label, sizes, levels, on_step, share)
    else:
        rows = _of_image(rule, machine, noise, seed, label, sizes, levels, on_step)
    return torch.tensor(rows[::-1], dtype=torch.float64, device=CPU)


def _along(
    machine: Machine,
    noise: Tensor,
    label: Tensor | None,
    sizes: Sequence[Any],
    levels: Sequence[Level],
    on_step: OnStep,
    share: float,
) -> list[list[float]]:
    parameter, rows = str(machine.parameter), []

    def estimate(x: Tensor, level: Level) -> Tensor:
        means, row = [], []
        for size in sizes:
            said = {parameter: size}
            post = machine.posterior(x, level.alpha, level.sigma, label, **said)
            has = machine.definition_of(**said).windows(*x.shape[2:])
            most = machine.counts(label, 1, **said)[0][has].log().mean()
            means.append(post.mean)
            row.append(float(post.entropy[0][has].double().mean() / most) if most > 0 else 0.0)
        rows.append(row)
        return means[int(chosen("entropy", torch.tensor(row), share))]

    ddim(estimate, noise * max(1.0, levels[0].sigma), levels, on_step)
    return rows


def _of_image(
    rule: str,
    machine: Machine,
    noise: Tensor,
    seed: int,
    label: Tensor | None,
    sizes: Sequence[Any],
    levels: Sequence[Level],
    on_step: OnStep,
) -> list[list[float]]:
    bank, parameter, rows = machine.bank, str(machine.parameter), []
    numbers = as_numbers(bank.select(label).expand(1).images())
    image = numbers[torch.randint(len(numbers), (1,), generator=torch.Generator().manual_seed(seed))]
    x0, others = bank.read(image), bank.select(label, without=image)
    for index, level in enumerate(levels):
        x, row = level.alpha * x0 + level.sigma * noise, []
        for size in sizes:
            said = {parameter: size, "selection": others}
            if rule == "validation":
                found = machine.denoise(x, level.alpha, level.sigma, **said)
                row.append(float(metrics.mse(x0, found)))
            elif level.alpha == 0:  # noise alone tells nothing
                found = x
                row.append(0.0)
            else:
                post = machine.posterior(x, level.alpha, level.sigma, **said)
                found = post.mean
                own = _own_weights(machine, level, size) * post.variance.double()
                error = (found.double() - x.double() / level.alpha).square() + 2 * own
                row.append(float(error.mean()) - (level.sigma / level.alpha) ** 2)
        rows.append(row)
        on_step(Step(index, len(levels), level, x, found, found))
    return rows


def _own_weights(machine: Machine, level: Level, size: Any) -> Tensor | float:
    """L_p(p) of every value, (C, H, W)."""
    window = machine.definition_of(**{str(machine.parameter): size}).window
    if not isinstance(window, Masks):
        return 1.0
    weights = window.at(level.alpha, level.sigma, machine.bank.shape).flatten(2)
    return weights.diagonal(dim1=0, dim2=2).reshape(machine.bank.shape).double() / window.temperature
