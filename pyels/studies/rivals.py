"""Ways to evaluate ELS, exact and approximate, behind one signature: what `pyels scaling` holds side by side.

exact    engine "cpu"
sampled  engine "sampled" at a tolerance
subset   engine "cpu" on a random share of the images
top      vector search as it is commonly used: the nearest so many windows that an inverted file of compressed
        windows finds, weighed by their exact distances as if there were no others. With boundary "zeros" only for
        pixels whose window lies wholly inside
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.definition import Definition
from pyels.engines import Sampled
from pyels.engines.index.building import can_build
from pyels.engines.index.file import describe
from pyels.engines.index.learning import TRAINING_WINDOWS
from pyels.machines import ELS
from pyels.posterior import Want
from pyels.sampling import Level
from pyels.studies.alternatives import windows

# (x, level, value of the method) -> mean (1, C, h, w) of the central h x w pixels, all where they are not said to be
# fewer, and half the 95% interval that is stated for each (1, h, w), infinite where none is.
Evaluation = Callable[[Tensor, Level, float], tuple[Tensor, Tensor]]

# Bytes a window that the building of an index in memory takes at its peak, from a million windows on.
BUILDING = {"top": 100}

_TOP_DIRECTIONS = 32
_TOP_LISTS = 4096
_LEAST_MEMBERS = 256  # of a list, on average
_TOP_LISTS_SEARCHED = 16
_COMPRESSED_AT_ONCE = 1 << 18  # windows
_GATHERED_AT_ONCE = 1 << 22  # values of windows that were found


@dataclass(frozen=True)
class Method:
    """`value`: the tolerance of sampled, the share of the images of subset, the number of windows of top."""

    kind: str
    value: float = 0

    @property
    def name(self) -> str:
        return self.kind if self.kind == "exact" else f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class Prepared:
    """A kind of method, ready for one bank and patch size at all values; bytes and build time of its index, if any."""

    evaluate: Evaluation
    index_bytes: float = 0
    index_seconds: float = 0


def prepare(kind: str, bank: PatchBank, boundary: str, patch_size: int, threads: int, folder: Path) -> Prepared:
    """Make a kind of method ready; `folder` is for its files, which it goes on using."""
    return _PREPARE[kind](bank, boundary, patch_size, threads, folder)


def left_out(method: Method, images: int, shape: tuple[int, int, int], boundary: str, k: int, limit: int) -> str | None:
    """Why a method is not to be used on so many images (C, H, W) within `limit` bytes; None: it is."""
    if method.kind in ("sampled", "top") and not can_build():
        return "faiss is not installed: pip install pyels[faiss]"
    if method.kind not in BUILDING:
        return None
    _, height, width = shape
    if not Definition(sources=boundary).bank_wraps:
        height, width = height - k + 1, width - k + 1
    if min(height, width) < 1:
        return f"no window of size {k} lies inside an image"
    needed = BUILDING[method.kind] * images * height * width
    if needed <= limit:
        return None
    return f"building its index for k = {k} takes {needed / 1e9:.1f} GB, more than the {limit / 1e9:.1f} GB allowed"


def _exact(bank: PatchBank, boundary: str, k: int, threads: int, folder: Path) -> Prepared:
    return Prepared(_by_machine(ELS(bank, k, boundary, threads=threads)))


def _subset(bank: PatchBank, boundary: str, k: int, threads: int, folder: Path) -> Prepared:
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    machines: dict[float, Evaluation] = {}

    def evaluate(x: Tensor, level: Level, share: float) -> tuple[Tensor, Tensor]:
        if share not in machines:
            chosen = order[: max(1, round(share * len(bank)))].sort().values
            machines[share] = _by_machine(ELS(PatchBank(bank.images[chosen]), k, boundary, threads=threads))
        return machines[share](x, level, share)

    return Prepared(evaluate)


def _sampled(bank: PatchBank, boundary: str, k: int, threads: int, folder: Path) -> Prepared:
    machine = ELS(bank, k, boundary, "sampled", threads, index=folder)
    machine.denoise(torch.zeros(1, *bank.shape), 1.0, 1.0, tolerance=1.0)  # builds the index, if there is any
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Prepared(_by_machine(machine), size, sum(built["seconds"] for built in describe(folder)))


def _by_machine(machine: ELS) -> Evaluation:
    def evaluate(x: Tensor, level: Level, value: float) -> tuple[Tensor, Tensor]:
        tolerance = value if isinstance(machine.engine, Sampled) else None
        part = machine.partial(machine.query(x, level.alpha, level.sigma, tolerance=tolerance), Want.MEAN)
        error, certified = part.error()
        return part.mean(), error.masked_fill(certified, torch.inf)

    return evaluate


def _top(bank: PatchBank, boundary: str, k: int, threads: int, folder: Path) -> Prepared:
    import faiss

    channels, height, width = bank.shape
    definition = Definition(sources=boundary)
    bank_wraps, query_wraps = definition.bank_wraps, definition.wraps
    r = k // 2
    rows, columns = (height, width) if bank_wraps else (height - k + 1, width - k + 1)
    places = rows * columns

    def flat_windows(images: Tensor, wraps: bool) -> Tensor:
        return windows(F.pad(images, (r,) * 4, mode="circular") if wraps else images, k).flatten(1)

    started = time.perf_counter()
    lists = max(1, min(_TOP_LISTS, places * len(bank) // _LEAST_MEMBERS))
    directions = min(_TOP_DIRECTIONS, channels * k * k)
    search = faiss.index_factory(channels * k * k, f"PCA{directions},IVF{lists},SQ8")
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    search.train(flat_windows(bank.read(order[: -(-lists * TRAINING_WINDOWS // places)]), bank_wraps).numpy())
    step = max(1, _COMPRESSED_AT_ONCE // places)
    with tqdm(total=len(bank), desc=f"top: index k={k}", unit="image", leave=False) as bar:
        for start in range(0, len(bank), step):
            images = bank.read(slice(start, start + step))
            search.add(flat_windows(images, bank_wraps).numpy())
            bar.update(len(images))
    inverted = faiss.extract_index_ivf(search)
    inverted.nprobe = _TOP_LISTS_SEARCHED

    def gather(found: Tensor) -> Tensor:
        """Windows by their numbers: (n,) -> (n, k, k, C)."""
        image, place = found // places, found % places
        corner = -r if bank_wraps else 0
        row = (place // columns + corner)[:, None] + torch.arange(k)
        column = (place % columns + corner)[:, None] + torch.arange(k)
        pixels = bank.images.permute(0, 2, 3, 1)[
            image[:, None, None], row[:, :, None] % height, column[:, None, :] % width
        ]
        return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels

    def evaluate(x: Tensor, level: Level, top: float) -> tuple[Tensor, Tensor]:
        queries = flat_windows(x, query_wraps)
        found = torch.from_numpy(search.search((queries / max(level.alpha, 1e-6)).numpy(), int(top))[1])
        queries = queries.reshape(-1, 1, channels, k, k).permute(0, 1, 3, 4, 2)
        at_once = max(1, _GATHERED_AT_ONCE // (int(top) * channels * k * k))
        means = []
        for query, numbers in zip(torch.split(queries, at_once), torch.split(found, at_once), strict=True):
            patches = gather(numbers.clamp(min=0).flatten()).reshape(*numbers.shape, k, k, channels)
            distances = (query - level.alpha * patches).square().sum((2, 3, 4))
            missing = (numbers < 0) & (numbers >= 0).any(1, keepdim=True)  # fewer were found; or none: then any window
            log_w = (distances / (-2 * level.sigma**2)).masked_fill(missing, -torch.inf)
            means.append((log_w.softmax(1)[:, :, None] * patches[:, :, r, r]).sum(1))
        pixels = (height, width) if query_wraps else (rows, columns)
        return torch.cat(means).T.reshape(1, channels, *pixels), torch.full((1, *pixels), torch.inf)

    seconds = time.perf_counter() - started
    return Prepared(evaluate, search.ntotal * (inverted.code_size + 8), seconds)


_PREPARE = {"exact": _exact, "sampled": _sampled, "subset": _subset, "top": _top}
KINDS = tuple(_PREPARE)
