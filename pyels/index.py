"""Lists of similar windows: what the approximate engine looks into.

Every window of a bank belongs to one inverted list, that of the nearest of some thousand centres, which k-means finds
among the leading principal directions of the windows (faiss, Douze et al., arXiv 2401.08281). Within its list the
windows are in random order, so that the first few are a fair sample of it. The index holds no pixels: of each window
only the image and the place, of each list the mean window and how far its windows lie from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from pyels import _core
from pyels.bank import PatchBank
from pyels.files import write_tensors

VERSION = 1
MOST_LISTS = 4096
DIRECTIONS = 32
_TRAINING_WINDOWS_A_LIST = 64
_CHUNK = 1 << 20  # windows assigned to lists at a time
SEED = 20250713


@dataclass(frozen=True)
class Index:
    """The lists over the k x k windows of some images of a bank; see struct Lists in csrc/pyels.h.

    Attributes
    ----------
    begin, end  (L)           int64    first member of each list, and the one behind its last
    image       (M)           int32    image of the window, numbered as in the bank
    place       (M)           uint16   its centre, row * W + column
    origin      (C, k, k)     float32  mean window
    directions  (D, C, k, k)  float32  leading principal directions
    mean        (L, C, k, k)  float32  of the windows of a list, in [-1, 1]
    spread      (L)           float32  mean squared distance of the windows from that mean
    code        (M * D)       int8     coordinates of the windows along the directions, in units of `step`
    norm, rest  (M)           float32  squared length of these, and of what they leave
    step        ()            float32
    """

    begin: Tensor
    end: Tensor
    image: Tensor
    place: Tensor
    origin: Tensor
    directions: Tensor
    mean: Tensor
    spread: Tensor
    code: Tensor
    norm: Tensor
    rest: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def megabytes(self) -> float:
        return sum(getattr(self, f.name).nbytes for f in fields(self)) / 1e6

    def arguments(self) -> dict[str, Any]:
        """What the compiled engine takes."""
        return {
            "list_count": len(self),
            "list_directions": len(self.directions),
            "list_step": float(self.step),
            "lists": [getattr(self, f.name).data_ptr() for f in fields(self) if f.name != "step"],
        }

    def save(self, path: str | Path, about: dict[str, Any]) -> None:
        """Write the lists, with what they were built from, to a temporary name first."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        write_tensors(path, tensors, {"pyels-index": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, about: dict[str, Any]) -> Index:
        """Map the lists into memory. Raises ValueError where they were built from something else than `about` says, or
        are damaged."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                before = json.loads((file.metadata() or {})["pyels-index"])
                tensors = {f.name: file.get_tensor(f.name) for f in fields(cls)}
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a readable index ({error}); delete it to have it built again") from error
        for key, value in about.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{path}: this index was built for {key} = {before.get(key)}, but this bank has {value}; delete it "
                    "to have it built again, or give another folder for indexes"
                )
        return cls(**tensors)


def number_of_lists(windows: int) -> int:
    return max(1, min(MOST_LISTS, windows // 256))


def windows_per_image(shape: tuple[int, int, int], patch_size: int, wraps: bool) -> int:
    _, height, width = shape
    return height * width if wraps else (height - patch_size + 1) * (width - patch_size + 1)


def build(
    bank: PatchBank,
    which: Tensor,
    patch_size: int,
    wraps: bool,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Sort the windows of the images `which` into lists.

    Parameters
    ----------
    which       (n,) int64 image numbers
    patch_size  window size k, odd
    wraps       all H * W windows, wrapped around; otherwise those that lie wholly inside
    progress    called with the number of images done, and of all
    """
    import faiss

    shape = bank.shape
    places = windows_per_image(shape, patch_size, wraps)
    count = number_of_lists(places * len(which))
    generator = np.random.default_rng(SEED)
    mean, directions, centres = _train(bank, which, patch_size, wraps, places, count, threads, generator)
    quantizer = faiss.IndexFlatL2(directions.shape[1])
    quantizer.add(centres)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        lists = np.empty(places * len(which), np.uint16)
        step = max(1, _CHUNK // places)
        for start in range(0, len(which), step):
            some = _project(bank.read(which[start : start + step]), mean, directions, patch_size, wraps)
            lists[start * places : start * places + len(some)] = quantizer.search(some, 1)[1][:, 0]
            progress(min(start + step, len(which)), len(which))
    finally:
        faiss.omp_set_num_threads(before)
    # Random order first, which a stable sort by list keeps within each: the first members are a fair sample of a list.
    order = generator.permutation(len(lists))
    order = order[np.argsort(lists[order], kind="stable")]
    sizes = np.bincount(lists, minlength=count)
    image = which.numpy().astype(np.int32)[order // places]
    inside = np.arange(places) if wraps else _inside(*shape[1:], patch_size)
    place = inside.astype(np.uint16)[order % places]
    return arrange(bank, patch_size, threads, sizes, image, place, mean, directions)


BLOCK = 16


def arrange(bank, patch_size, threads, sizes, image, place, origin, directions):
    """The index of members given list by list."""
    count, k = len(sizes), patch_size
    padded = (sizes + BLOCK - 1) // BLOCK * BLOCK
    begin = np.concatenate([[0], np.cumsum(padded)[:-1]])
    total = int(padded.sum())
    at = np.repeat(begin - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(len(image))
    images, placed = np.zeros(total, np.int32), np.full(total, place[0], np.uint16)
    images[at], placed[at] = image, place
    shape = (bank.shape[0], k, k)
    d = directions.shape[1]
    filled = torch.zeros((d + 1) // 2 * 2, *shape)
    filled[:d] = directions.T.reshape(d, *shape)
    windows = torch.tensor(0.0)
    step = torch.tensor(2.0 * math.sqrt(float(np.prod(shape))) / 127)
    index = Index(
        begin=torch.from_numpy(begin), end=torch.from_numpy(begin + sizes), image=torch.from_numpy(images),
        place=torch.from_numpy(placed), origin=origin.reshape(shape).contiguous(), directions=filled,
        mean=torch.empty(count, *shape), spread=torch.empty(count),
        code=torch.zeros(total * len(filled), dtype=torch.int8), norm=torch.zeros(total), rest=torch.zeros(total),
        step=step,
    )
    _core.describe_lists(
        pixels=bank.images.data_ptr(), is_uint8=bank.images.dtype == torch.uint8, bank_shape=list(bank.images.shape),
        patch_size=k, threads=threads, **index.arguments(),
    )
    return index


def _inside(height: int, width: int, k: int) -> np.ndarray:
    r = k // 2
    return (np.arange(r, height - r)[:, None] * width + np.arange(r, width - r)).ravel()


def _train(bank, which, patch_size, wraps, places, count, threads, generator):
    import faiss
    wanted = max(4096, count * _TRAINING_WINDOWS_A_LIST)
    images = min(len(which), max(1, 4 * wanted // places), 20000)
    chosen = np.sort(generator.choice(len(which), images, replace=False))
    pixels = bank.read(which[torch.from_numpy(chosen)])
    k = patch_size
    rows = []
    # same places of every image? random windows
    windows = F.unfold(F.pad(pixels, (k//2,)*4, mode="circular") if wraps else pixels, k)  # (n, Ckk, places)
    windows = windows.transpose(1, 2).reshape(-1, pixels.shape[1] * k * k)
    windows = windows[torch.from_numpy(generator.permutation(len(windows))[:wanted])]
    mean = windows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(windows.T))
    directions = vectors.flip(1)[:, :DIRECTIONS].contiguous()
    kmeans = faiss.Kmeans(directions.shape[1], count, niter=10, seed=SEED, min_points_per_centroid=1, max_points_per_centroid=1000)
    kmeans.train(((windows - mean) @ directions).numpy())
    return mean, directions, kmeans.centroids


def _project(pixels, mean, directions, k, wraps):
    channels = pixels.shape[1]
    filters = directions.T.reshape(-1, channels, k, k)
    if wraps:
        pixels = F.pad(pixels, (k // 2,) * 4, mode="circular")
    out = F.conv2d(pixels, filters) - (directions.T @ mean)[:, None, None]
    return np.ascontiguousarray(out.permute(0, 2, 3, 1).reshape(-1, out.shape[1]).numpy())
