"""The formula as data: which window a pixel compares, with which patches, and what answers.

For every output pixel p and every pixel q that its window answers for (Kamb & Ganguli, ICML 2025, arXiv 2412.20292, and
those who changed one part each since):

    log w_i(p) = - sum_z L_p(z) (x(z) - alpha phi_i(z))^2 / (2 sigma^2)              L: window
    mu_p(q)    = sum_{i in S(p)} w_i(p) psi_i(q) / sum_{i in S(p)} w_i(p)            S: sources, psi: responses
    x0_hat(q)  = sum_p r_p(q) mu_p(q) / sum_p r_p(q)                                 r: fold

A machine is a definition over a bank; engines evaluate it, or say why they cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyels.bank.bank import PatchBank
from pyels.checks import CPU, check_number, check_patch_size, check_width


class Sources(Enum):
    """Where in each image the patches of S(p) lie; a set of places along each axis, of which all pairs are meant.

    SAME_POSITION  at p; windows are clipped at the border
    CIRCULAR       everywhere; windows wrap around
    INTERIOR       where the window lies wholly inside; the query's window wraps around (the released code)
    ZEROS          where the window overhangs the border by the same four amounts as p's; windows are clipped (B.2)
    """

    SAME_POSITION = "same_position"
    CIRCULAR = "circular"
    INTERIOR = "interior"
    ZEROS = "zeros"

    def along(self, n: int, k: int, device: torch.device = CPU) -> Tensor:
        """The number of places along an axis of length n that each of its pixels draws on, (n,) float64."""
        places = torch.ones(n, dtype=torch.float64, device=device)
        if self is Sources.CIRCULAR:
            places[:] = n
        elif self is Sources.INTERIOR:
            places[:] = n - k + 1
        elif self is Sources.ZEROS and n >= k:
            places[k // 2 : n - k // 2] = n - k + 1
        return places


def said(of: Any) -> str:
    """The fields of a dataclass that are not as they are by default."""
    own = [(one, getattr(of, one.name)) for one in fields(of) if one.repr]
    told = [f"{one.name}={getattr(value, 'value', value)!r}" for one, value in own if value != one.default]
    return f"{type(of).__name__}({', '.join(told)})"


@dataclass(frozen=True)
class WholeImage:
    """The whole image is compared: one weight for an image, shared by all pixels."""

    parameter = None


@dataclass(frozen=True)
class Square:
    """A k x k square around the pixel, all of it alike.

    Parameters
    ----------
    k       odd; None: every call says how large it is
    inside  only pixels whose window lies wholly inside the image have one; what the others answer, a fold must say
    """

    k: int | None = None
    inside: bool = False
    parameter = "patch_size"
    __repr__ = said

    def taps(self, k: int) -> Tensor:
        """The weights of the window's places along each axis, (k,) float64: that of a place is the product of two."""
        return torch.ones(k, dtype=torch.float64, device=CPU)


@dataclass(frozen=True)
class Gaussian:
    """A k x k square around the pixel, in which the place at offset o weighs exp(-|o|^2 / (2 width^2)).

    Parameters
    ----------
    width  standard deviation in pixels
    k      odd, where the window ends; None: the smallest that reaches three widths, beyond which places weigh less than
           a hundredth
    """

    width: float
    k: int | None = None
    inside = False
    parameter = "width"

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", check_width(self.width))
        if self.k is None:
            object.__setattr__(self, "k", 2 * math.ceil(3 * self.width) + 1)

    def of(self, width: float) -> Gaussian:
        own = self.k != Gaussian(self.width).k  # a size that was given stays
        return Gaussian(width, self.k if own else None)

    def taps(self, k: int) -> Tensor:
        """As of `Square`."""
        offsets = torch.arange(k, dtype=torch.float64, device=CPU) - k // 2
        return (-(offsets**2) / (2 * self.width**2)).exp()


@dataclass(frozen=True, eq=False)
class Masks:
    """A mask of one's own for every output pixel p:

        log w_i(p) = - sum_z weights[p, z] (x(z) - alpha phi_i(z))^2 / (2 sigma^2)

    Parameters
    ----------
    weights      (H*W, H, W) or (H*W, C, H, W), not negative, for output pixel p = row * W + column; or a
                 function of (alpha, sigma) that returns such. Sets, of weights 0 and 1, are smaller and quicker as bool
    parameter    "threshold" or "mass": such a field of the query is a third argument of the function
    setting      of it, where a query says none
    temperature  > 0, a factor of sigma^2
    """

    weights: Tensor | Callable[..., Tensor] = field(repr=False)
    parameter: str | None = None
    setting: float | None = None
    temperature: float = 1.0
    __repr__ = said

    def __post_init__(self) -> None:
        if self.parameter not in (None, "threshold", "mass"):
            raise ValueError(f"parameter of Masks must be 'threshold' or 'mass', or None, got {self.parameter!r}")
        if self.parameter is not None and not callable(self.weights):
            raise ValueError(f"Masks with a {self.parameter} need a function of (alpha, sigma, {self.parameter})")
        if not 0 < check_number("temperature", self.temperature) < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def of(self, value: float) -> Masks:
        return replace(self, setting=value)

    def at(self, alpha: float, sigma: float, shape: Sequence[int]) -> Tensor:
        """The weights at one noise level, (H*W, C, H, W) float64 or bool, for images (C, H, W)."""
        further = () if self.parameter is None else (self.setting,)
        weights = self.weights(alpha, sigma, *further) if callable(self.weights) else self.weights
        given = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, device=CPU)
        is_set = given.dtype == torch.bool
        weights = given.detach().to("cpu", torch.bool if is_set else torch.float64)
        channels, height, width = shape
        pixels = height * width
        if weights.shape == (pixels, height, width):
            weights = weights[:, None].expand(pixels, channels, height, width)
        if weights.shape != (pixels, channels, height, width):
            allowed = f"{(pixels, height, width)} or {(pixels, channels, height, width)}"
            raise ValueError(
                f"weights of Masks must have shape {allowed} for images {tuple(shape)}, got {tuple(given.shape)}"
            )
        if is_set:
            return weights.contiguous()
        seen = None if given.is_inference() else _FOUND_GOOD.get(given)  # type: ignore[no-untyped-call]
        if seen is None or seen != given._version:
            low, high = weights.aminmax()  # NaN where there is one
            if not (low >= 0 and high < math.inf):
                raise ValueError("weights of Masks must be finite and not negative")
            if not given.is_inference():
                _FOUND_GOOD[given] = given._version
        return weights.contiguous()


_FOUND_GOOD = WeakTensorKeyDictionary()  # weights that need not be looked at again, and their versions


@dataclass(frozen=True)
class Fold:
    """A window answers for all its pixels, and a pixel is a weighted mean over the windows that cover it.

    Parameters
    ----------
    rho   the place (u, v) of a window, both in linspace(-1, 1, k), weighs exp(-(u^2 + v^2) / (2 rho^2))
    taps  or k numbers, not negative, one for each place along an axis: a place weighs the product of two
    """

    rho: float | None = None
    taps: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.taps is None):
            raise TypeError("Fold needs rho, the width of a Gaussian, or taps, the weights along an axis")
        if self.rho is not None:
            rho = check_number("rho", self.rho)
            if not 0 < rho < float("inf"):
                raise ValueError(f"rho of a Fold must be positive and finite, got {self.rho}")
        else:
            taps = tuple(float(check_number("taps", tap)) for tap in self.taps or ())
            if not taps or not all(0 <= tap < float("inf") for tap in taps) or not any(taps):
                raise ValueError(f"taps of a Fold must be finite, not negative and not all zero, got {self.taps}")
            object.__setattr__(self, "taps", taps)

    def of_size(self, k: int) -> Tensor:
        """Its weights along an axis of a k x k window, (k,) float64."""
        if self.taps is not None:
            if len(self.taps) != k:
                raise ValueError(f"the fold has {len(self.taps)} taps, but windows are {k} x {k}; give {k}")
            return torch.tensor(self.taps, dtype=torch.float64, device=CPU)
        assert self.rho is not None
        u = torch.linspace(-1, 1, k, dtype=torch.float64, device=CPU) if k > 1 else torch.zeros(1, dtype=torch.float64)
        return (-(u**2) / (2 * self.rho**2)).exp()


UNIFORM = "uniform"


Sized = Square | Gaussian  # windows that have a size
Window = WholeImage | Square | Gaussian | Masks
_ALLOWED = {WholeImage: (Sources.SAME_POSITION, Sources.CIRCULAR), Masks: (Sources.SAME_POSITION,)}


@dataclass(frozen=True)
class Definition:
    """What a machine computes. Its bank, and the engine that evaluates it, are the machine's.

    Parameters
    ----------
    window     `Square(k)`, `Gaussian(width)`, `WholeImage()` or `Masks(weights)`: what is compared
    sources    "zeros", "circular", "interior" or "same_position": which patches of every image with it (see `Sources`)
    fold       None: the centre of the window answers; "uniform": a pixel is the plain mean over the windows that cover
               it (of masks: whose weights there are not zero); `Fold(rho)`: a weighted one
    mirror     whether the left-right mirror images are sources too
    responses  a bank of as many images (N, R, H, W), each of which answers in place of the one that is compared;
               None: these answer themselves

    An engine that cannot evaluate a definition says why when the machine is made.

    Raises
    ------
    TypeError, ValueError  not a window, or unknown sources; sources or a fold that a window does not go with
    """

    window: Window = Square()
    sources: Sources | str = Sources.ZEROS
    fold: str | Fold | None = None
    mirror: bool = False
    responses: PatchBank | None = None
    __repr__ = said

    def __post_init__(self) -> None:
        if not isinstance(self.window, Window):
            raise TypeError(
                f"window must be Square(k), Gaussian(width), WholeImage() or Masks(weights), got {self.window!r}"
            )
        allowed = [source.value for source in _ALLOWED.get(type(self.window), Sources)]
        if self.sources not in (*allowed, *map(Sources, allowed)):
            raise ValueError(
                f"sources must be one of {', '.join(map(repr, allowed))} with {type(self.window).__name__}, "
                f"got {self.sources!r}"
            )
        object.__setattr__(self, "sources", Sources(self.sources))
        if not isinstance(self.fold, Fold) and self.fold not in (None, UNIFORM):
            raise ValueError(f"fold must be None, {UNIFORM!r} or Fold(rho), got {self.fold!r}")
        if isinstance(self.window, WholeImage) and self.fold is not None:
            raise ValueError("a whole image answers for all its pixels already: leave out fold")
        if isinstance(self.window, Masks) and isinstance(self.fold, Fold):
            raise ValueError(f"masks have no places along an axis for {self.fold}: use fold={UNIFORM!r}")
        if self.mirror and isinstance(self.fold, Fold) and self.fold.taps and self.fold.taps != self.fold.taps[::-1]:
            raise ValueError(f"taps of a fold over mirror images must be the same from both ends, got {self.fold.taps}")
        if isinstance(self.window, Square) and self.window.inside and self.fold is None:
            raise ValueError(f"inside=True leaves border pixels without a window: give fold={UNIFORM!r}, or a Fold")

    @property
    def wraps(self) -> bool:
        """Whether the query's windows wrap around."""
        return Sources(self.sources) in (Sources.CIRCULAR, Sources.INTERIOR)

    @property
    def bank_wraps(self) -> bool:
        """Whether the windows of the bank's images wrap around."""
        return self.sources is Sources.CIRCULAR

    @property
    def patch_size(self) -> int | None:
        """k of a window that has a size; None where it has none, or none yet."""
        return self.window.k if isinstance(self.window, Sized) else None

    @property
    def size(self) -> int:
        """k; 1, which has no meaning, where windows have none. Raises ValueError where it is not said yet."""
        if isinstance(self.window, Sized) and self.window.k is None:
            check_patch_size(None)
        return self.patch_size or 1

    def mirrored(self) -> Definition:
        """What compares a mirrored query as this one compares the query: with masks of one level mirrored too."""
        if not isinstance(self.window, Masks):
            return self
        assert isinstance(self.window.weights, Tensor)
        weights = self.window.weights
        pixels = weights.reshape(*weights.shape[-2:], *weights.shape[1:]).flip(1, -1)
        return replace(self, window=Masks(pixels.flatten(0, 1)))

    def of_size(self, k: int | None, height: int, width: int) -> Definition:
        """The same with windows of size k; None: as it is. Raises ValueError for a size that it cannot have, or where
        it has none yet."""
        if not isinstance(self.window, Sized):
            if k is not None:
                raise ValueError(f"patch_size {k} was given, but {type(self.window).__name__} has none; leave it out")
            return self
        size = check_patch_size(self.window.k if k is None else k, height, width, self.wraps)
        if self.window.inside and size > min(height, width):
            raise ValueError(f"no window of {size} x {size} pixels lies inside images of {height} x {width}")
        return replace(self, window=replace(self.window, k=size))

    @property
    def taps(self) -> Tensor | None:
        """The weights of a window's places along each axis, (k,) float64; None: all alike."""
        return self.window.taps(self.size) if isinstance(self.window, Gaussian) else None

    @property
    def fold_taps(self) -> Tensor | None:
        """What a window's answers weigh, likewise; None without a fold, and for masks."""
        if self.fold is None or not isinstance(self.window, Sized):
            return None
        return Square().taps(self.size) if not isinstance(self.fold, Fold) else self.fold.of_size(self.size)

    def windows(self, height: int, width: int) -> Tensor:
        """Which pixels have a window, (H, W) bool: all, or those where it lies inside."""
        has = torch.ones((height, width), dtype=torch.bool, device=CPU)
        if isinstance(self.window, Square) and self.window.inside:
            has[:] = False
            r = self.size // 2
            has[r : height - r, r : width - r] = True
        return has

    def cover(self, height: int, width: int) -> Tensor:
        """What the answers of all windows that cover a pixel weigh together, (H, W) float64; of a fold."""
        if isinstance(self.window, Masks):
            assert isinstance(self.window.weights, Tensor)
            answers = self.window.weights.reshape(height * width, -1, height, width) > 0
            return answers.any(1).sum(0, dtype=torch.float64)
        taps = self.fold_taps
        assert taps is not None

        def along(n: int, has: Tensor) -> Tensor:
            reached = np.convolve(has.numpy(), taps.numpy())  # from size // 2 places before the first
            at = np.arange(len(reached)) - self.size // 2
            inside = np.full(len(at), True) if self.wraps else (at >= 0) & (at < n)
            return torch.from_numpy(np.bincount(at[inside] % n, reached[inside], n))

        has = self.windows(height, width)
        return along(height, has.any(1))[:, None] * along(width, has.any(0))[None, :]

    def places(self, height: int, width: int, device: torch.device = CPU) -> Tensor:
        """The number of patches of one image in S(p) of every pixel p, (H, W) float64."""
        k, sources = self.size, Sources(self.sources)
        return sources.along(height, k, device)[:, None] * sources.along(width, k, device)[None, :]
