"""What the pixels and shapes of a bank are taken for, and what they seem to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyels.checks import LARGEST_PIXEL, warn

PIECE = 1 << 22  # bytes looked at in one go
_FEW = 64  # pixels, of which nothing can be said
_ABOUT = 0.01  # what rounding and interpolation may add to a range


def looks_channels_last(shape: Sequence[int]) -> bool:
    """Whether (N, C, H, W) are, by their sizes, rather (N, H, W, C)."""
    _, c, h, w = shape
    return (w <= 4 < min(c, h)) or (4 < c == h != w)


def check_pixels(pieces: Iterable[Tensor], channels: int, latents: bool = False) -> None:
    """Look at every pixel of a float bank, and at as many of a uint8 bank as tell that it is none of masks. Warns or
    raises ValueError where other values seem to be meant, as of what is known to be latents they never do."""
    low, high, start, count = math.inf, -math.inf, 0, 0
    for piece in pieces:
        count += piece.numel()
        if piece.dtype == torch.uint8:
            high = max(high, int(piece.max()))
            if high > 1:
                return
            continue
        for chunk in torch.split(piece, max(1, PIECE // (4 * piece[0].numel()))):  # each is copied once or twice
            finite = torch.isfinite(chunk).flatten(1).all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"images hold NaN or infinite pixels, first in image {start + int((~finite).int().argmax())}"
                )
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            start += len(chunk)
    if low == math.inf:
        if high == 1 and count >= _FEW:
            warn("uint8 images of 0 and 1 alone are taken for -1 and -0.992; if they are masks, multiply them by 255")
        return
    pictures = channels in (1, 3) and not latents  # which mostly have others
    if max(-low, high) > LARGEST_PIXEL or (pictures and low >= 0 and high > 10):
        raise ValueError(
            f"float32 images must lie in [-1, 1], but reach {max(-low, high):.4g}; give 0..255 values as uint8, or "
            f"scale them (latents may reach {LARGEST_PIXEL:g})"
        )
    if latents:
        return
    if low >= -_ABOUT and 0 < high <= 1 + _ABOUT and count >= _FEW:
        warn("float images lie in [0, 1], where [-1, 1] is meant: give 2 * images - 1")
    elif max(abs(low + 0.5), abs(high - 0.5)) < _ABOUT and count >= _FEW:
        warn("float images lie in [-0.5, 0.5], where [-1, 1] is meant: give 2 * images")
    elif (pictures or low >= 0) and max(-low, high) > 1 + _ABOUT:
        warn(
            f"float images reach from {low:.4g} to {high:.4g}, but pictures are taken to lie in [-1, 1]: undo what "
            "normalised them, such as ImageNet's mean and deviation (latents may lie anywhere)"
        )
