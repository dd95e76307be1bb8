"""The formula as data: which window a pixel compares, with which patches, and what answers.

For every output pixel p (Kamb & Ganguli, ICML 2025, arXiv 2412.20292):

    x0_hat(p) = sum_{i in S(p)} w_i * centre(phi_i) / sum_{i in S(p)} w_i
    log w_i   = - || x[window(p)] - alpha * phi_i ||^2 / (2 sigma^2)

A machine is a definition over a bank; engines evaluate it, or say why they cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from pyels.checks import CPU, check_patch_size


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


@dataclass(frozen=True)
class WholeImage:
    """The whole image is compared: one weight for an image, shared by all pixels."""


@dataclass(frozen=True)
class Square:
    """A k x k square around the pixel, k odd; None: every call says how large it is."""

    k: int | None = None


@dataclass(frozen=True, eq=False)
class Masks:
    """A mask of one's own for every output pixel p:

        log w_i(p) = - sum_z weights[p, z] (x(z) - alpha phi_i(z))^2 / (2 sigma^2)

    Parameters
    ----------
    weights  (H*W, H, W) or (H*W, C, H, W), not negative, for output pixel p = row * W + column; or a function of
             (alpha, sigma) that returns such
    """

    weights: Tensor | Callable[[float, float], Tensor] = field(repr=False)

    def at(self, alpha: float, sigma: float, shape: Sequence[int]) -> Tensor:
        """The weights at one noise level, (H*W, C, H, W) float64, for images (C, H, W)."""
        weights = self.weights(alpha, sigma) if callable(self.weights) else self.weights
        given = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, device=CPU)
        weights = given.detach().to("cpu", torch.float64)
        channels, height, width = shape
        pixels = height * width
        if weights.shape == (pixels, height, width):
            weights = weights[:, None].expand(pixels, channels, height, width)
        if weights.shape != (pixels, channels, height, width):
            allowed = f"{(pixels, height, width)} or {(pixels, channels, height, width)}"
            raise ValueError(
                f"weights of Masks must have shape {allowed} for images {tuple(shape)}, got {tuple(given.shape)}"
            )
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("weights of Masks must be finite and not negative")
        return weights.contiguous()


Window = WholeImage | Square | Masks
_ALLOWED = {WholeImage: (Sources.SAME_POSITION, Sources.CIRCULAR), Masks: (Sources.SAME_POSITION,)}


@dataclass(frozen=True)
class Definition:
    """What a machine computes. Its bank, and the engine that evaluates it, are the machine's.

    Parameters
    ----------
    window   `Square(k)`, `WholeImage()` or `Masks(weights)`: what is compared
    sources  "zeros", "circular", "interior" or "same_position": which patches of every image with it (see `Sources`)
    fold     None: the centre of the window answers, not a mean over the windows that cover a pixel
    mirror   whether mirror images are sources too

    An engine that cannot evaluate a definition says why when the machine is made.

    Raises
    ------
    TypeError, ValueError  not a window, or unknown sources; sources that a window does not go with
    """

    window: Window = Square()
    sources: Sources | str = Sources.ZEROS
    fold: str | None = None
    mirror: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.window, Window):
            raise TypeError(f"window must be Square(k), WholeImage() or Masks(weights), got {self.window!r}")
        allowed = [source.value for source in _ALLOWED.get(type(self.window), Sources)]
        if self.sources not in (*allowed, *map(Sources, allowed)):
            raise ValueError(
                f"sources must be one of {', '.join(map(repr, allowed))} with {type(self.window).__name__}, "
                f"got {self.sources!r}"
            )
        object.__setattr__(self, "sources", Sources(self.sources))

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
        """k of a square window; None where it has none, or none yet."""
        return self.window.k if isinstance(self.window, Square) else None

    @property
    def size(self) -> int:
        """k; 1, which has no meaning, where windows have none. Raises ValueError where it is not said yet."""
        if isinstance(self.window, Square) and self.window.k is None:
            check_patch_size(None, 1, 1, False)
        return self.patch_size or 1

    def of_size(self, k: int | None, height: int, width: int) -> Definition:
        """The same with windows of size k; None: as it is. Raises ValueError for a size that it cannot have, or where
        it has none yet."""
        if not isinstance(self.window, Square):
            if k is not None:
                raise ValueError(f"patch_size {k} was given, but {type(self.window).__name__} has none; leave it out")
            return self
        size = check_patch_size(self.window.k if k is None else k, height, width, self.wraps)
        return replace(self, window=Square(size))

    def places(self, height: int, width: int, device: torch.device = CPU) -> Tensor:
        """The number of patches of one image in S(p) of every pixel p, (H, W) float64."""
        k, sources = self.size, Sources(self.sources)
        return sources.along(height, k, device)[:, None] * sources.along(width, k, device)[None, :]
