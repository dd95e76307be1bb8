"""Lists of similar windows: what engine "sampled" looks into.

Every window of a bank belongs to one inverted list, that of the nearest of some thousand centres, which k-means finds
among the coordinates of windows along their leading principal directions (faiss, Douze et al., arXiv 2401.08281). The
index holds no pixels. Of each window it holds its number, its coordinates along the leading directions in 8 bits, and
those along further ones in 2, in at most 30 bytes: enough to tell about how far a query is from it. Exact distances are
computed from the images.

Where pixels whose windows overhang the border meet such windows alone, every side of the images has lists of its own,
of the windows that overhang it by one row or column. Windows that overhang by more are parts of these: one list serves
all, as the leading directions lie in what all of them share, and every further one needs only some rows more.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pyels import checks
from pyels._core import LEADING, LIST_BLOCK
from pyels.bank import PatchBank
from pyels.bank.selection import ALL, as_numbers
from pyels.checks import CPU
from pyels.engines.operator import describe_lists
from pyels.files import TensorFile, left_unfinished, locked, remove_temporaries, tensors_in_parts, write_at
from pyels.mapped import Stamp, guard
from pyels.records import parse_record, short

MOST_LISTS = 4096
MOST_DIRECTIONS = LEADING + 40  # in 10 bytes
_OWN_BYTES = 8  # of these, at a side, for what not all of its windows share
_LIST_DIRECTIONS = 24  # the leading ones, along which windows are sorted into lists
MOST_WINDOWS = 2**31 - 2**20  # numbered in 32 bits, wherever they are; with what fills up the blocks of lists
LEAST_MEMBERS = 256  # of a list, on average
TRAINING_WINDOWS = 64  # a list
_STRAYS = 0.01  # of all windows, see _Centres
_AT_ONCE = 1 << 18  # windows assigned to lists
_VALUES_AT_ONCE = 1 << 22  # of images, and of windows to learn from
_MEMBERS_AT_ONCE = 1 << 20  # of lists, put in order and described
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B, 0x21F0AAAD)  # odd, and as good as any
_ROOM = 1.2  # codes of 8 bits reach so much further than the coordinates that directions are learned from
_STEP = 1.1  # of codes of 2 bits, in standard deviations: of least squared error for a Laplace distribution
_SEED = 20250713
_VERSION = 6
_KEY = "pyels-index"
_RECORD = {
    "version": range(1 << 31),
    "lists": range(1 << 31),
    "seconds": float,
    "megabytes": float,
    "patch_size": range(1 << 31),
}


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
        if not all(there[part % (height * width)].all() for part in torch.split(self.window, _MEMBERS_AT_ONCE)):
            return "it names windows of another region"
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


Index = dict[Region, Lists]  # over the windows of size k of a bank's images


def regions(patch_size: int, wraps: bool) -> list[Region]:
    """Those of an index over windows of this size."""
    return [Region.INSIDE] if wraps or patch_size == 1 else list(Region)


def tensors_of(index: Index) -> dict[str, Tensor]:
    """All its tensors, as they are named in its file."""
    return {f"{region.lists_name}.{name}": t for region, lists in index.items() for name, t in lists.tensors().items()}


def open_index(
    bank: PatchBank,
    patch_size: int,
    wraps: bool,
    name: str,
    images: range | Tensor,
    folder: str | Path | None = None,
    threads: int = 1,
) -> tuple[Index, Stamp]:
    """The index over a bank's windows, mapped from its file, or built first, with a progress bar, and saved; and the
    stamp of the file, to be asked after the index was used.

    Parameters
    ----------
    patch_size  window size k, odd
    wraps       all H * W windows, wrapped around; otherwise those that lie wholly inside, and those of the sides
    name        of the set of images, as `Selection.names`
    images      (n,) numbers of its images
    folder      where indexes are kept, see `default_folder`

    Raises
    ------
    ValueError   the file is damaged, or was built from another bank
    ImportError  it has to be built, and faiss is not installed
    """
    folder = default_folder(bank) if folder is None else Path(folder)
    of_set = "" if name == ALL else f"-{name.removeprefix(f'{ALL}-')}"
    path = folder / f"k{patch_size}{'-wrapped' if wraps else ''}{of_set}.safetensors"
    about = {
        "version": _VERSION,
        "bank_crc32": bank.fingerprint(),
        "bank_shape": [len(bank), *bank.shape],
        "patch_size": patch_size,
        "wraps": wraps,
        "images": name,
    }
    _tidy(folder)
    if not path.exists():
        with locked(folder, f"building index {path.stem}", wait=True, of=path.name):
            remove_temporaries(folder, path.name)  # of whoever was waited for, and was killed
            if not path.exists():  # another thread or process may have built it meanwhile
                total = 2 * len(images) * len(Windows(Region.INSIDE, bank.shape, patch_size, wraps).centres())
                with tqdm(total=total, desc=f"index {path.stem}", unit="window", unit_scale=True, leave=False) as bar:
                    build(bank, as_numbers(images), patch_size, wraps, path, about, threads, bar.update)
    return _load(path, about)


def _tidy(folder: Path) -> None:
    """Remove what builds that were killed, of any index, have left in a folder; others may be running."""
    for name in left_unfinished(folder):
        if not re.fullmatch(r"k\d+.*\.safetensors", name):
            continue  # of a run that writes here too, under a lock of its own
        with suppress(ValueError, OSError), locked(folder, "tidying up", of=name):
            remove_temporaries(folder, name)


def can_build() -> bool:
    """Whether faiss, which finds the lists, is installed. Using an index takes none."""
    return importlib.util.find_spec("faiss") is not None


def default_folder(bank: PatchBank) -> Path:
    """Beside the file of a bank that was loaded from one; else in the user's cache, by the bank's checksum."""
    if bank.path is not None:
        return bank.path.with_name(f"{bank.path.name}.index")
    return Path(platformdirs.user_cache_dir("pyels")) / "index" / bank.fingerprint()


def describe(folder: str | Path) -> list[dict[str, Any]]:
    """What is known of every index in a folder: patch size, class, number of lists, build time, size."""
    return [{"file": path.name, **_read_about(path)} for path in sorted(Path(folder).glob("k*.safetensors"))]


def _read_about(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # to open a pipe would wait for who writes to it
            raise ValueError("not a regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            about: dict[str, Any] = parse_record((file.metadata() or {}).get(_KEY, "null"), _RECORD)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a readable index ({error}); delete it to have it built again") from error
    return about


def _load(path: Path, about: dict[str, Any]) -> tuple[Index, Stamp]:
    before = _read_about(path)
    for key, value in about.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} is an index with {key} = {short(before.get(key))}, but this bank needs {value}; delete it to "
                "have it built again, or give another folder for indexes"
            )
    images, *shape = about["bank_shape"]
    index: Index = {}
    fault = None
    try:
        stamp = Stamp.of(path)
        file = TensorFile.read(path, mapped=True)
        if not file.has_checksum:
            raise ValueError("it has no checksum")
        for region in regions(about["patch_size"], about["wraps"]):
            index[region] = Lists(**{f.name: file.tensors[f"{region.lists_name}.{f.name}"] for f in fields(Lists)})
            windows = Windows(region, tuple(shape), about["patch_size"], about["wraps"])
            if fault := index[region].fault(images, windows):
                break
    except (KeyError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ValueError(f"{path}: damaged index ({fault}); delete it to have it built again")
    guard(list(tensors_of(index).values()), index[Region.INSIDE])
    return index, stamp


def lists_of(windows: int) -> int:
    """Into how many lists so many windows are sorted."""
    return max(1, min(MOST_LISTS, windows // LEAST_MEMBERS))


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
    started = time.perf_counter()
    threads = 1 if checks.forked else threads
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        with ExitStack() as files:
            found: list[_Sorted] = []
            for region in reversed(regions(patch_size, wraps)):  # that with most work last
                windows = Windows(region, bank.shape, patch_size, wraps)
                told = progress if region is Region.INSIDE else lambda windows: None
                found.append(_sorted(bank, which, windows, files.enter_context(_unnamed(path)), told))
            shapes = {f"{one.prefix}{name}": kind for one in found for name, kind in one.kinds().items()}
            nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())
            metadata: dict[str, str] = {}
            with tensors_in_parts(path, shapes, metadata) as write:
                for one in found:
                    told = progress if one.windows.region is Region.INSIDE else lambda windows: None
                    with _unnamed(path) as file:
                        _arrange(bank, which, one, file, write, threads, told)
                bank.check_unchanged(after=True)
                bank.check_unchanged()  # in memory
                built = {
                    "lists": sum(len(one.counts) for one in found),
                    "seconds": round(time.perf_counter() - started, 1),
                    "megabytes": round(nbytes / 1e6, 1),
                }
                metadata[_KEY] = json.dumps({**about, **built})
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
    """What is learned from some windows of a region, and into which list each of all is sorted.

    Attributes
    ----------
    usable, origin, directions, step  as of `Lists`
    counts  (L, 256) int64  members of each list, by the first byte of their shuffled numbers (`_shuffled`)
    lists   of (windows,) uint16, image by image: the list of each
    """

    windows: Windows
    usable: list[int]
    origin: Tensor
    directions: Tensor
    step: Tensor
    counts: npt.NDArray[np.int64]
    lists: io.FileIO

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
        return self.windows.kinds(members, len(self.counts), len(self.step))


def _sorted(
    bank: PatchBank, which: Tensor, windows: Windows, file: io.FileIO, progress: Callable[[int], Any]
) -> _Sorted:
    places = len(windows.centres())
    count = lists_of(places * len(which))
    some = _SomeWindows(bank, which, windows, count * TRAINING_WINDOWS)
    origin, products = _moments(some)
    directions, usable = _directions(products, windows)
    coordinates = torch.cat([(part - origin) @ directions.T for part in some])
    lead, tail = coordinates[:, :LEADING], coordinates[:, LEADING:]
    steps = [(_ROOM * lead.abs().max() / 127).expand(LEADING), _STEP * tail.square().mean(0).sqrt()]
    step = torch.cat(steps).clamp(min=1e-6)
    filters = directions.reshape(-1, bank.shape[0], *windows.size)
    to_lists = min(_LIST_DIRECTIONS, usable[-1])  # those that all windows have
    centres = _Centres(coordinates[:, :to_lists].contiguous().numpy(), count)
    del coordinates, lead, tail
    counts = np.zeros(len(centres) << 8, np.int64)
    at = 0
    for images in _parts(which, windows):
        pixels = bank.read(images)
        along = F.conv2d(windows.strip(pixels), filters[:to_lists]) - (directions[:to_lists] @ origin)[:, None, None]
        lists = centres.nearest(along.permute(0, 2, 3, 1).reshape(-1, to_lists).contiguous().numpy())
        counts += np.bincount(_keys(lists, images, windows) >> 24, minlength=len(counts))
        write_at(file, at, lists)
        at += lists.nbytes
        progress(len(lists))
    origin = origin.reshape(bank.shape[0], *windows.size)
    return _Sorted(windows, usable, origin, filters, step, counts.reshape(len(centres), 256), file)


def _parts(which: Tensor, windows: Windows) -> tuple[Tensor, ...]:
    """The images whose windows are sorted at once."""
    images = min(_AT_ONCE // len(windows.centres()), _VALUES_AT_ONCE // math.prod(windows.shape))
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
        for part in torch.split(images, max(1, _VALUES_AT_ONCE // values)):
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
    lists, directions, overhangs = len(sizes), len(found.step), windows.overhangs
    learned = {
        "usable": torch.tensor(found.usable, dtype=torch.int32, device=CPU),
        "origin": found.origin.contiguous(),
        "directions": found.directions.contiguous(),
        "step": found.step,
    }
    # Sums over the members of each list: of coordinates, and of squared distances from the origin.
    sums = torch.zeros(lists, directions, dtype=torch.float64, device=CPU)
    squares = torch.zeros(overhangs, lists, dtype=torch.float64, device=CPU)
    within = torch.stack([torch.arange(directions, device=CPU) < usable for usable in found.usable]).double()
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
            **learned,
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
    learned |= {"mean": mean.float(), "spread": spread.clamp(min=0).float()}
    learned |= {"begin": torch.from_numpy(begin), "end": torch.from_numpy(begin + sizes)}
    for name, values in learned.items():
        write(f"{found.prefix}{name}", 0, values)


def _in_order(which: Tensor, found: _Sorted, file: io.FileIO) -> Iterator[npt.NDArray[np.int64]]:
    """All members' keys, ascending, a part at a time; of a list that goes on in the next part, whole blocks.

    They are put into chunks, by which list they are of and by the first byte of their shuffled numbers, as one list may
    hold nearly all windows; each chunk is then put in order.
    """
    counts = found.counts.ravel()
    chunk_of = (np.cumsum(counts) - counts) // _MEMBERS_AT_ONCE
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
