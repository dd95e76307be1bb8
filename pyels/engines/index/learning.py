"""What is learned from some of the windows, before all are sorted: the directions along which they are described, and
the centres of the lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pyels._core import LEADING
from pyels.bank import PatchBank
from pyels.checks import CPU
from pyels.engines.index.lists import MOST_DIRECTIONS, MOST_LISTS, Windows

TRAINING_WINDOWS = 64  # a list
VALUES_AT_ONCE = 1 << 22  # of images, and of windows to learn from
_OWN_BYTES = 8  # of those 10, at a side, for what not all of its windows share
_LIST_DIRECTIONS = 24  # the leading ones, along which windows are sorted into lists
_STRAYS = 0.01  # of all windows, see _Centres
_ROOM = 1.2  # codes of 8 bits reach so much further than the coordinates that directions are learned from
_STEP = 1.1  # of codes of 2 bits, in standard deviations: of least squared error for a Laplace distribution
_SEED = 20250713


@dataclass(frozen=True)
class Learned:
    """What is learned of the windows of a region.

    Attributes
    ----------
    usable, origin, directions, step  as of `Lists`
    centres                           of the lists
    """

    windows: Windows
    usable: Tensor
    origin: Tensor
    directions: Tensor
    step: Tensor
    centres: _Centres

    def __len__(self) -> int:
        """The number of lists."""
        return len(self.centres)

    def lists_of(self, images: Tensor) -> npt.NDArray[np.uint16]:
        """The number of the list of every window of images (n, C, H, W), in the order of `Windows.centres`."""
        directions = self.directions[: self.centres.dimensions]
        at_origin = directions.flatten(1) @ self.origin.flatten()
        along = F.conv2d(self.windows.strip(images), directions) - at_origin[:, None, None]
        return self.centres.nearest(along.permute(0, 2, 3, 1).flatten(0, 2).contiguous().numpy())

    def tensors(self) -> dict[str, Tensor]:
        """Those of `Lists` that are learned."""
        return {name: getattr(self, name) for name in ("usable", "origin", "directions", "step")}


def learn(bank: PatchBank, which: Tensor, windows: Windows) -> Learned:
    """From windows of some of the images `which`, (n,) int64."""
    # A query is compared with every list, and with windows of some: of neither there should be too many. (Measured from
    # 3,000 to 60,000 images; the more noise, the fewer lists are best, and by twice as many or half it matters little.)
    count = max(1, min(MOST_LISTS, math.isqrt(len(windows.centres()) * len(which)) // 2))
    some = _SomeWindows(bank, which, windows, count * TRAINING_WINDOWS)
    origin, products = _moments(some)
    directions, usable = _directions(products, windows)
    coordinates = torch.cat([(part - origin) @ directions.T for part in some])
    lead, tail = coordinates[:, :LEADING], coordinates[:, LEADING:]
    steps = [(_ROOM * lead.abs().max() / 127).expand(LEADING), _STEP * tail.square().mean(0).sqrt()]
    to_lists = min(_LIST_DIRECTIONS, usable[-1])  # those that all windows have
    of_window = bank.shape[0], *windows.size
    return Learned(
        windows,
        usable=torch.tensor(usable, dtype=torch.int32, device=CPU),
        origin=origin.reshape(of_window),
        directions=directions.reshape(-1, *of_window),
        step=torch.cat(steps).clamp(min=1e-6),
        centres=_Centres(coordinates[:, :to_lists].contiguous().numpy(), count),
    )


class _SomeWindows:
    """About so many windows of random images, a few of each, the same whenever they are gone through: parts of them,
    (n, C * rows * columns)."""

    def __init__(self, bank: PatchBank, which: Tensor, windows: Windows, wanted: int) -> None:
        self._bank, self._which, self._windows, self._wanted = bank, which, windows, wanted

    def __iter__(self) -> Iterator[Tensor]:
        generator = np.random.default_rng(_SEED)
        images = torch.from_numpy(generator.permutation(len(self._which))[:20_000])
        each = max(8, -(-self._wanted // len(images)))
        values = math.prod(self._bank.shape) + each * self._bank.shape[0] * math.prod(self._windows.size)
        for part in torch.split(images, max(1, VALUES_AT_ONCE // values)):
            strip = self._windows.strip(self._bank.read(self._which[part]))
            rows, columns = self._windows.size
            windows = strip.unfold(2, rows, 1).unfold(3, columns, 1)  # (n, C, down, across, rows, columns)
            down, across = windows.shape[2:4]
            places = torch.from_numpy(generator.permutation(down * across)[:each])
            shift = torch.from_numpy(generator.integers(down * across, size=(len(part), 1)))
            chosen = (places + shift) % (down * across)  # (n, each)
            at = torch.arange(len(part), device=CPU)[:, None]
            yield windows[at, :, chosen // across, chosen % across].flatten(0, 1).flatten(1)


def _moments(some: _SomeWindows) -> tuple[Tensor, Tensor]:
    """The mean (D,) float32 of windows, and the products of their values less it, (D, D) float64."""
    near = next(iter(some)).mean(0)  # products of large values would leave nothing of the small differences
    total = torch.zeros(len(near), dtype=torch.float64, device=CPU)
    products = torch.zeros(len(near), len(near), dtype=torch.float64, device=CPU)
    count = 0
    for windows in some:
        windows = windows - near
        total += windows.sum(0)
        products += windows.T @ windows
        count += len(windows)
    mean = total / count
    return (near + mean).float(), products - count * mean[:, None] * mean


def _usable(windows: Windows) -> list[int]:
    """How many directions windows have that overhang by 1, 2 ..: a byte of the tail holds four."""
    seen = [int(windows.seen(overhang).sum()) for overhang in range(1, windows.overhangs + 1)]
    # Bytes that would hold all there is: of a line that only windows which overhang by less have, and of what all have.
    of_lines = [math.ceil((more - less) / 4) for more, less in itertools.pairwise(seen)]
    shared = math.ceil(max(0, seen[-1] - LEADING) / 4)
    budget = (MOST_DIRECTIONS - LEADING) // 4
    lines = len(of_lines)
    # At first one byte for each line, as far as there are, in even distances; then as much as there is of the rest.
    own = min(_OWN_BYTES, lines)
    given = [math.ceil((i + 1) * own / lines) - math.ceil(i * own / lines) for i in range(lines)]
    of_all = min(shared, budget - own)
    for i in reversed(range(lines)):
        given[i] += min(of_lines[i] - given[i], budget - of_all - sum(given))
    return [LEADING + 4 * (of_all + sum(given[overhang:])) for overhang in range(windows.overhangs)]


def _directions(products: Tensor, windows: Windows) -> tuple[Tensor, list[int]]:
    """Orthonormal directions (D, C * rows * columns) of windows whose values less their mean have these products, (the
    same, the same) float64, and how many of them lie in what is on the image of windows that overhang by 1, 2 ..; rows
    of zeros fill up.

    For the largest overhang these are the principal directions of what is on the image; then, for each that is smaller,
    those of what they leave of a line more.
    """
    overhangs = windows.overhangs
    usable = _usable(windows)
    found = products.new_zeros(usable[0], len(products), dtype=torch.float32)
    have = 0
    for overhang in range(overhangs, 0, -1):
        wanted, seen = usable[overhang - 1], windows.seen(overhang).flatten()
        if wanted == have:
            continue
        before = found[:have].double()
        left = products * (seen[:, None] & seen)
        left = left - left @ before.T @ before
        left = left - before.T @ (before @ left)
        values, vectors = torch.linalg.eigh(left.float())
        new = vectors.T.flip(0)[: wanted - have]
        new = new - new @ found[:have].T @ found[:have]  # where nothing is left, any direction is as good
        kept = values.flip(0)[: len(new)] > 1e-6 * values[-1].clamp(min=1e-30)
        found[have : have + len(new)] = torch.where(kept[:, None], F.normalize(new), 0) * seen
        have = wanted
    return found, usable


class _Centres:
    """Centres of lists, in groups: k-means of some points (n, d) float32, and then of those of each group. The nearest
    is looked for in the nearest group alone, which takes a small part of the comparisons with all.

    Every group has one list more, of its strays, the points that are far from the nearest centre for its list. A list
    that is known by the mean and the spread of its members is so without the few of which these tell nothing.
    """

    def __init__(self, points: npt.NDArray[np.float32], count: int) -> None:
        import faiss

        def trained(points: npt.NDArray[np.float32], count: int) -> Any:
            found = faiss.Kmeans(points.shape[1], count, niter=10, seed=_SEED, min_points_per_centroid=1)
            found.train(points)
            return found.index

        self.dimensions = points.shape[1]
        self._groups = trained(points, groups := math.isqrt(count))
        of_points = self._groups.search(points, 1)[1][:, 0]
        members = np.bincount(of_points, minlength=groups)
        sizes = 1 + (count - 2 * groups) * members // len(points) if count > 3 else np.ones(groups, np.int64)
        self._last = np.cumsum(sizes + 1) - 1
        self._first = self._last - sizes
        self._centres = [
            trained(points[of_points == group], int(size)) if size > 1 else None for group, size in enumerate(sizes)
        ]
        lists, apart, _ = self._find(points)
        spread = np.bincount(lists, apart, len(self)) / np.maximum(1, np.bincount(lists, minlength=len(self)))
        spread = np.maximum(spread, max(1e-30, 1e-3 * apart.mean()))  # where all are alike, rounding makes no stray
        self._far = np.quantile(apart / spread[lists], 1 - _STRAYS) * spread

    def __len__(self) -> int:
        """The number of lists."""
        return int(self._last[-1]) + 1

    def nearest(self, points: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        """The number of the list for each of points (n, d) float32."""
        lists, apart, groups = self._find(points)
        found: npt.NDArray[np.uint16] = np.where(apart > self._far[lists], self._last[groups], lists).astype(np.uint16)
        return found

    def _find(self, points: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
        """Of each point, the number of the list with the nearest centre, its squared distance from that, the group."""
        apart, groups = (found[:, 0] for found in self._groups.search(points, 1))
        lists = self._first[groups]
        for group in np.unique(groups):
            if (centres := self._centres[group]) is not None:
                which = np.flatnonzero(groups == group)
                apart[which], places = (found[:, 0] for found in centres.search(points[which], 1))
                lists[which] += places
        return lists, apart, groups
