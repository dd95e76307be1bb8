"""The posterior over patches of every pixel, whole and in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntFlag
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels._core import INTERVAL
from pyels.checks import is_captured

# What the exact engines' means are off by at most: the bound that they are tested against.
ROUNDING = 1e-4


def alone(on_cpu: Callable[[Any], Any], on_gpu: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
    """A function of float64 values, elsewhere than on a GPU without torch's threads: they go on waiting for more while
    the engine's begin to work."""
    return on_gpu(of) if of.is_cuda else torch.from_numpy(on_cpu(of.numpy()))


class Want(IntFlag):
    """What is wanted of a posterior; bits as in csrc/pyels.h.

    MEAN       the posterior mean, and the log-evidence
    POSTERIOR  also the entropy and the heaviest source
    WEIGHTS    log-evidence alone, as exact as that of POSTERIOR, for a second pass
    SECOND     and the mean of these weights to the last digit
    """

    MEAN = 1
    POSTERIOR = 3
    WEIGHTS = 4
    SECOND = 5


@dataclass(frozen=True, repr=False)
class Posterior:
    """What a machine knows about every pixel: x0 ~ centre_i with probability w_i / sum w over the source set S(p).

    Attributes
    ----------
    mean           (B, C, H, W) posterior mean x0_hat
    log_evidence   (B, H, W)    log mean_i w_i, nats
    entropy        (B, H, W)    entropy of the weights, nats; 0 = one patch, log |S(p)| = all alike
    source         (B, H, W, 3) image, row and column of the heaviest patch's centre, int64; of equally heavy ones
                   (to the last bit) the first, in the order of images, then of displacements or places
    source_weight  (B, H, W)    its normalised weight
    error          (B, H, W)    how far the mean may be from the exact one, in every channel
    certified      (B, H, W)    bool; True: `error` is a bound (1e-4, rounding, where all patches were looked at).
                                False: `error` is half the width of a 95% interval around the mean, and the other fields
                                are estimates too; `source` is the heaviest patch among those that were looked at

    All float32, or float64 from engine "reference". Of a fold, `mean` is that over the windows that cover the pixel,
    and the other fields are those of the window around it. `source` counts images of the bank; of a mirror image it
    names the image that it is of, and the pixel of that one.
    """

    mean: Tensor
    log_evidence: Tensor
    entropy: Tensor
    source: Tensor
    source_weight: Tensor
    error: Tensor
    certified: Tensor
    __slots__ = ("__dict__", "__weakref__", "_variance")  # what computes the variance is no field

    @classmethod
    def of(cls, tensors: Sequence[Tensor], variance: Callable[[], Tensor]) -> Posterior:
        """With all fields, in this order, and what computes the variance."""
        posterior = cls(*tensors)
        object.__setattr__(posterior, "_variance", variance)
        return posterior

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))  # copies and pickles know no machine

    def __repr__(self) -> str:
        return f"Posterior({len(self.mean)} images of {'x'.join(map(str, self.mean.shape[1:]))})"

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        from pyels.notebook import png_of_posterior

        return png_of_posterior(self)

    @property
    def variance(self) -> Tensor:
        """(B, R, H, W) posterior variance of the response at each pixel: of the centre c, sum_i w_i (c_i - mean)^2 /
        sum_i w_i. Computed when it is asked for, by a second pass, from the query and the bank as they are then."""
        if (compute := getattr(self, "_variance", None)) is None:
            raise ValueError("this posterior was copied or read, and knows no machine that could compute its variance")
        variance: Tensor = compute()
        return variance

    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, in this order."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class PartialPosterior:
    """Posterior of every pixel over part of a bank: sums of w_i = exp(log w_i), relative to exp(m).

    Partial posteriors of disjoint parts of a bank merge to that of their union, in any grouping: they form a monoid
    whose neutral element has m = -inf, s = 0, y = 0. `e`, `top` and `source` are None unless `Want.POSTERIOR` was
    asked for; `ss`, `sy`, `yy` and `chance` are None unless s and y are estimates, made by engine "sampled".

    Attributes
    ----------
    m       (B, H, W)    float64  exponent the sums refer to, near the largest log w; -inf when empty
    s       (B, H, W)    float64  sum of exp(log w - m)
    y       (B, C, H, W) float64  sum of exp(log w - m) * centre; C = 0 where no mean was asked for
    count   (B, H, W)    float64  number of patches in S(p)
    e       (B, H, W)    float64  sum of exp(log w - m) * (log w - m)
    top     (B, H, W)    float64  largest log w
    source  (B, H, W)    int64    its patch, (image * H + row) * W + column; -1 when empty
    ss      (B, H, W)    float64  variance of s
    sy      (B, C, H, W) float64  covariance of s and y
    yy      (B, C, H, W) float64  variance of y
    chance  (B, H, W)    float64  number of patches of which chance decided whether to weigh them
    """

    m: Tensor
    s: Tensor
    y: Tensor
    count: Tensor
    e: Tensor | None = None
    top: Tensor | None = None
    source: Tensor | None = None
    ss: Tensor | None = None
    sy: Tensor | None = None
    yy: Tensor | None = None
    chance: Tensor | None = None

    @classmethod
    def stack(cls, parts: Sequence[PartialPosterior], places: Tensor) -> PartialPosterior:
        """The queries of several partial posteriors side by side, query i of them at places[i]; what is no estimate has
        no variance."""
        order = torch.argsort(places)
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if any(value is not None for value in values):
                none = [torch.zeros_like(part.y if field.name in ("sy", "yy") else part.m) for part in parts]
                values = [zeros if value is None else value for value, zeros in zip(values, none, strict=True)]
                joined[field.name] = torch.cat(values)[order]
        return cls(**joined)

    def as_estimate(self) -> PartialPosterior:
        """The same, said to be an estimate that chance had no part in."""
        s, y = torch.zeros_like(self.s), torch.zeros_like(self.y)
        return replace(self, ss=s, sy=y, yy=y, chance=s)

    def to(self, device: torch.device) -> PartialPosterior:
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def of(self, queries: slice) -> PartialPosterior:
        """That of some of the queries."""
        return self._each(lambda value: value[queries])

    def mirrored(self) -> PartialPosterior:
        """The same of the mirrored queries; sources are those of the images, which are as they were."""
        return self._each(lambda value: value.flip(-1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PartialPosterior:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PartialPosterior(**{name: change(value) for name, value in values.items() if value is not None})

    def renumbered(self, numbers: Tensor) -> PartialPosterior:
        """The same, of images that are counted by their place in `numbers`, (n,) int64."""
        if self.source is None:
            return self
        pixels = self.m.shape[1] * self.m.shape[2]
        image = numbers.to(self.source.device)[self.source.clamp(min=0) // pixels]
        return replace(self, source=torch.where(self.source < 0, self.source, image * pixels + self.source % pixels))

    def merge(self, other: PartialPosterior) -> PartialPosterior:
        """The partial posterior of both parts together. Of two equally heavy patches that in the lower image is the
        source, and within an image that of `self`."""
        if self.m.shape != other.m.shape or (self.e is None) != (other.e is None):
            raise ValueError("partial posteriors to merge must be of the same queries, and both full or both not")
        m = torch.maximum(self.m, other.m)

        def rescaled(part: PartialPosterior) -> tuple[Tensor, Tensor]:
            empty = part.s == 0
            shift = torch.where(empty, 0.0, part.m - m)  # -inf - -inf would be NaN
            return torch.where(empty, 0.0, alone(np.exp, torch.exp, shift)), shift

        (a, shift_a), (b, shift_b) = rescaled(self), rescaled(other)
        s = a * self.s + b * other.s
        y = a[:, None] * self.y + b[:, None] * other.y
        count = self.count + other.count
        sampled = {}
        for name, power in (("ss", 2), ("sy", 2), ("yy", 2), ("chance", 0)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None and theirs is None:
                continue
            of = [(a**power, mine), (b**power, theirs)]
            sampled[name] = sum(
                (scale[:, None] if value.dim() == 4 else scale) * value for scale, value in of if value is not None
            )
        if self.e is None or self.top is None or self.source is None:
            return PartialPosterior(m, s, y, count, **sampled)
        assert other.e is not None
        assert other.top is not None
        assert other.source is not None
        e = a * (self.e + shift_a * self.s) + b * (other.e + shift_b * other.s)
        pixels = self.m.shape[1] * self.m.shape[2]
        lower = (other.source >= 0) & (other.source // pixels < self.source // pixels)
        other_wins = (other.top > self.top) | ((other.top == self.top) & lower)
        return PartialPosterior(
            m,
            s,
            y,
            count,
            e,
            torch.where(other_wins, other.top, self.top),
            torch.where(other_wins, other.source, self.source),
            **sampled,
        )

    def mean(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Posterior mean (B, C, H, W). Raises ValueError when the part of the bank was empty."""
        if not is_captured(self.s) and (self.s == 0).any():
            raise ValueError("the partial posterior of an empty part of a bank has no mean; merge it with others first")
        return (self.y / self.s[:, None]).to(dtype)

    def error(self) -> tuple[Tensor, Tensor]:
        """How far the mean may be from the exact one, (B, H, W) float64, and whether that is a bound, (B, H, W) bool.

        Where s and y are estimates the mean is a ratio of two, whose variance is, to first order (the delta method),
        (yy - 2 mean sy + mean^2 ss) / s^2.
        """
        if self.ss is None or self.sy is None or self.yy is None or self.chance is None:
            return torch.full_like(self.s, ROUNDING), torch.ones_like(self.s, dtype=torch.bool)
        mean = self.mean(torch.float64)
        variance = (self.yy - 2 * mean * self.sy + mean**2 * self.ss[:, None]).clamp(min=0).amax(dim=1)
        estimated = INTERVAL * variance.sqrt() / self.s
        certified = self.chance == 0
        return torch.where(certified, 0.0, estimated) + ROUNDING, certified

    def finish(self, dtype: torch.dtype = torch.float32) -> Posterior:
        """All fields of the posterior. Needs a full partial posterior."""
        if self.e is None or self.top is None or self.source is None:
            raise ValueError("this partial posterior holds only the mean; ask the machine for Want.POSTERIOR")
        mean = self.mean(dtype)
        log_s = self.s.log()
        height, width = self.m.shape[1:]
        source = torch.stack(
            [self.source // (height * width), self.source // width % height, self.source % width], dim=-1
        )
        error, certified = self.error()
        return Posterior(
            mean=mean,
            log_evidence=(self.m + log_s - self.count.log()).to(dtype),
            entropy=(log_s - self.e / self.s).clamp(min=0).to(dtype),
            source=source,
            source_weight=(self.top - self.m - log_s).exp().clamp(max=1).to(dtype),
            error=error.to(dtype),
            certified=certified,
        )
