"""New or remembered: how near images come to those of a bank, as a whole and patch by patch.

All take images (B, C, H, W) float32 in [-1, 1] of the bank's shape, in CPU memory, and tell of each by itself. None of
them tells what a picture is of: a new picture of a known kind, and noise, are both far from all training images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from pyels.bank import PatchBank
from pyels.bank.bank import check_bank
from pyels.checks import check_count, check_images, check_number
from pyels.definition import Square
from pyels.machines import Machine

_AT_ONCE = 1 << 24  # bytes of float64 pixels, and of products
_NEAR = (
    0.1  # the sigma at which nearest patches are asked for: any does, and at little noise engines pass over the rest
)


class Nearest(NamedTuple):
    """See `nearest_image`."""

    image: Tensor
    row: Tensor
    column: Tensor
    mse: Tensor


def nearest_image(images: Tensor, bank: PatchBank, shift: int = 0) -> Nearest:
    """The nearest image of the bank, also when moved: of all images, moved by up to `shift` pixels along each axis, the
    one with the least mean squared difference over the pixels where both are.

    Tells whether a picture is a copy, moved or not: 0 for one, (2 / 255)^2 for one that is a grey level off everywhere.
    It cannot tell a mosaic of copies from a new picture, and a copy in other colours, mirrored or scaled is far; a flat
    picture is near to every pale one.

    Parameters
    ----------
    shift  pixels, from 0 on and less than half of each side

    Returns
    -------
    image        (B,) int64    its number; of equally near ones the first
    row, column  (B,) int64    where its pixel (0, 0) lies in the picture: by how much it is moved
    mse          (B,) float64  the mean squared difference there

    Raises
    ------
    TypeError, ValueError  bad arguments
    """
    channels, height, width = check_bank(bank).shape
    images = check_images(images, shape=bank.shape).double()
    if shift and not 2 * check_count("shift", shift) < min(height, width):
        raise ValueError(f"shift must be less than half of each side of {height}x{width} images, got {shift}")
    count = len(images)
    frame = partial(pad, pad=(shift,) * 4)
    overlap = conv2d(
        frame(torch.ones(1, 1, height, width, dtype=torch.float64)), torch.ones(1, 1, height, width).double()
    )
    kernels = torch.cat([images, torch.ones_like(images[:1])])
    own = conv2d(frame(torch.ones_like(images[:1])), images.square())[0]  # of the pixels that an image so moved covers
    best = torch.full((count,), math.inf, dtype=torch.float64)
    where = torch.zeros(count, dtype=torch.int64)
    n = max(1, _AT_ONCE // (8 * channels * height * width * (1 + 2 * shift) ** 2))
    for start in range(0, len(bank), n):
        part = frame(bank.read(slice(start, start + n)).double())
        theirs = conv2d(part.square(), kernels[-1:])
        distances = (theirs - 2 * conv2d(part, images) + own) / (channels * overlap)
        least, at = distances.transpose(0, 1).flatten(1).min(dim=1)
        better = least < best
        best, where = torch.where(better, least, best), torch.where(better, at + start * distances[0, 0].numel(), where)
    side = 2 * shift + 1
    return Nearest(where // side**2, shift - where // side % side, shift - where % side, best.clamp(min=0))


@dataclass(frozen=True, eq=False)
class Patches:
    """The nearest patch of every pixel, by `nearest_patches`.

    Attributes
    ----------
    image, row, column  (B, H, W) int64    the pixel at its centre; of equally near ones the first
    mse                 (B, H, W) float64  the mean squared difference of the whole window, over what of it is compared
    difference          (B, H, W) float64  the root mean squared one of the pixel itself, over channels
    """

    image: Tensor
    row: Tensor
    column: Tensor
    mse: Tensor
    difference: Tensor

    def copied(self, tolerance: float = 0.05) -> Tensor:
        """The share of pixels whose whole window is that of a patch of one training image, (B,) float64: that differ by
        a root mean square of at most `tolerance`, 6 of 255 grey levels.

        Tells what is put together of training images, whichever, mosaics too: 1 but for the seams. Where windows are
        small or flat all pictures of a kind are such, copied or not; compare with held-out images.
        """
        return (self.mse.sqrt() <= check_number("tolerance", tolerance)).double().mean((1, 2))

    def consistent(self, tolerance: float = 0.05) -> Tensor:
        """The share of pixels that equal the centre of their nearest patch to `tolerance`, (B,) float64.

        Of all pixels: the picture is locally consistent (Kamb & Ganguli, arXiv 2412.20292, section 4), which ELS with
        these windows comes to as sigma goes to 0. Training images are; a picture may be and be new. A sample that is
        not was drawn with larger windows, ended at some noise, or is not of this theory.
        """
        return (self.difference <= check_number("tolerance", tolerance)).double().mean((1, 2))

    @property
    def inconsistency(self) -> Tensor:
        """How far pixels are from the centres of their nearest patches, root mean square, (B,) float64."""
        return self.difference.square().mean((1, 2)).sqrt()


def nearest_patches(images: Tensor, machine: Machine) -> Patches:
    """Of every pixel the nearest of the patches that the machine compares it with: of all places, by `pyels.ELS`, or of
    the same one, by `pyels.LS`; the machine with sigma to 0.

    Parameters
    ----------
    machine  one with square windows of a size of its own, without a fold and other responses

    Raises
    ------
    TypeError, ValueError  bad arguments
    """
    _check_machine(machine)
    definition, bank = machine.definition, machine.bank
    if not isinstance(definition.window, Square) or definition.fold or definition.responses:
        raise ValueError(f"machine must have square windows, without a fold and other responses, got {definition!r}")
    query = machine.query(images, 1.0, _NEAR)
    found = machine.partial(query)
    assert found.top is not None
    assert found.source is not None
    channels, height, width = bank.shape
    values = torch.full((1, 1, height, width), float(channels * definition.size**2), dtype=torch.float64)
    if not definition.wraps:
        ones = torch.ones(1, 1, *(definition.size,) * 2, dtype=torch.float64)
        values = channels * conv2d(torch.ones_like(values), ones, padding=definition.size // 2)
    mse = (-2 * _NEAR**2 * found.top.cpu()).clamp(min=0) / values[0]
    source = found.source.cpu()
    image, row, column = source // (height * width), source // width % height, source % width
    difference = torch.empty_like(mse)
    for b, x in enumerate(query.x.cpu()):
        numbers, place = image[b].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        centres = bank.read(numbers)[place, :, row[b], column[b]].permute(2, 0, 1)
        difference[b] = (x - centres).double().square().mean(0).sqrt()
    return Patches(image, row, column, mse, difference)


def log_evidence(images: Tensor, machine: Machine, sigma: float = 0.1) -> Tensor:
    """How likely the windows of a picture are among those of the bank, (B,) float64: the mean over pixels of
    log mean_i w_i at alpha = 1, in nats; a kernel density of width sigma, but for a factor that is the same for all.

    Tells pictures that are unlike the bank's, which have less, where figures of one machine and one sigma are compared;
    copies have most, flat pictures nearly as much. Windows of k x k see nothing larger: three sleeves are as likely as
    two.

    Raises
    ------
    TypeError, ValueError  bad arguments
    """
    return _check_machine(machine).posterior(images, 1.0, sigma).log_evidence.double().mean((1, 2))


def _check_machine(machine: Machine) -> Machine:
    if not isinstance(machine, Machine):
        raise TypeError(f"machine must be a pyels.Machine, got {type(machine).__name__}")
    return machine
