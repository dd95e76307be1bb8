"""How an index is built, out of core: all windows are sorted into lists, part by part of the bank; then the lists are
put in order and described, part by part of theirs."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyels import checks
from pyels._core import LEADING, LIST_BLOCK
from pyels.bank import PatchBank
from pyels.checks import CPU
from pyels.engines.index.learning import VALUES_AT_ONCE, Learned, learn
from pyels.engines.index.lists import KEY, MEMBERS_AT_ONCE, MOST_WINDOWS, Lists, Region, Windows, regions
from pyels.engines.operator import describe_lists
from pyels.files import tensors_in_parts, write_at

_AT_ONCE = 1 << 18  # windows assigned to lists
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B, 0x21F0AAAD)  # odd, and as good as any


def can_build() -> bool:
    """Whether faiss, which finds the lists, is installed. Using an index takes none."""
    return importlib.util.find_spec("faiss") is not None


def build(
    bank: PatchBank,
    which: Tensor,
    patch_size: int,
    wraps: bool,
    path: Path,
    about: dict[str, Any],
    threads: int = 1,
    progress: Callable[[int], Any] = lambda windows: None,
) -> None:
    """Sort the windows of the images `which`, (n,) int64, into lists, and write these and what is said `about` them;
    `progress` is told of windows inside when they are sorted, and again when they are described.

    However many windows there are, it takes some 300 MB of memory, and on disk, beside the file, 10 bytes a window. The
    lists depend, but for rounding, on the images alone.

    Raises ImportError without faiss, ValueError for more than 2,146,435,072 pixels or a bank on a GPU.
    """
    if bank.device.type != "cpu":
        raise ValueError(
            f"an index is built from a bank in CPU memory, but this one is on {bank.device}; use bank.to('cpu')"
        )
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an index is built with faiss, which is not installed: pip install pyels[faiss]") from error

    _, height, width = bank.shape
    if (numbered := height * width * len(bank)) > MOST_WINDOWS:
        raise ValueError(
            f"the bank's images have {numbered} pixels, and an index numbers at most {MOST_WINDOWS}; split the bank "
            "and merge the partial posteriors of its parts"
        )

    def told(region: Region) -> Callable[[int], Any]:
        return progress if region is Region.INSIDE else lambda windows: None

    started = time.perf_counter()
    threads = 1 if checks.forked else threads
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        with ExitStack() as files:
            found: list[_Sorted] = []
            for region in reversed(regions(patch_size, wraps)):  # that with most work last
                windows = Windows(region, bank.shape, patch_size, wraps)
                found.append(_sorted(bank, which, windows, files.enter_context(_unnamed(path)), told(region)))
            shapes = {f"{one.prefix}{name}": kind for one in found for name, kind in one.kinds().items()}
            nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
            metadata: dict[str, str] = {}
            with tensors_in_parts(path, shapes, metadata) as write:
                for one in found:
                    with _unnamed(path) as file:
                        _arrange(bank, which, one, file, write, threads, told(one.windows.region))
                bank.check_unchanged(after=True)
                bank.check_unchanged()  # in memory
                built = {
                    "lists": sum(len(one.counts) for one in found),
                    "seconds": round(time.perf_counter() - started, 1),
                    "megabytes": round(nbytes / 1e6, 1),
                }
                metadata[KEY] = json.dumps({**about, **built})
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _unnamed(path: Path) -> Iterator[io.FileIO]:
    """A file on the same disk as `path` that is gone when the block, or the process, ends."""
    try:
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say of itself which file it was
        raise


@dataclass(frozen=True)
class _Sorted:
    """Into which list each window of a region is sorted.

    Attributes
    ----------
    counts  (L, 256) int64  members of each list, by the first byte of their shuffled numbers (`_shuffled`)
    lists   of (windows,) uint16, image by image: the list of each
    """

    learned: Learned
    counts: npt.NDArray[np.int64]
    lists: io.FileIO

    @property
    def windows(self) -> Windows:
        return self.learned.windows

    @property
    def prefix(self) -> str:
        """Of the names of tensors in the file."""
        return f"{self.windows.region.lists_name}."

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(L,) members of each list."""
        sizes: npt.NDArray[np.int64] = self.counts.sum(1)
        return sizes

    @property
    def begin(self) -> npt.NDArray[np.int64]:
        """(L,) first member of each list, at the beginning of a block."""
        blocks = -(-self.sizes // LIST_BLOCK)
        begin: npt.NDArray[np.int64] = (np.cumsum(blocks) - blocks) * LIST_BLOCK
        return begin

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        members = int((-(-self.sizes // LIST_BLOCK)).sum()) * LIST_BLOCK
        return self.windows.kinds(members, len(self.counts), len(self.learned.directions))


def _sorted(
    bank: PatchBank, which: Tensor, windows: Windows, file: io.FileIO, progress: Callable[[int], Any]
) -> _Sorted:
    learned = learn(bank, which, windows)
    counts = np.zeros(len(learned) << 8, np.int64)
    at = 0
    for images in _parts(which, windows):
        lists = learned.lists_of(bank.read(images))
        counts += np.bincount(_keys(lists, images, windows) >> 24, minlength=len(counts))
        write_at(file, at, lists)
        at += lists.nbytes
        progress(len(lists))
    return _Sorted(learned, counts.reshape(len(learned), 256), file)


def _parts(which: Tensor, windows: Windows) -> tuple[Tensor, ...]:
    """The images whose windows are sorted at once."""
    images = min(_AT_ONCE // len(windows.centres()), VALUES_AT_ONCE // math.prod(windows.shape))
    return torch.split(which, max(1, images))


def _keys(lists: npt.NDArray[np.uint16], images: Tensor, windows: Windows) -> npt.NDArray[np.int64]:
    """What members of all lists are ordered by: list * 2^32 + shuffled number of the window."""
    _, height, width = windows.shape
    numbers = (images.numpy()[:, None] * (height * width) + windows.centres()).ravel()
    return lists.astype(np.int64) << 32 | _shuffled(numbers, _MULTIPLIERS)


def _numbers(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The numbers of the windows of some keys."""
    back = [pow(multiplier, -1, 1 << 32) for multiplier in reversed(_MULTIPLIERS)]
    return _shuffled(keys & 0xFFFFFFFF, back).astype(np.int32)


def _shuffled(numbers: npt.NDArray[Any], multipliers: Sequence[int]) -> npt.NDArray[np.uint32]:
    """Numbers below 2^32 in place of others, each in place of one, as if at random; the inverse multipliers, in reverse
    order, give back those that they stand for.

    Ordered by them, a list's first members are a fair sample of it, whichever part of them was in memory at a time.
    """
    mixed = numbers.astype(np.uint32)
    mixed ^= mixed >> np.uint32(16)
    for multiplier in multipliers:
        mixed *= np.uint32(multiplier)
        mixed ^= mixed >> np.uint32(16)
    return mixed


def _arrange(
    bank: PatchBank,
    which: Tensor,
    found: _Sorted,
    file: io.FileIO,
    write: Callable[[str, int, Tensor], None],
    threads: int,
    progress: Callable[[int], Any],
) -> None:
    """Write the lists of a region: members, each list from the beginning of a block on, and their descriptions."""
    windows, begin, sizes = found.windows, found.begin, found.sizes
    lists, directions, overhangs = len(sizes), len(found.learned.directions), windows.overhangs
    # Sums over the members of each list: of coordinates, and of squared distances from the origin.
    sums = torch.zeros(lists, directions, dtype=torch.float64, device=CPU)
    squares = torch.zeros(overhangs, lists, dtype=torch.float64, device=CPU)
    within = (torch.arange(directions, device=CPU) < found.learned.usable[:, None]).double()
    at = begin.copy()  # where the next member of each list belongs
    for keys in _in_order(which, found, file):
        first, last = int(keys[0] >> 32), int(keys[-1] >> 32) + 1
        here = np.bincount((keys >> 32) - first)  # members of lists `first` to `last`
        place, starts = int(at[first]), at[first:last] - at[first]
        members = -(-int(starts[-1] + here[-1]) // LIST_BLOCK) * LIST_BLOCK
        numbers = np.full(members, windows.centres()[0], np.int32)
        numbers[np.arange(len(keys)) + np.repeat(starts - (np.cumsum(here) - here), here)] = _numbers(keys)
        part = Lists(
            begin=torch.from_numpy(starts),
            end=torch.from_numpy(starts + here),
            window=torch.from_numpy(numbers),
            mean=torch.empty(last - first, directions, dtype=torch.float32, device=CPU),
            spread=torch.empty(overhangs, last - first, dtype=torch.float32, device=CPU),
            lead=torch.zeros(members * LEADING, dtype=torch.int8, device=CPU),
            tail=torch.zeros(members * (directions - LEADING) // 4, dtype=torch.uint8, device=CPU),
            **found.learned.tensors(),
        )
        describe_lists(bank.images, windows.patch_size, threads, windows.region, part.tensors())
        for name, values in (("window", part.window), ("lead", part.lead), ("tail", part.tail)):
            write(f"{found.prefix}{name}", place * len(values) // members, values)
        mean, weights = part.mean.double(), torch.from_numpy(here)
        sums[first:last] += weights[:, None] * mean
        squares[:, first:last] += weights * (part.spread + within @ mean.T.square())
        at[first:last] += here
        progress(len(keys))
    mean = sums / torch.from_numpy(sizes).clamp(min=1)[:, None]
    spread = squares / torch.from_numpy(sizes).clamp(min=1) - within @ mean.T.square()
    of_lists = {"begin": torch.from_numpy(begin), "end": torch.from_numpy(begin + sizes)}
    of_lists |= {"mean": mean.float(), "spread": spread.clamp(min=0).float()}
    for name, values in (found.learned.tensors() | of_lists).items():
        write(f"{found.prefix}{name}", 0, values)


def _in_order(which: Tensor, found: _Sorted, file: io.FileIO) -> Iterator[npt.NDArray[np.int64]]:
    """All members' keys, ascending, a part at a time; of a list that goes on in the next part, whole blocks.

    They are put into chunks, by which list they are of and by the first byte of their shuffled numbers, as one list may
    hold nearly all windows; each chunk is then put in order.
    """
    counts = found.counts.ravel()
    chunk_of = (np.cumsum(counts) - counts) // MEMBERS_AT_ONCE
    chunks = int(chunk_of[-1]) + 1
    sizes = np.zeros(chunks, np.int64)
    np.add.at(sizes, chunk_of, counts)
    ends = np.cumsum(sizes)
    at = ends - sizes  # where the next key of each chunk belongs
    found.lists.seek(0)
    for images in _parts(which, found.windows):
        keys = _keys(_read(found.lists, np.uint16, len(images) * len(found.windows.centres())), images, found.windows)
        keys.sort()
        edges = np.searchsorted(chunk_of[keys >> 24], np.arange(chunks + 1))
        for chunk in np.flatnonzero(np.diff(edges)):
            some = keys[edges[chunk] : edges[chunk + 1]]
            write_at(file, int(at[chunk]) * 8, some)
            at[chunk] += len(some)

    list_ends = np.cumsum(found.sizes)
    file.seek(0)
    rest = np.empty(0, np.int64)
    for size, end in zip(sizes.tolist(), ends.tolist(), strict=True):
        some = _read(file, np.int64, size)
        some.sort()
        keys = np.concatenate([rest, some])
        whole = len(keys)
        if whole and list_ends[last := keys[-1] >> 32] > end:
            whole -= (whole - int(np.searchsorted(keys, last << 32))) % LIST_BLOCK
        rest = keys[whole:]
        if whole:
            yield keys[:whole]


def _read(file: io.FileIO, dtype: Any, count: int) -> npt.NDArray[Any]:
    """The next values in a file."""
    values = np.empty(count, dtype)
    left = values.view(np.uint8).data
    while left and (done := file.readinto(left)):
        left = left[done:]
    return values
