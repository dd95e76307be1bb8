"""95% intervals of figures that were measured on some samples, of which there might have been others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyels.checks import CPU

_RESAMPLINGS = 10_000
_RESAMPLED_AT_ONCE = 100


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Percentile bootstrap: the central 95% of a statistic of resamplings of `values` (n, ..) with replacement.

    The same values give the same interval. Of one value it is that value: a single sample says nothing of its spread.

    Parameters
    ----------
    statistic  of some resamplings (R, n, ..), along the second dimension: (R, ..) float64

    Returns
    -------
    (2, ..) its ends
    """
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_RESAMPLINGS // _RESAMPLED_AT_ONCE):
        chosen = torch.randint(len(values), (_RESAMPLED_AT_ONCE, len(values)), generator=generator)
        drawn.append(statistic(values[chosen]))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device=CPU)
    return torch.cat(drawn).quantile(ends, dim=0)


def median_interval(values: Tensor) -> list[float]:
    """Of the median of `values` (n,), by `bootstrap`."""
    ends: list[float] = bootstrap(values, lambda some: some.quantile(0.5, dim=1)).tolist()
    return ends


def share_interval(successes: int, trials: int) -> list[float]:
    """Wilson's 95% interval of a share (J. Am. Stat. Assoc. 22, 209, 1927), which does not vanish at 0% and 100%."""
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return [max(0.0, (centre - half) / (1 + z * z / trials)), min(1.0, (centre + half) / (1 + z * z / trials))]
