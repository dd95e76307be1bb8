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
import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
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
from pyels.files import LOCK, TensorFile, locked, remove_temporaries, write_tensors
from pyels.mapped import Stamp, guard
from pyels.records import parse_record, short

MOST_LISTS = 4096
MOST_DIRECTIONS = LEADING + 40  # in 10 bytes
_OWN_BYTES = 8  # of these, at a side, for what not all of its windows share
_LIST_DIRECTIONS = 24  # the leading ones, along which windows are sorted into lists
MOST_WINDOWS = 2**31 - 2**20  # numbered in 32 bits, wherever they are; with what fills up the blocks of lists
LEAST_MEMBERS = 256  # of a list, on average
TRAINING_WINDOWS = 64  # a list
_AT_ONCE = 1 << 20  # windows assigned to lists
_VALUES_AT_ONCE = 1 << 24  # of windows to learn from
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
        channels, height, width = windows.shape
        members, lists, directions = len(self.window), len(self), len(self.directions)
        overhangs, of_window, floats = windows.overhangs, (channels, *windows.size), torch.float32
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "begin": (torch.int64, (lists,)),
            "end": (torch.int64, (lists,)),
            "window": (torch.int32, (members,)),
            "usable": (torch.int32, (overhangs,)),
            "origin": (floats, of_window),
            "directions": (floats, (directions, *of_window)),
            "mean": (floats, (lists, directions)),
            "spread": (floats, (overhangs, lists)),
            "lead": (torch.int8, (members * LEADING,)),
            "tail": (torch.uint8, (members * (directions - LEADING) // 4,)),
            "step": (floats, (directions,)),
        }
        for name, (dtype, of_shape) in kinds.items():
            given: Tensor = getattr(self, name)
            if given.dtype != dtype or given.shape != of_shape or not given.is_contiguous():
                return f"{name} is {given.dtype} of {tuple(given.shape)}, not {dtype} of {of_shape}"
            if dtype == floats and not torch.isfinite(given).all():
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
        if not there[self.window % (height * width)].all():
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
    path = folder / f"k{patch_size}{'-wrapped' if wraps else ''}{'' if name == ALL else f'-{name}'}.safetensors"
    about = {
        "version": _VERSION,
        "bank_crc32": bank.fingerprint(),
        "bank_shape": [len(bank), *bank.shape],
        "patch_size": patch_size,
        "wraps": wraps,
        "images": name,
    }
    if not path.exists():
        with locked(folder, f"building an index, k={patch_size}", wait=True):
            remove_temporaries(folder)  # of builds that were killed
            if not path.exists():  # another thread or process may have built it meanwhile
                which = as_numbers(images)
                started = time.perf_counter()
                with tqdm(total=len(which), desc=f"index k={patch_size}", unit="image", leave=False) as bar:
                    index = build(bank, which, patch_size, wraps, threads, bar.update)
                tensors = tensors_of(index)
                built = {
                    "lists": sum(map(len, index.values())),
                    "seconds": round(time.perf_counter() - started, 1),
                    "megabytes": round(sum(tensor.nbytes for tensor in tensors.values()) / 1e6, 1),
                }
                bank.check_unchanged()
                write_tensors(path, tensors, {_KEY: json.dumps({**about, **built})})
    elif (folder / LOCK).exists():
        with (
            suppress(ValueError, OSError),
            locked(folder, "tidying up"),
        ):  # after a build that was killed, not a running one
            remove_temporaries(folder)
    return _load(path, about)


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
    for lists in index.values():
        for tensor in lists.tensors().values():
            guard(tensor, lists)
    return index, stamp


def lists_of(windows: int) -> int:
    """Into how many lists so many windows are sorted."""
    return max(1, min(MOST_LISTS, windows // LEAST_MEMBERS))


def build(
    bank: PatchBank,
    which: Tensor,
    patch_size: int,
    wraps: bool,
    threads: int = 1,
    progress: Callable[[int], Any] = lambda images: None,
) -> Index:
    """Sort the windows of the images `which`, (n,) int64, into lists; `progress` is told of every part of them done.

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
    threads = 1 if checks.forked else threads
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        return {
            region: _build(
                bank,
                which,
                Windows(region, bank.shape, patch_size, wraps),
                threads,
                progress if region is Region.INSIDE else lambda images: None,
            )
            for region in reversed(regions(patch_size, wraps))  # that with most work last
        }
    finally:
        faiss.omp_set_num_threads(before)


def _build(bank: PatchBank, which: Tensor, of_region: Windows, threads: int, progress: Callable[[int], Any]) -> Lists:
    places = len(of_region.centres())
    count = lists_of(places * len(which))
    generator = np.random.default_rng(_SEED)
    windows = _some_windows(bank, which, of_region, count * TRAINING_WINDOWS, generator)
    origin = windows.mean(0)
    windows -= origin
    directions, usable = _directions(windows, of_region)
    coordinates = windows @ directions.T
    lead, tail = coordinates[:, :LEADING], coordinates[:, LEADING:]
    steps = [(_ROOM * lead.abs().max() / 127).expand(LEADING), _STEP * tail.square().mean(0).sqrt()]
    step = torch.cat(steps).clamp(min=1e-6)
    filters = directions.reshape(-1, bank.shape[0], *of_region.size)
    to_lists = min(_LIST_DIRECTIONS, usable[-1])  # those that all windows have
    centres = _Centres(coordinates[:, :to_lists].contiguous().numpy(), count)
    lists = np.empty(places * len(which), np.uint16)
    images = max(1, _AT_ONCE // places)
    for start in range(0, len(which), images):
        pixels = bank.read(which[start : start + images])
        along = F.conv2d(of_region.strip(pixels), filters[:to_lists]) - (directions[:to_lists] @ origin)[:, None, None]
        searched = along.permute(0, 2, 3, 1).reshape(-1, to_lists).contiguous().numpy()
        first = start * places
        lists[first : first + len(searched)] = centres.nearest(searched)
        progress(len(pixels))
    return _arranged(bank, which, of_region, threads, lists, count, usable, origin, filters, step, generator)


def _usable(of_region: Windows) -> list[int]:
    """How many directions windows have that overhang by 1, 2 ..: a byte of the tail holds four."""
    seen = [int(of_region.seen(overhang).sum()) for overhang in range(1, of_region.overhangs + 1)]
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
    return [LEADING + 4 * (of_all + sum(given[overhang:])) for overhang in range(of_region.overhangs)]


def _directions(windows: Tensor, of_region: Windows) -> tuple[Tensor, list[int]]:
    """Orthonormal directions (D, C * rows * columns) of windows (n, the same) less their mean, and how many of them lie
    in what is on the image of windows that overhang by 1, 2 ..; rows of zeros fill up.

    For the largest overhang these are the principal directions of what is on the image; then, for each that is smaller,
    those of what they leave of a line more.
    """
    overhangs = of_region.overhangs
    usable = _usable(of_region)
    found = windows.new_zeros(usable[0], windows.shape[1])
    have = 0
    for overhang in range(overhangs, 0, -1):
        wanted, seen = usable[overhang - 1], of_region.seen(overhang).flatten()
        if wanted == have:
            continue
        left = windows * seen
        left = left - left @ found[:have].T @ found[:have]
        values, vectors = torch.linalg.eigh(left.T @ left)
        new = vectors.T.flip(0)[: wanted - have]
        new = new - new @ found[:have].T @ found[:have]  # where nothing is left, any direction is as good
        kept = values.flip(0)[: len(new)] > 1e-6 * values[-1].clamp(min=1e-30)
        found[have : have + len(new)] = torch.where(kept[:, None], F.normalize(new), 0) * seen
        have = wanted
    return found, usable


class _Centres:
    """Centres of lists, in groups: k-means of some points (n, d) float32, and then of those of each group. The nearest
    is looked for in the nearest group alone, which takes a small part of the comparisons with all."""

    def __init__(self, points: npt.NDArray[np.float32], count: int) -> None:
        import faiss

        def trained(points: npt.NDArray[np.float32], count: int) -> Any:
            found = faiss.Kmeans(points.shape[1], count, niter=10, seed=_SEED, min_points_per_centroid=1)
            found.train(points)
            return found.index

        self._groups = trained(points, groups := math.isqrt(count))
        of_points = self._groups.search(points, 1)[1][:, 0]
        members = np.bincount(of_points, minlength=groups)
        sizes = 1 + (count - groups) * members // len(points)
        self._first = np.cumsum(sizes) - sizes
        self._centres = [
            trained(points[of_points == group], int(size)) if size > 1 else None for group, size in enumerate(sizes)
        ]

    def nearest(self, points: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        """The number of the centre for each of points (n, d) float32."""
        groups = self._groups.search(points, 1)[1][:, 0]
        found: npt.NDArray[np.uint16] = self._first[groups].astype(np.uint16)
        for group in np.unique(groups):
            if (centres := self._centres[group]) is not None:
                which = np.flatnonzero(groups == group)
                found[which] += centres.search(points[which], 1)[1][:, 0].astype(np.uint16)
        return found


def _arranged(
    bank: PatchBank,
    which: Tensor,
    of_region: Windows,
    threads: int,
    lists: npt.NDArray[np.uint16],
    count: int,
    usable: list[int],
    origin: Tensor,
    filters: Tensor,
    step: Tensor,
    generator: np.random.Generator,
) -> Lists:
    """Members list by list, each list at the beginning of a block, and their descriptions."""
    channels, height, width = bank.shape
    block, centres = LIST_BLOCK, of_region.centres()
    # Random order first, which a stable sort keeps within each list: its first members are then a fair sample of it.
    order = generator.permutation(len(lists))
    order = order[np.argsort(lists[order], kind="stable")]
    sizes = np.bincount(lists, minlength=count)
    ends = np.cumsum((sizes + block - 1) // block * block)
    begin = ends - (sizes + block - 1) // block * block
    at = np.repeat(begin - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(order))
    window = np.full(ends[-1], centres[0], np.int32)
    numbered = (which.numpy() * (height * width))[:, None] + centres
    window[at] = numbered.astype(np.int32).ravel()[order]
    members, directions = len(window), len(step)
    found = Lists(
        begin=torch.from_numpy(begin),
        end=torch.from_numpy(begin + sizes),
        window=torch.from_numpy(window),
        usable=torch.tensor(usable, dtype=torch.int32, device=CPU),
        origin=origin.reshape(channels, *of_region.size).contiguous(),
        directions=filters.contiguous(),
        mean=torch.empty(count, directions, dtype=torch.float32, device=CPU),
        spread=torch.empty(of_region.overhangs, count, dtype=torch.float32, device=CPU),
        lead=torch.zeros(members * LEADING, dtype=torch.int8, device=CPU),
        tail=torch.zeros(members * (directions - LEADING) // 4, dtype=torch.uint8, device=CPU),
        step=step,
    )
    describe_lists(bank.images, of_region.patch_size, threads, of_region.region, found.tensors())
    return found


def _some_windows(
    bank: PatchBank, which: Tensor, of_region: Windows, wanted: int, generator: np.random.Generator
) -> Tensor:
    """About so many windows of random images, (n, C * rows * columns), a few of each."""
    images = generator.permutation(len(which))[: min(len(which), 20_000)]
    each = max(8, -(-wanted // len(images)))
    parts = []
    values = math.prod(bank.shape) * of_region.patch_size**2  # of the windows of an image
    step = max(1, _VALUES_AT_ONCE // values)
    for start in range(0, len(images), step):
        pixels = bank.read(which[torch.from_numpy(images[start : start + step])])
        windows = F.unfold(of_region.strip(pixels), of_region.size)  # (n, C * rows * columns, places)
        some = generator.permutation(windows.shape[2])[:each]
        parts.append(windows[:, :, torch.from_numpy(some)].transpose(1, 2).reshape(-1, windows.shape[1]))
    return torch.cat(parts)
