"""Noise schedules: t in [0, 1] -> (alpha, sigma) of x = alpha * x0 + sigma * noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Schedule(Protocol):
    """Anything with these two methods is a schedule; t = 0 is clean, t = 1 is the noisiest."""

    def alpha(self, t: float) -> float: ...

    def sigma(self, t: float) -> float: ...


@dataclass(frozen=True)
class Cosine:
    """alpha^2 = cos^2((t + offset) / (1 + 0.008) * pi/2), scaled to 1 at t = 0; sigma^2 = 1 - alpha^2.

    With offset 0.008 this is the schedule of Nichol & Dhariwal (arXiv 2102.09672, equation 17); offset 0 is the form of
    the ELS paper's released code.
    """

    offset: float = 0.0

    def alpha(self, t: float) -> float:
        return self._cosine(t) / self._cosine(0.0)

    def sigma(self, t: float) -> float:
        return math.sqrt((1 - self.alpha(t)) * (1 + self.alpha(t)))

    def _cosine(self, t: float) -> float:
        return max(0.0, math.cos((t + self.offset) / 1.008 * math.pi / 2))


@dataclass(frozen=True)
class Flow:
    """Flow matching (arXiv 2210.02747): alpha = 1 - t, sigma = t."""

    def alpha(self, t: float) -> float:
        return 1.0 - t

    def sigma(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Edm:
    """Karras et al. (arXiv 2206.00364, equation 5): alpha = 1, sigma from 0.002 to 80 evenly in sigma^(1/7)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return math.pow(low + t * (high - low), self.rho)


class Discrete:
    """The schedule of a discrete-time model: step j = 1 .. T of `alphas_cumprod` (T,) is t = j / T.

    Between steps log(alpha^2) is interpolated linearly; t = 0 is clean. At the last step alpha may be 0 (zero terminal
    SNR), on the way to which alpha^2 is. A diffusers scheduler serves as `Discrete(scheduler.alphas_cumprod)`.
    """

    def __init__(self, alphas_cumprod: Sequence[float] | np.ndarray[Any, Any]) -> None:
        values = np.asarray(alphas_cumprod, dtype=np.float64)
        falls = values.ndim == 1 and len(values) > 0 and bool((np.diff(values) <= 0).all())
        if not (falls and values[0] <= 1 and values[-1] >= 0 and values[:-1].all() and values[0] > 0):
            raise ValueError(
                "alphas_cumprod must be a sequence of falling numbers in (0, 1], of which the last may be 0"
            )
        self.steps = len(values)
        self._times = np.linspace(0, 1, self.steps + 1)
        self._alpha_bar = np.concatenate([[1.0], values])
        self._log_alpha_bar = np.log(self._alpha_bar, where=self._alpha_bar > 0, out=np.full(self.steps + 1, -np.inf))

    def alpha(self, t: float) -> float:
        return math.exp(0.5 * self._at(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(self._at(t)))

    def _at(self, t: float) -> float:
        """log(alpha^2)"""
        if self._alpha_bar[-1] == 0 and t > self._times[-2]:
            alpha_bar = float(np.interp(t, self._times, self._alpha_bar))
            return math.log(alpha_bar) if alpha_bar > 0 else -math.inf
        return float(np.interp(t, self._times, self._log_alpha_bar))


SCHEDULES = ("cosine", "cosine-offset", "linear", "edm", "flow")


def make_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the given object with `alpha(t)` and `sigma(t)`.

    "cosine"         the ELS paper's released code: alpha^2 = cos^2(t / 1.008 * pi/2)
    "cosine-offset"  Nichol & Dhariwal's, with the 0.008 offset
    "linear"         DDPM (arXiv 2006.11239): 1000 betas from 1e-4 to 0.02
    "edm"            Karras et al.: alpha = 1, sigma up to 80
    "flow"           flow matching: alpha = 1 - t, sigma = t
    """
    if not isinstance(schedule, str):
        if callable(getattr(schedule, "alpha", None)) and callable(getattr(schedule, "sigma", None)):
            return schedule
        raise TypeError(
            f"schedule must be a name or an object with alpha(t) and sigma(t), got {type(schedule).__name__}"
        )
    if schedule == "cosine":
        return Cosine()
    if schedule == "cosine-offset":
        return Cosine(offset=0.008)
    if schedule == "linear":
        return Discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    if schedule == "edm":
        return Edm()
    if schedule == "flow":
        return Flow()
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
