"""Lists of similar windows: what engine "sampled" looks into.

Every window of a bank belongs to one inverted list, that of the nearest of some thousand centres, which k-means finds
among the coordinates of windows along their leading principal directions (faiss, Douze et al., arXiv 2401.08281). The
index holds no pixels. Of each window it holds its number, its coordinates along the leading directions in 8 bits, and
those along further ones in 2, in at most 30 bytes: enough to tell about how far a query is from it. Exact distances are
computed from the images.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
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
_LIST_DIRECTIONS = 24  # the leading ones, along which windows are sorted into lists
MOST_WINDOWS = 2**31 - 2**20  # numbered in 32 bits, wherever they are; with what fills up the blocks of lists
LEAST_MEMBERS = 256  # of a list, on average
TRAINING_WINDOWS = 64  # a list
_AT_ONCE = 1 << 20  # windows assigned to lists
_VALUES_AT_ONCE = 1 << 24  # of windows to learn from
_ROOM = 1.2  # codes of 8 bits reach so much further than the coordinates that directions are learned from
_STEP = 1.1  # of codes of 2 bits, in standard deviations: of least squared error for a Laplace distribution
_SEED = 20250713
_VERSION = 5
_KEY = "pyels-index"
_RECORD = {
    "version": range(1 << 31),
    "lists": range(1 << 31),
    "seconds": float,
    "megabytes": float,
    "patch_size": range(1 << 31),
}


@dataclass(frozen=True)
class Index:
    """The lists over the k x k windows of some images of a bank: struct Lists of csrc/sampled/engine.h, which see.

    Attributes
    ----------
    begin, end  (L)           int64    first member of each list, and the one behind its last
    window      (M)           int32    number of the window: image * H * W + row * W + column of its centre
    origin      (C, k, k)     float32  mean window
    directions  (D, C, k, k)  float32  principal directions, LEADING of them leading
    mean        (L, D)        float32  mean coordinates of the windows of each list
    spread      (L)           float32  mean squared distance of its windows from that point
    lead        (M * LEADING) int8     coordinates of the windows along the leading directions, in units of `step`
    tail        (M * (D - LEADING) / 4) uint8  along the others, in 2 bits
    step        (D)           float32
    """

    begin: Tensor
    end: Tensor
    window: Tensor
    origin: Tensor
    directions: Tensor
    mean: Tensor
    spread: Tensor
    lead: Tensor
    tail: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def fault(self, images: int, shape: tuple[int, int, int], patch_size: int, wraps: bool) -> str | None:
        """What in it the compiled engine, which trusts it, would stumble over; None: nothing."""
        channels, height, width = shape
        members, lists, directions = len(self.window), len(self), len(self.directions)
        of_window, floats = (channels, patch_size, patch_size), torch.float32
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "begin": (torch.int64, (lists,)),
            "end": (torch.int64, (lists,)),
            "window": (torch.int32, (members,)),
            "origin": (floats, of_window),
            "directions": (floats, (directions, *of_window)),
            "mean": (floats, (lists, directions)),
            "spread": (floats, (lists,)),
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
        ends = torch.cat([torch.zeros(1, dtype=torch.int64, device=CPU), self.end])
        in_order = bool((self.begin >= ends[:-1]).all() and (self.end >= self.begin).all() and ends[-1] >= 1)
        whole_blocks = bool((self.begin % LIST_BLOCK == 0).all()) and members % LIST_BLOCK == 0
        if not (in_order and whole_blocks and int(ends[-1]) <= members):
            return "its lists overlap, or reach beyond its members"
        if not (self.step[:LEADING] == self.step[0]).all() or not (self.step > 0).all():
            return "its steps differ, or are 0"
        if not 0 <= int(self.window.min()) <= int(self.window.max()) < images * height * width:
            return "it names images that the bank has not"
        r = 0 if wraps else patch_size // 2
        for at, length in ((self.window // width % height, height), (self.window % width, width)):
            if not r <= int(at.min()) <= int(at.max()) < length - r:
                return "it names windows that reach beyond the border"
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


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
    wraps       all H * W windows, wrapped around; otherwise those that lie wholly inside
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
                seconds, megabytes = time.perf_counter() - started, index.nbytes / 1e6
                built = {"lists": len(index), "seconds": round(seconds, 1), "megabytes": round(megabytes, 1)}
                bank.check_unchanged()
                write_tensors(path, index.tensors(), {_KEY: json.dumps({**about, **built})})
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
    try:
        stamp = Stamp.of(path)
        file = TensorFile.read(path, mapped=True)
        if not file.has_checksum:
            raise ValueError("it has no checksum")
        index = Index(**{f.name: file.tensors[f.name] for f in fields(Index)})
        fault = index.fault(images, shape, about["patch_size"], about["wraps"])
    except (KeyError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ValueError(f"{path}: damaged index ({fault}); delete it to have it built again")
    for tensor in index.tensors().values():
        guard(tensor, index)
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
    inside = (height - patch_size + 1) * (width - patch_size + 1)
    places = height * width if wraps else inside
    if (numbered := height * width * len(bank)) > MOST_WINDOWS:
        raise ValueError(
            f"the bank's images have {numbered} pixels, and an index numbers at most {MOST_WINDOWS}; split the bank "
            "and merge the partial posteriors of its parts"
        )
    threads = 1 if checks.forked else threads
    count = lists_of(places * len(which))
    generator = np.random.default_rng(_SEED)
    windows = _some_windows(bank, which, patch_size, wraps, count * TRAINING_WINDOWS, generator)
    origin = windows.mean(0)
    windows -= origin
    directions = torch.linalg.eigh(windows.T @ windows).eigenvectors.flip(1)[:, :MOST_DIRECTIONS]
    coordinates = windows @ directions
    lead, tail = coordinates[:, :LEADING], coordinates[:, LEADING:]
    steps = [(_ROOM * lead.abs().max() / 127).expand(LEADING), _STEP * tail.square().mean(0).sqrt()]
    step = F.pad(torch.cat(steps), (0, -tail.shape[1] % 4)).clamp(min=1e-6)  # rows of zeros fill up
    filters = directions.T.reshape(-1, bank.shape[0], patch_size, patch_size)
    to_lists = filters[:_LIST_DIRECTIONS]
    leading = directions[:, :_LIST_DIRECTIONS]
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        centres = _Centres(coordinates[:, :_LIST_DIRECTIONS].contiguous().numpy(), count)
        lists = np.empty(places * len(which), np.uint16)
        images = max(1, _AT_ONCE // places)
        for start in range(0, len(which), images):
            pixels = bank.read(which[start : start + images])
            along = F.conv2d(_padded(pixels, patch_size, wraps), to_lists) - (origin @ leading)[:, None, None]
            searched = along.permute(0, 2, 3, 1).reshape(-1, len(to_lists)).contiguous().numpy()
            first = start * places
            lists[first : first + len(searched)] = centres.nearest(searched)
            progress(len(pixels))
    finally:
        faiss.omp_set_num_threads(before)
    return _arranged(bank, which, patch_size, wraps, threads, lists, count, origin, filters, step, generator)


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
    patch_size: int,
    wraps: bool,
    threads: int,
    lists: npt.NDArray[np.uint16],
    count: int,
    origin: Tensor,
    filters: Tensor,
    step: Tensor,
    generator: np.random.Generator,
) -> Index:
    """Members list by list, each list at the beginning of a block, and their descriptions."""
    channels, height, width = bank.shape
    r, k, block = patch_size // 2, patch_size, LIST_BLOCK
    everywhere = np.arange(height * width, dtype=np.int32).reshape(height, width)
    centres = (everywhere if wraps else everywhere[r : height - r, r : width - r]).ravel()
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
    padded = torch.zeros(directions, channels, k, k, dtype=torch.float32, device=CPU)
    padded[: len(filters)] = filters
    index = Index(
        begin=torch.from_numpy(begin),
        end=torch.from_numpy(begin + sizes),
        window=torch.from_numpy(window),
        origin=origin.reshape(channels, k, k).contiguous(),
        directions=padded,
        mean=torch.empty(count, directions, dtype=torch.float32, device=CPU),
        spread=torch.empty(count, dtype=torch.float32, device=CPU),
        lead=torch.zeros(members * LEADING, dtype=torch.int8, device=CPU),
        tail=torch.zeros(members * (directions - LEADING) // 4, dtype=torch.uint8, device=CPU),
        step=step,
    )
    describe_lists(bank.images, k, threads, index.tensors())
    return index


def _some_windows(
    bank: PatchBank, which: Tensor, patch_size: int, wraps: bool, wanted: int, generator: np.random.Generator
) -> Tensor:
    """About so many windows of random images, (n, C * k * k), a few of each."""
    images = generator.permutation(len(which))[: min(len(which), 20_000)]
    each = max(8, -(-wanted // len(images)))
    parts = []
    values = math.prod(bank.shape) * patch_size**2  # of the windows of an image
    step = max(1, _VALUES_AT_ONCE // values)
    for start in range(0, len(images), step):
        pixels = bank.read(which[torch.from_numpy(images[start : start + step])])
        windows = F.unfold(_padded(pixels, patch_size, wraps), patch_size)  # (n, C * k * k, places)
        some = generator.permutation(windows.shape[2])[:each]
        parts.append(windows[:, :, torch.from_numpy(some)].transpose(1, 2).reshape(-1, windows.shape[1]))
    return torch.cat(parts)


def _padded(pixels: Tensor, patch_size: int, wraps: bool) -> Tensor:
    return F.pad(pixels, (patch_size // 2,) * 4, mode="circular") if wraps else pixels
