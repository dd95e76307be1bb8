"""Lists of similar windows: what engine "sampled" looks into.

Every window of a bank belongs to one inverted list, that of the nearest of up to some thousand centres, which k-means
finds among the coordinates of windows along their leading principal directions (faiss, Douze et al., arXiv 2401.08281).
The index holds no pixels. Of each window it holds its number, its coordinates along the leading directions in 8 bits,
and those along further ones in 2, in at most 30 bytes: enough to tell about how far a query is from it. Exact distances
are computed from the images.

Where pixels whose windows overhang the border meet such windows alone, every side of the images has lists of its own,
of the windows that overhang it by one row or column. Windows that overhang by more are parts of these: one list serves
all, as the leading directions lie in what all of them share, and every further one needs only some rows more.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pyels._core import LEADING, LIST_BLOCK
from pyels.checks import CPU

MOST_LISTS = 4096
MOST_DIRECTIONS = LEADING + 40  # in 10 bytes
MOST_WINDOWS = 2**31 - 2**20  # numbered in 32 bits, wherever they are; with what fills up the blocks of lists
MEMBERS_AT_ONCE = 1 << 20  # of lists, in memory
KEY = "pyels-index"  # in the metadata of its file, of what is said about it


class Region(IntEnum):
    """Pixels with lists of their own, as csrc/sources.h numbers them: those whose windows lie inside, or wrap around,
    and those whose windows overhang one side."""

    INSIDE = 0
    LEFT = 1
    RIGHT = 2
    TOP = 3
    BOTTOM = 6

    @property
    def lists_name(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Windows:
    """The windows of size k, odd, that a region's lists hold, of images of a shape (C, H, W)."""

    region: Region
    shape: tuple[int, int, int]
    patch_size: int
    wraps: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        k = self.patch_size
        if self.region is Region.INSIDE:
            return k, k
        return (k - 1, k) if self.region in (Region.TOP, Region.BOTTOM) else (k, k - 1)

    @property
    def overhangs(self) -> int:
        """By how many rows or columns they overhang, and parts of them do, at most; inside there is one kind alone."""
        return 1 if self.region is Region.INSIDE else self.patch_size // 2

    def strip(self, images: Tensor) -> Tensor:
        """The part of images (n, C, H, W) whose windows of this size are those of the region."""
        rows, columns = self.size
        match self.region:
            case Region.INSIDE:
                return F.pad(images, (self.patch_size // 2,) * 4, mode="circular") if self.wraps else images
            case Region.TOP:
                return images[:, :, :rows]
            case Region.BOTTOM:
                return images[:, :, -rows:]
            case Region.LEFT:
                return images[..., :columns]
            case Region.RIGHT:
                return images[..., -columns:]

    def centres(self) -> npt.NDArray[np.int32]:
        """The numbers row * W + column of their centres, in the order in which they lie in a strip."""
        _, height, width = self.shape
        r = self.patch_size // 2
        everywhere = np.arange(height * width, dtype=np.int32).reshape(height, width)
        if self.wraps:
            return everywhere.ravel()
        rows, columns = slice(r, height - r), slice(r, width - r)
        match self.region:
            case Region.TOP:
                rows = slice(r - 1, r)
            case Region.BOTTOM:
                rows = slice(height - r, height - r + 1)
            case Region.LEFT:
                columns = slice(r - 1, r)
            case Region.RIGHT:
                columns = slice(width - r, width - r + 1)
        return everywhere[rows, columns].ravel()

    def kinds(self, members: int, lists: int, directions: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the fields of `Lists` that hold so many."""
        of_window, floats = (self.shape[0], *self.size), torch.float32
        return {
            "begin": (torch.int64, (lists,)),
            "end": (torch.int64, (lists,)),
            "window": (torch.int32, (members,)),
            "usable": (torch.int32, (self.overhangs,)),
            "origin": (floats, of_window),
            "directions": (floats, (directions, *of_window)),
            "mean": (floats, (lists, directions)),
            "spread": (floats, (self.overhangs, lists)),
            "lead": (torch.int8, (members * LEADING,)),
            "tail": (torch.uint8, (members * (directions - LEADING) // 4,)),
            "step": (floats, (directions,)),
        }

    def seen(self, overhang: int) -> Tensor:
        """(C, rows, columns) bool: the places of a window that are on the image where it overhangs by so many lines."""
        rows, columns = self.size
        on = torch.ones(self.shape[0], rows, columns, dtype=torch.bool, device=CPU)
        beyond = overhang - 1
        match self.region:
            case Region.TOP:
                on[:, rows - beyond :] = False
            case Region.BOTTOM:
                on[:, :beyond] = False
            case Region.LEFT:
                on[..., columns - beyond :] = False
            case Region.RIGHT:
                on[..., :beyond] = False
        return on


@dataclass(frozen=True)
class Lists:
    """The lists over the windows of a region, of some images of a bank: struct Lists of csrc/sampled/engine.h.

    Attributes
    ----------
    begin, end  (L)           int64    first member of each list, and the one behind its last
    window      (M)           int32    number of the window: image * H * W + row * W + column of its centre
    usable      (O)           int32    number of directions of windows that overhang by 1, 2 .., descending
    origin      (C, rows, columns)     float32  mean window
    directions  (D, C, rows, columns)  float32  principal directions, LEADING of them leading
    mean        (L, D)        float32  mean coordinates of the windows of each list
    spread      (O, L)        float32  mean squared distance of its windows from that point
    lead        (M * LEADING) int8     coordinates of the windows along the leading directions, in units of `step`
    tail        (M * (D - LEADING) / 4) uint8  along the others, in 2 bits
    step        (D)           float32
    """

    begin: Tensor
    end: Tensor
    window: Tensor
    usable: Tensor
    origin: Tensor
    directions: Tensor
    mean: Tensor
    spread: Tensor
    lead: Tensor
    tail: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.begin)

    def fault(self, images: int, windows: Windows) -> str | None:
        """What in it the compiled engine, which trusts it, would stumble over; None: nothing."""
        _, height, width = windows.shape
        members, lists, directions = len(self.window), len(self), len(self.directions)
        for name, (dtype, of_shape) in windows.kinds(members, lists, directions).items():
            given: Tensor = getattr(self, name)
            if given.dtype != dtype or given.shape != of_shape or not given.is_contiguous():
                return f"{name} is {given.dtype} of {tuple(given.shape)}, not {dtype} of {of_shape}"
            if dtype == torch.float32 and not torch.isfinite(given).all():
                return f"{name} holds NaN or infinite values"
        if not (1 <= lists <= MOST_LISTS and directions in range(LEADING, MOST_DIRECTIONS + 1, 4)):
            return f"it has {lists} lists and {directions} directions"
        if not all(usable in range(LEADING, directions + 1, 4) for usable in self.usable.tolist()):
            return f"of {directions} directions, {self.usable.tolist()} are usable"
        ends = torch.cat([torch.zeros(1, dtype=torch.int64, device=CPU), self.end])
        in_order = bool((self.begin >= ends[:-1]).all() and (self.end >= self.begin).all() and ends[-1] >= 1)
        whole_blocks = bool((self.begin % LIST_BLOCK == 0).all()) and members % LIST_BLOCK == 0
        if not (in_order and whole_blocks and int(ends[-1]) <= members):
            return "its lists overlap, or reach beyond its members"
        if not (self.step[:LEADING] == self.step[0]).all() or not (self.step > 0).all():
            return "its steps differ, or are 0"
        if not 0 <= int(self.window.min()) <= int(self.window.max()) < images * height * width:
            return "it names images that the bank has not"
        there = torch.zeros(height * width, dtype=torch.bool, device=CPU)
        there[torch.from_numpy(windows.centres()).long()] = True
        # A part at a time: there may be more of them than memory has room for.
        if not all(there[part % (height * width)].all() for part in torch.split(self.window, MEMBERS_AT_ONCE)):
            return "it names windows of another region"
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


Index = dict[Region, Lists]  # over the windows of size k of a bank's images


def regions(patch_size: int, wraps: bool) -> list[Region]:
    """Those of an index over windows of this size."""
    return [Region.INSIDE] if wraps or patch_size == 1 else list(Region)
