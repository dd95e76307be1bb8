"""The second pass: what normalised weights are good for beyond the mean.

Once the sums over the whole bank are known, W_i(p) = w_i(p) / sum_j w_j(p) is a number for every pixel p and every
source i, and another pass over the same pairs answers what is asked of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyels.checks import CPU


@dataclass(frozen=True, eq=False)
class Asked:
    """What a second pass is asked.

    Attributes
    ----------
    log_sum    (B, H, W) float64 log of the sum of all weights; infinite where a pixel has no window
    mean       (B, R, H, W) float64 posterior mean of the response at the pixel, for variance and cotangent; else None
    fold       the answers of all windows for all their pixels, weighted as the definition's fold says
    variance   the variance of the response at the pixel
    cotangent  (B, R, H, W) float64 g: the derivative of sum g * mean with respect to x; None: not asked for
    influence  how much weight every image has
    top        so many heaviest sources of every pixel of `pixels`
    pixels     (P,) int64 row * W + column
    """

    log_sum: Tensor
    mean: Tensor | None = None
    fold: bool = False
    variance: bool = False
    cotangent: Tensor | None = None
    influence: bool = False
    top: int = 0
    pixels: Tensor | None = None

    def mirrored(self) -> Asked:
        """The same of the mirrored queries."""
        width, told = self.log_sum.shape[-1], dict(vars(self))
        for name in ("log_sum", "mean", "cotangent"):
            told[name] = None if told[name] is None else told[name].flip(-1)
        if self.pixels is not None:
            told["pixels"] = self.pixels + width - 1 - 2 * (self.pixels % width)
        return Asked(**told)

    def of(self, queries: Sequence[int]) -> Asked:
        """The same of some of the queries."""
        which = torch.tensor(queries, dtype=torch.int64, device=CPU)
        told = dict(vars(self))
        for name in ("log_sum", "mean", "cotangent"):
            told[name] = None if told[name] is None else told[name][which]
        return Asked(**told)


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers over part of a bank; None: not asked for. Those over disjoint parts merge to that over their union.

    Attributes
    ----------
    folded      (B, R, H, W) float64  sum of the answers of all windows, each with its weight in the fold
    variance    (B, R, H, W) float64
    derivative  (B, C, H, W) float64
    influence   (B, N)       float64  sum over all pixels of the image's normalised weights
    weight      (B, P, top)  float64  normalised, descending; 0 where there are fewer sources
    source      (B, P, top)  int64    (image * H + row) * W + column; -1 there
    """

    folded: Tensor | None = None
    variance: Tensor | None = None
    derivative: Tensor | None = None
    influence: Tensor | None = None
    weight: Tensor | None = None
    source: Tensor | None = None

    @classmethod
    def stack(cls, parts: Sequence[Answers], places: Tensor) -> Answers:
        """The queries of several answers side by side, query i of them at places[i]."""
        order, joined = torch.argsort(places), {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if values[0] is None else torch.cat(values)[order]
        return cls(**joined)

    def mirrored(self) -> Answers:
        """The same of the mirrored queries; sources are those of the images, which are as they were."""
        changed: dict[str, Any] = dict(vars(self))
        for name in ("folded", "variance", "derivative"):
            changed[name] = None if changed[name] is None else changed[name].flip(-1)
        return Answers(**changed)

    def renumbered(self, numbers: Tensor, count: int, pixels: int) -> Answers:
        """The same, of images that are counted by their place in `numbers`, (n,) int64, of a bank of `count` images of
        so many pixels."""
        changed: dict[str, Any] = dict(vars(self))
        if self.influence is not None:
            whole = self.influence.new_zeros(len(self.influence), count)
            changed["influence"] = whole.index_copy_(1, numbers.to(whole.device), self.influence)
        if self.source is not None:
            image = numbers.to(self.source.device)[self.source.clamp(min=0) // pixels]
            changed["source"] = torch.where(self.source < 0, self.source, image * pixels + self.source % pixels)
        return Answers(**changed)

    def merge(self, other: Answers) -> Answers:
        """The answers over both parts together. Of equally heavy sources the lower comes first."""
        merged: dict[str, Tensor | None] = {}
        for name in ("folded", "variance", "derivative", "influence"):
            mine, theirs = getattr(self, name), getattr(other, name)
            merged[name] = None if mine is None else mine + theirs
        if self.weight is not None and self.source is not None:
            assert other.weight is not None
            assert other.source is not None
            top = self.weight.shape[-1]
            weight, source = torch.cat([self.weight, other.weight], -1), torch.cat([self.source, other.source], -1)
            order = torch.where(source < 0, torch.iinfo(torch.int64).max, source).argsort(-1)
            weight, source = weight.gather(-1, order), source.gather(-1, order)
            order = weight.argsort(dim=-1, descending=True, stable=True)[..., :top]
            merged["weight"], merged["source"] = weight.gather(-1, order), source.gather(-1, order)
        return Answers(**merged)


_Either = TypeVar("_Either", Asked, Answers)


def moved(one: _Either, device: torch.device) -> _Either:
    """The same on another device."""
    there: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(one).items()
    }
    return type(one)(**there)
