"""Data sets by name or path, as banks: `pyels.datasets.load`."""

from __future__ import annotations

import hashlib
import http.client
import importlib.resources
import operator
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from PIL import Image
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.bank.file_images import Pixels, parse_bytes
from pyels.bank.pictures import Look, as_pixels, read_pictures, spread
from pyels.bank.published import CIFAR_ARCHIVES, CIFAR_FOLDERS, IDX, load_cifar10, load_idx, read_idx
from pyels.checks import warn
from pyels.files import replacing

__all__ = ["EMBEDDED", "NAMES", "from_pairs", "load", "read_idx", "where"]

EMBEDDED = "fashion-mnist-6000"
_IDX_NAMES = [name for packed in IDX.values() for name in (packed, packed.removesuffix(".gz"))]
_BATCHES = ("data_batch_1", "data_batch_1.bin", "test_batch", "test_batch.bin")
_CIFAR_NAMES = [*CIFAR_FOLDERS.values(), *CIFAR_ARCHIVES, *_BATCHES]


@dataclass(frozen=True)
class _Source:
    """Where a data set's files come from, their MD5 sums as the publishers give them, and what its classes are."""

    url: str
    md5: dict[str, str]
    classes: str
    folder: str = ""  # what torchvision calls its own, in which there is one of the name raw


_SOURCES = {
    "fashion-mnist": _Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        "T-shirt/top, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot",
        "FashionMNIST",
    ),
    "mnist": _Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "MNIST",
    ),
    "cifar10": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
    ),
}
NAMES = (EMBEDDED, *_SOURCES)


def load(
    name: str | Path,
    split: str = "train",
    root: str | Path | None = None,
    limit: int | None = None,
    size: int | None = None,
    memory_limit: int | str | None = None,
    *,
    crop: bool = False,
    mode: str | None = None,
    skip_unreadable: bool = False,
) -> PatchBank:
    """A data set as a bank.

    Parameters
    ----------
    name   "fashion-mnist-6000"  6,000 Fashion-MNIST training images, 600 a class, that come with the package
           "fashion-mnist", "mnist"  original idx files; "cifar10"  original binary or python batches
           a path  to a folder or zip of pictures, whose folders are classes; to a folder of idx files or CIFAR-10
                   batches; to a saved bank, npz or npy, as `PatchBank.load` says
    split  "train" or "test", of the named data sets, of folders with a folder for each, and of npz files that have both
    root   folder to look in first, such as torchvision's; then the system's `datasets/NAME` share folders and the
           user's cache are searched, and as a last resort the files are downloaded into the cache and their checksums
           compared
    limit  only the first so many images; where the images lie class after class, as many of each class
    size   resize images to size x size (bilinear, antialiased)
    memory_limit  bytes, or text such as "2GB", that the pixels may take in memory; a saved bank that takes more is
                  streamed, as `PatchBank.load` says. Everything else is read as a whole and has to fit
    crop   cut the largest square out of the middle of images that are resized, instead of squeezing them into one
    mode   "L", "RGB" or "RGBA": what pictures of several modes are brought to (1, 3 or 4 channels)
    skip_unreadable  leave out pictures that cannot be read, and warn how many they are

    Returns
    -------
    PatchBank of uint8 images (float32 where a bank file holds such), with labels and class names where the source has
    them

    Warns
    -----
    UserWarning  something in a folder of pictures is left out, or only one of several frames used

    Raises
    ------
    ValueError         unknown name or split, a damaged file (named), images of different sizes or modes or beyond the
                       memory limit
    FileNotFoundError  the data set is nowhere to be found and cannot be downloaded
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    for argument, value in (("limit", limit), ("size", size)):
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    limit, size = (None if value is None else operator.index(value) for value in (limit, size))
    look = Look(size, crop, mode)
    most = None if memory_limit is None else parse_bytes(memory_limit)
    path = Path(name).expanduser()
    pictures, check_memory = False, partial(_check_memory, name, most=most)
    if root is not None and name not in _SOURCES:
        raise ValueError(f"root is where {', '.join(_SOURCES)} are looked for; of {name}, give the whole path")
    if name == EMBEDDED:
        if split != "train":
            raise ValueError(f"{EMBEDDED} has only a train split, got split={split!r}; use 'fashion-mnist' for test")
        with importlib.resources.as_file(importlib.resources.files("pyels") / "data/fashion_mnist_6000.npz") as file:
            bank = PatchBank.load(file)
    elif name in _SOURCES:
        folders = search_folders(str(name), root)
        bank = _published(str(name), split, folders, partial(_download_into, str(name), folders))
    elif path.is_dir() and (kind := _kind_of(inside := [path, path / "raw"])) is not None:
        bank = _published(kind, split, inside, partial(_missing, path))
    elif path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
        pictures = True
        bank = PatchBank(*read_pictures(path, split, limit, look, skip_unreadable, check_memory))
    elif path.exists():
        bank = PatchBank.load(path, split, most)
    else:
        raise ValueError(f"data set {str(name)!r} is neither one of {', '.join(NAMES)} nor an existing path")
    if name in NAMES:
        bank.class_names = _SOURCES[str(name).removesuffix("-6000")].classes.split(", ")
    if not pictures and (mode is not None or skip_unreadable):
        raise ValueError(f"mode and skip_unreadable are for folders of pictures, which {name} is not")
    if limit is not None and limit < len(bank):
        bank = bank[spread(None if bank.labels is None else bank.labels.numpy(), len(bank), limit)]
    if size is not None and bank.shape[1:] != (size, size):
        check_memory(len(bank) * bank.shape[0] * size**2 * bank.dtype.itemsize)
        bank = _resized(bank, size, crop)
    if not bank.streamed:
        check_memory(bank.nbytes)
    bank.shared = False
    return bank


def _check_memory(name: str | Path, nbytes: int, most: int | None) -> None:
    if most is not None and nbytes > most:
        raise ValueError(
            f"{name}: {nbytes} bytes of pixels have to be in memory at once, more than the memory_limit of {most}; "
            "load it without one, save it with PatchBank.save, and load that file"
        )


def from_pairs(pairs: Iterable[tuple[Any, int]], limit: int | None = None) -> PatchBank:
    """A bank from an iterable of (image, label), such as a torchvision data set, whose class names are kept.

    Images may be PIL images, uint8 arrays (H, W) or (H, W, C), or torch tensors (C, H, W), uint8 or float32 in [-1, 1]
    (torchvision's ToTensor gives [0, 1]: leave it out, or follow it with Normalize(0.5, 0.5)).
    """
    images: list[Pixels] = []
    labels: list[int] = []
    for image, label in pairs:
        if limit is not None and len(images) == limit:
            break
        pixels = _pixels_of(image, len(images))
        if images and pixels.shape != images[0].shape:
            raise ValueError(f"image {len(images)} has shape {pixels.shape}, but the first has {images[0].shape}")
        images.append(pixels)
        try:
            labels.append(operator.index(label.item() if hasattr(label, "item") else label))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"the label of pair {len(labels)} must be an integer, got {label!r:.60}") from None
    if not images:
        raise ValueError("the iterable gave no images")
    names = getattr(pairs, "classes", None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        names = None
    elif limit is not None and len(set(labels)) < min(limit, len(names)) and labels == sorted(labels):
        warn(f"the first {limit} pairs are of {len(set(labels))} of {len(names)} classes; shuffle them before")
    return PatchBank(np.stack(images), np.asarray(labels, dtype=np.int64), names)


def _pixels_of(image: Any, number: int) -> Pixels:
    """(C, H, W)"""
    if isinstance(image, torch.Tensor):
        return image.numpy(force=True)
    if isinstance(image, Image.Image):
        return as_pixels(f"image {number}", image, Look())
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3):
        raise ValueError(f"image {number} must have shape (H, W) or (H, W, C), got {pixels.shape}")
    if pixels.ndim == 3 and pixels.shape[0] < pixels.shape[2]:
        raise ValueError(
            f"image {number}, an array of shape {pixels.shape}, looks like (C, H, W), but arrays are (H, W, C); give a "
            "torch tensor, or np.moveaxis(image, 0, -1)"
        )
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


# ---- Finding files -------------------------------------------------------------------------------------------------


def search_folders(name: str, root: str | Path | None = None) -> list[Path]:
    """Where the files of a named data set are looked for, in this order; the last is the cache for downloads."""
    given = []
    if root is not None:  # torchvision keeps them in ROOT/MNIST/raw
        root = Path(root).expanduser()
        given = [root, root / name, root / "raw", root / _SOURCES[name].folder / "raw"]
    shares = [*os.environ.get("XDG_DATA_DIRS", "").split(":"), "/usr/local/share", "/usr/share"]
    shared = [Path(share) / "datasets" / name for share in dict.fromkeys(filter(None, shares))]
    return [*given, *shared, Path(platformdirs.user_cache_dir("pyels")) / name]


def where(name: str) -> Path | None:
    """The folder in which a named data set's files are found, if any."""
    names = _CIFAR_NAMES if name == "cifar10" else _IDX_NAMES
    return next((folder for folder in search_folders(name) if _first([folder], names) is not None), None)


def _first(folders: list[Path], file_names: Iterable[str]) -> Path | None:
    """The first of the files, or folders, that is there."""
    file_names = list(file_names)
    return next(
        (
            folder / name
            for folder in folders
            for name in file_names
            if (file := folder / name).is_file() or file.is_dir()
        ),
        None,
    )


def _download_into(name: str, folders: list[Path], file_name: str) -> Path:
    """The file of a data set, which is in none of the folders, in the last of them."""
    source = _SOURCES[name]
    target = folders[-1] / file_name
    try:
        _download(source.url + file_name, target, source.md5[file_name])
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        looked = ", ".join(map(str, folders))
        raise FileNotFoundError(
            f"{name}: {file_name} is in none of {looked}, and cannot be downloaded ({error}); "
            f"pass root=, or use the embedded {EMBEDDED!r}"
        ) from error
    return target


def _download(url: str, target: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=30) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(target) as temporary,
            open(temporary, "wb") as file,
            tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as bar,
        ):
            while block := response.read(1 << 16):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
            if digest.hexdigest() != md5:
                raise ValueError(f"{url}: the download's MD5 is {digest.hexdigest()}, expected {md5}; try again")


# ---- Published data sets -------------------------------------------------------------------------------------------


def _kind_of(folders: list[Path]) -> str | None:
    """The name of the data set whose files, or files called the same, are in folders."""
    if _first(folders, _IDX_NAMES) is not None:
        return "mnist"
    return "cifar10" if _first(folders, _CIFAR_NAMES) is not None else None


def _published(name: str, split: str, folders: list[Path], fetch: Callable[[str], Path]) -> PatchBank:
    """From the files in folders; `fetch` gives one that is in none of them, or raises."""
    find = partial(_first, folders)
    if name == "cifar10":
        return PatchBank(*load_cifar10(split, find, fetch))
    wanted = [IDX[split, what] for what in ("images", "labels")]
    return PatchBank(*load_idx(*(find((one, one.removesuffix(".gz"))) or fetch(one) for one in wanted)))


def _missing(folder: Path, file_name: str) -> Path:
    raise FileNotFoundError(f"{folder}: {file_name} is not there, though other files of its data set are")


def _resized(bank: PatchBank, size: int, crop: bool) -> PatchBank:
    if bank.latents is not None:
        raise ValueError(
            f"latents are {bank.shape[1]}x{bank.shape[2]}, and not resized: resize the pictures that are encoded"
        )
    _, height, width = bank.shape
    side = min(height, width)
    top, left = ((height - side) // 2, (width - side) // 2) if crop else (0, 0)
    bottom, right = (top + side, left + side) if crop else (height, width)
    parts = [
        torch.nn.functional.interpolate(
            part[..., top:bottom, left:right], size=(size, size), mode="bilinear", antialias=True
        )
        for part in bank.pieces()
    ]
    return PatchBank(torch.cat(parts), bank.labels, bank.class_names)
