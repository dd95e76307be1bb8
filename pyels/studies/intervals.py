"""95% intervals of figures that were measured on some samples, of which there might have been others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyels.checks import CPU

_RESAMPLINGS = 10_000
_RESAMPLED_AT_ONCE = 100


def resampled(values: Tensor, statistic: Callable[[Tensor], Tensor], size: int | None = None) -> Tensor:
    """A statistic of resamplings of `values` (n, ..) with replacement, the same for the same values.

    Parameters
    ----------
    statistic  of some resamplings (R, size, ..), along the second dimension: (R, ..) float64
    size       of each of them; None: n

    Returns
    -------
    (10000, ..) float64
    """
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_RESAMPLINGS // _RESAMPLED_AT_ONCE):
        chosen = torch.randint(len(values), (_RESAMPLED_AT_ONCE, size or len(values)), generator=generator)
        drawn.append(statistic(values[chosen]))
    return torch.cat(drawn)


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Percentile bootstrap: the ends, (2, ..), of the central 95% of what `resampled` gives.

    Of one value it is that value: a single sample says nothing of its spread.
    """
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device=CPU)
    return resampled(values, statistic).quantile(ends, dim=0)


def median(values: Tensor) -> Tensor:
    """Of resamplings (R, n), as `resampled` asks for it: (R,)."""
    return values.quantile(0.5, dim=1)


def median_interval(values: Tensor) -> list[float]:
    """Of the median of `values` (n,), by `bootstrap`."""
    ends: list[float] = bootstrap(values, median).tolist()
    return ends


def share_interval(successes: int, trials: int) -> list[float]:
    """Wilson's 95% interval of a share (J. Am. Stat. Assoc. 22, 209, 1927), which does not vanish at 0% and 100%."""
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return [max(0.0, (centre - half) / (1 + z * z / trials)), min(1.0, (centre + half) / (1 + z * z / trials))]
