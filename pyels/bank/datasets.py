"""Named data sets and files -> PatchBank."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.resources
import io
import os
import pickle
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.bank.file_images import parse_bytes
from pyels.files import replacing

Pixels = np.ndarray[Any, Any]
Pair = tuple[Pixels, Pixels]  # images (N, C, H, W) uint8, labels (N,) int64

EMBEDDED = "fashion-mnist-6000"
_IMAGE_MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "RGBA": "RGBA"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class _Source:
    """Where a data set's files come from, and their MD5 sums as the publishers give them."""

    url: str
    md5: dict[str, str]


_IDX = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}
_SOURCES = {
    "fashion-mnist": _Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "mnist": _Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "cifar10": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
}
_CIFAR_FOLDERS = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}
NAMES = (EMBEDDED, *_SOURCES)


def load(
    name: str | Path,
    split: str = "train",
    root: str | Path | None = None,
    limit: int | None = None,
    size: int | None = None,
    memory_limit: int | str | None = None,
) -> PatchBank:
    """A data set as a bank.

    Parameters
    ----------
    name   "fashion-mnist-6000"  6,000 Fashion-MNIST training images, 600 a class, that come with the package
           "fashion-mnist", "mnist"  original idx files; "cifar10"  original binary or python batches
           a path  to an image folder (subfolders are classes), to a saved bank or npz with `images` (N, C, H, W) and
                   `labels` (N,), or `train_images`, `train_labels` and so on, or to an npy of images
    split  "train" or "test", of the named data sets and of npz files that have both
    root   folder to look in first; then the system's `datasets/NAME` share folders and the user's cache are searched,
           and as a last resort the files are downloaded into the cache and their checksums compared
    limit  only the first so many images
    size   resize images to size x size (bilinear, antialiased)
    memory_limit  bytes, or text such as "2GB", that the pixels may take in memory; a saved bank that takes more is
                  streamed, as `PatchBank.load` says. Everything else is read as a whole and has to fit

    Returns
    -------
    PatchBank of uint8 images (float32 where a bank file holds such), with labels where the source has them

    Raises
    ------
    ValueError         unknown name or split, a damaged file (named), images of different sizes or beyond the memory
                       limit
    FileNotFoundError  the data set is nowhere to be found and cannot be downloaded
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    for argument, value in (("limit", limit), ("size", size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    most = None if memory_limit is None else parse_bytes(memory_limit)
    if name == EMBEDDED:
        if split != "train":
            raise ValueError(f"{EMBEDDED} has only a train split, got split={split!r}; use 'fashion-mnist' for test")
        with importlib.resources.as_file(importlib.resources.files("pyels") / "data/fashion_mnist_6000.npz") as path:
            bank = PatchBank.load(path)
    elif name in ("fashion-mnist", "mnist"):
        bank = PatchBank(*_load_idx(str(name), split, root))
    elif name == "cifar10":
        bank = PatchBank(*_load_cifar10(split, root))
    elif Path(name).is_dir():
        bank = _load_folder(Path(name), limit, size)
    elif Path(name).exists():
        bank = PatchBank.load(name, split, most)
    else:
        raise ValueError(f"data set {str(name)!r} is neither one of {', '.join(NAMES)} nor an existing path")
    if limit is not None:
        bank = bank[:limit]
    if size is not None and bank.shape[1:] != (size, size):
        _check_memory(name, len(bank) * bank.shape[0] * size**2 * bank.dtype.itemsize, most)
        bank = _resized(bank, size)
    if not bank.streamed:
        _check_memory(name, bank.nbytes, most)
    return bank


def _check_memory(name: str | Path, nbytes: int, most: int | None) -> None:
    if most is not None and nbytes > most:
        raise ValueError(
            f"{name}: {nbytes} bytes of pixels have to be in memory at once, more than the memory_limit of {most}; "
            "load it without one, save it with PatchBank.save, and load that file"
        )


def from_pairs(pairs: Iterable[tuple[Any, int]], limit: int | None = None) -> PatchBank:
    """A bank from an iterable of (image, label), such as a torchvision data set.

    Images may be PIL images, uint8 arrays (H, W) or (H, W, C), or torch tensors (C, H, W), uint8 or float32 in [-1, 1]
    (torchvision's ToTensor gives [0, 1]: leave it out, or follow it with Normalize(0.5, 0.5)).
    """
    images: list[Pixels] = []
    labels: list[int] = []
    for image, label in pairs:
        if limit is not None and len(images) == limit:
            break
        if isinstance(image, torch.Tensor):
            pixels = image.numpy()
        else:
            pixels = np.asarray(image)
            pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        if images and pixels.shape != images[0].shape:
            raise ValueError(f"image {len(images)} has shape {pixels.shape}, but the first has {images[0].shape}")
        images.append(pixels)
        labels.append(int(label))
    if not images:
        raise ValueError("the iterable gave no images")
    return PatchBank(np.stack(images), np.asarray(labels, dtype=np.int64))


def read_idx(path: str | Path) -> Pixels:
    """The array in an idx file of unsigned bytes, gzipped or not. Raises ValueError naming a damaged file."""
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{path}: truncated idx file, the header is cut off")
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path}: truncated or overlong idx file, {len(content) - header} bytes of data for shape {tuple(shape)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# ---- Finding files -------------------------------------------------------------------------------------------------


def search_folders(name: str, root: str | Path | None = None) -> list[Path]:
    """Where the files of a named data set are looked for, in this order; the last is the cache for downloads."""
    given = [Path(root), Path(root) / name] if root is not None else []
    shares = [*os.environ.get("XDG_DATA_DIRS", "").split(":"), "/usr/local/share", "/usr/share"]
    shared = [Path(share) / "datasets" / name for share in dict.fromkeys(filter(None, shares))]
    return [*given, *shared, Path(platformdirs.user_cache_dir("pyels")) / name]


def where(name: str) -> Path | None:
    """The folder in which a named data set's files are found, if any."""
    stems = [n.removesuffix(".gz") for n in _SOURCES[name].md5] if name != "cifar10" else ["cifar-10-python.tar.gz"]
    names = [*_SOURCES[name].md5, *stems, *_CIFAR_FOLDERS.values()]
    for folder in search_folders(name):
        if any((folder / file_name).exists() for file_name in names):
            return folder
    return None


def _find(name: str, file_names: Iterable[str], root: str | Path | None) -> Path | None:
    """The first of the files that exists in a search folder."""
    file_names = list(file_names)
    for folder in search_folders(name, root):
        for file_name in file_names:
            if (folder / file_name).is_file():
                return folder / file_name
    return None


def _find_or_download(name: str, file_name: str, root: str | Path | None) -> Path:
    found = _find(name, (file_name, file_name.removesuffix(".gz")), root)
    if found is not None:
        return found
    folders = search_folders(name, root)
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


# ---- Formats -------------------------------------------------------------------------------------------------------


def _load_idx(name: str, split: str, root: str | Path | None) -> Pair:
    image_file = _find_or_download(name, _IDX[split, "images"], root)
    label_file = _find_or_download(name, _IDX[split, "labels"], root)
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.shape != (len(images),):
        raise ValueError(f"{image_file} and {label_file} do not belong together: {images.shape} and {labels.shape}")
    return images[:, None], labels.astype(np.int64)


def _load_cifar10(split: str, root: str | Path | None) -> Pair:
    """Binary batches (records of a label byte and 3,072 pixels) or python batches, unpacked or in their archive."""
    numbers = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for folder, suffix, parse in (
        (_CIFAR_FOLDERS["binary"], ".bin", _parse_cifar_binary),
        (_CIFAR_FOLDERS["python"], "", _parse_cifar_python),
    ):
        first = numbers[0] + suffix
        found = _find("cifar10", (f"{folder}/{first}", first), root)
        if found is not None:
            return _join([_parse_file(found.parent / (number + suffix), parse) for number in numbers])
    archive = _find("cifar10", ("cifar-10-python.tar.gz",), root)
    if archive is None:
        archive = _find_or_download("cifar10", "cifar-10-binary.tar.gz", root)
    binary = "binary" in archive.name
    wanted = {n + ".bin" if binary else n for n in numbers}
    parse = _parse_cifar_binary if binary else _parse_cifar_python
    batches = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                base = Path(member.name).name
                if base in wanted and (file := tar.extractfile(member)) is not None:
                    batches[base] = parse(file.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise ValueError(f"{archive}: damaged archive ({error})") from error
    if missing := wanted - set(batches):
        raise ValueError(f"{archive}: {', '.join(sorted(missing))} missing from it")
    return _join([batches[name] for name in sorted(batches)])


def _parse_file(path: Path, parse: Callable[[bytes], Pair]) -> Pair:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though other batches are there")
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _join(batches: list[Pair]) -> Pair:
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def _parse_cifar_binary(content: bytes) -> Pair:
    if not content or len(content) % 3073:
        raise ValueError(f"truncated CIFAR-10 batch: {len(content)} bytes is no multiple of a record's 3073")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and plain values, and refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _PickledArray
        if module == "numpy" and name in ("dtype", "ndarray"):
            return _Pickled
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


class _Pickled:
    """Stands in for numpy's own types while a batch is read: what was pickled is kept, nothing is done with it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _PickledArray(_Pickled):
    def pixels(self) -> Pixels:
        """The array, if it is one of bytes."""
        _, shape, dtype, fortran, content = self.state
        if dtype.arguments[0] not in ("u1", b"u1") or fortran:
            raise ValueError(f"an array of type {dtype.arguments[0]!r}, expected bytes")
        array: Pixels = np.frombuffer(content, np.uint8).reshape(shape)
        return array


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _parse_cifar_python(content: bytes) -> Pair:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = batch[b"data"].pixels().reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"not a CIFAR-10 python batch ({error})") from error
    if len(images) != len(labels):
        raise ValueError(f"truncated CIFAR-10 batch: {len(images)} images, {len(labels)} labels")
    return images, labels


def _load_folder(folder: Path, limit: int | None, size: int | None) -> PatchBank:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
    classes = sorted({file.parent for file in files})
    files = files[:limit]
    images: list[Pixels] = []
    for file in tqdm(files, desc=f"reading {folder.name}", unit="image", disable=len(files) < 1000):
        try:
            with Image.open(file) as image:
                if image.mode not in _IMAGE_MODES:
                    raise ValueError(f"{file} has mode {image.mode}; convert it to 8-bit grey, RGB or RGBA first")
                converted = image.convert(_IMAGE_MODES[image.mode])
                if size is not None:
                    converted = converted.resize((size, size), Image.Resampling.BILINEAR)
                pixels = np.asarray(converted)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        if images and len(pixels) != len(images[0]):
            raise ValueError(
                f"{file} has {len(pixels)} channels, but {files[0]} has {len(images[0])}; convert them to one mode"
            )
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"{file} is {pixels.shape[2]}x{pixels.shape[1]}, but {files[0]} is "
                f"{images[0].shape[2]}x{images[0].shape[1]}; give a size to bring all to one"
            )
        images.append(pixels)
    labels = None
    if classes != [folder]:
        labels = np.asarray([classes.index(file.parent) for file in files], dtype=np.int64)
    return PatchBank(np.stack(images), labels)


def _resized(bank: PatchBank, size: int) -> PatchBank:
    parts = [
        torch.nn.functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        for part in bank.pieces()
    ]
    return PatchBank(torch.cat(parts), bank.labels)
