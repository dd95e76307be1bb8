"""A machine over the few images that are like the query, chosen anew for every query."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyels.bank.selection import as_numbers
from pyels.checks import CPU, check_count
from pyels.denoiser import Composite, Pullback, Query
from pyels.machines.machine import Machine

SHARES = 20, 10  # least and most are N/20 and N/10, as its authors have them
MOST_AVERAGES = 16  # along a side
ROUNDING = 2**-22  # for every value, more than two sums of products in float32 are off together


class Golden(Composite):
    """The machine on the golden subset of each query (arXiv 2602.16498): the k nearest of the `most` images that are
    nearest to it by averages over squares, distances being |x - alpha phi|^2, and

        k = max(least, round(most - (most - least) (1 - sigma)))      where alpha^2 + sigma^2 = 1,

    sigma / sqrt(alpha^2 + sigma^2) standing for sigma elsewhere. All images are looked at, not a random part of them;
    of equally near ones the first count. Whatever else the machine draws from its bank, as `PCALocality` its windows,
    is that of the whole bank. Differentiable in x where the machine is, for the subset as it is.

    Parameters
    ----------
    machine   over the whole bank; of a query's class, or its selection, the subset is chosen from that
    least     how many images count at least, at no noise; None: a 20th of those the subset is chosen from
    most      how many at most, at nothing but noise; None: a 10th
    averages  so many along each side of an image, whose sides they divide; None: the largest divisor of each side up
              to 16. Those of the bank are computed once

    Raises
    ------
    TypeError, ValueError  no machine; numbers that are not positive, or least above most; sides that cannot be divided
    """

    denoiser: Machine

    def __init__(
        self, machine: Machine, least: int | None = None, most: int | None = None, averages: int | None = None
    ) -> None:
        if not isinstance(machine, Machine):
            raise TypeError(f"machine must be a pyels.Machine, got {type(machine).__name__}")
        super().__init__(machine)
        self.bank = machine.bank
        self.least = None if least is None else check_count("least", least)
        self.most = None if most is None else check_count("most", most)
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least must be at most most, got {least} and {most}")
        sides = self.bank.shape[1:]
        if averages is not None and any(side % check_count("averages", averages) for side in sides):
            raise ValueError(f"averages must divide the sides of {sides[0]}x{sides[1]} images, got {averages}")
        self.averages = tuple(averages or _largest_divisor(side) for side in sides)
        self._of_bank: tuple[Tensor, Tensor] | None = None  # averages (N, n), and their squares' sums (N,), float32

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_of_bank": None}

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        chosen = self.subsets(query)
        selection = self.bank.select(images=chosen) if chosen else None
        return self.denoiser.estimate_and_pullback(replace(query, labels=None, selection=selection))

    def subsets(self, query: Query) -> list[Tensor]:
        """The images that count for each query, nearest first."""
        if self._of_bank is None:
            parts = torch.split(torch.arange(len(self.bank), device=CPU), 1024)
            averages = torch.cat([self._averages(self.bank.read(part).double()).float() for part in parts])
            self._of_bank = averages, averages.square().sum(1)
        selection = self.bank.selection_of(query.labels, query.selection, len(query))
        chosen: list[Tensor] = [torch.empty(0)] * len(query)
        for _, images, queries in selection.sets():
            numbers = as_numbers(images)
            for b in queries:
                chosen[b] = self._subset(query, b, numbers)
        return chosen

    def _subset(self, query: Query, b: int, numbers: Tensor) -> Tensor:
        assert self._of_bank is not None
        x, alpha, sigma = query.x[b : b + 1].cpu().double(), float(query.alpha[b]), float(query.sigma[b])
        least, most = (
            min(len(numbers), given or max(1, len(numbers) // share))
            for given, share in zip((self.least, self.most), SHARES, strict=True)
        )
        k = max(least, round(most - (most - least) * (1 - sigma / math.hypot(alpha, sigma))))
        averages, squares = (one if len(one) == len(numbers) else one[numbers] for one in self._of_bank)
        coarse = self._averages(x).flatten()
        some = _maybe_nearest(averages, squares, coarse, alpha, most)
        near = numbers[some[_nearest(averages[some], coarse, alpha, most)].sort().values]
        return near[_nearest(self.bank.read(near).flatten(1), x.flatten(), alpha, k)]

    def _averages(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        rows, columns = self.averages
        squares = images.reshape(n, channels, rows, height // rows, columns, width // columns)
        return squares.mean((3, 5)).flatten(1)


def _maybe_nearest(images: Tensor, squares: Tensor, x: Tensor, alpha: float, count: int) -> Tensor:
    """Which of images (n, d), with sums of squares (n,), may be among the nearest to x (d,), by float32 products."""
    distances = torch.add(alpha**2 * squares, torch.mv(images, x.float()), alpha=-2 * alpha)  # but for |x|^2
    longest = alpha * math.sqrt(float(squares.max()))
    slack = ROUNDING * len(x) * longest * (longest + 2 * float(x.norm()))
    return (distances <= distances.kthvalue(count).values + slack).nonzero()[:, 0]


def _nearest(images: Tensor, x: Tensor, alpha: float, count: int) -> Tensor:
    """Which of images (n, d) are the nearest to x (d,), nearest first, in float64."""
    distances = torch.sub(x, images.double(), alpha=alpha).square_().sum(1)
    return distances.sort(stable=True).indices[:count]


def _largest_divisor(side: int) -> int:
    return max(n for n in range(1, min(side, MOST_AVERAGES) + 1) if side % n == 0)
