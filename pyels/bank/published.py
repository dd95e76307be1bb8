"""The files that MNIST, its kin and CIFAR-10 are published as. Nothing in them is executed, and no more of them is
unpacked than what they say of themselves allows."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import pickletools
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from pyels.bank.file_images import Pixels

Pair = tuple[Pixels, Pixels]  # images (N, C, H, W) uint8, labels (N,) int64

IDX = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}
CIFAR_FOLDERS = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}
CIFAR_ARCHIVES = tuple(f"cifar-10-{kind}.tar.gz" for kind in CIFAR_FOLDERS)
_MOST_PACKED = 1032  # bytes that deflate makes one of, at most
_LARGEST_IDX = 1 << 31
_LARGEST_BATCH, _LARGEST_ARCHIVE = 1 << 26, 1 << 28  # twice and about half more than what is published


def read_idx(path: str | Path) -> Pixels:
    """The array in an idx file of unsigned bytes, gzipped or not. Raises ValueError naming a damaged file."""
    path = Path(path)
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise ValueError(f"{path}: not an idx file of unsigned bytes")
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise ValueError(f"{path}: truncated idx file, the header is cut off")
            shape = tuple(np.frombuffer(sizes, ">u4").tolist())
            wanted, most = math.prod(shape), min(_LARGEST_IDX, path.stat().st_size * (_MOST_PACKED if packed else 1))
            content = file.read(wanted + 1) if wanted <= most else b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(content) != wanted:
        raise ValueError(f"{path}: truncated or overlong idx file, its shape is {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def load_idx(image_file: Path, label_file: Path) -> Pair:
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.shape != (len(images),):
        raise ValueError(f"{image_file} and {label_file} do not belong together: {images.shape} and {labels.shape}")
    return images[:, None], labels.astype(np.int64)


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------


def load_cifar10(split: str, find: Callable[[Iterable[str]], Path | None], fetch: Callable[[str], Path]) -> Pair:
    """Binary batches (records of a label byte and 3,072 pixels) or python batches, unpacked or in their archive.

    Parameters
    ----------
    find   gives the first of some files that is there
    fetch  gives a file that is not, or raises
    """
    numbers = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for folder, (suffix, parse) in zip(CIFAR_FOLDERS.values(), _PARSERS, strict=True):
        first = numbers[0] + suffix
        found = find((f"{folder}/{first}", first))
        if found is not None:
            return _join([_parse_file(found.parent / (number + suffix), parse) for number in numbers])
    archive = find(CIFAR_ARCHIVES) or fetch(CIFAR_ARCHIVES[0])
    suffix, parse = _PARSERS["binary" not in archive.name]
    wanted = [number + suffix for number in numbers]
    batches = {}
    try:
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=cast(Any, _AtMost(unpacked)), mode="r|") as tar:
            for member in tar:
                base = Path(member.name).name
                if base in wanted and member.isreg() and member.size <= _LARGEST_BATCH:  # not where links lead
                    batches[base] = parse(cast("IO[bytes]", tar.extractfile(member)).read())
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{archive}: damaged archive ({error})") from error
    if missing := [name for name in wanted if name not in batches]:
        raise ValueError(f"{archive}: {', '.join(missing)} missing from it")
    return _join([batches[name] for name in wanted])


class _AtMost:
    """A file, of which no more is read than there may be."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file, self._left = file, _LARGEST_ARCHIVE

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise ValueError(f"unpacks to more than {_LARGEST_ARCHIVE} bytes")
        return self._file.read(size)


def _parse_file(path: Path, parse: Callable[[bytes], Pair]) -> Pair:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though other batches are there")
    try:
        if path.stat().st_size > _LARGEST_BATCH:
            raise ValueError(f"{path.stat().st_size} bytes are no CIFAR-10 batch")
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
        if re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module) and name in _Pickled.KINDS:
            return type(name, (_Pickled,), {})
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


class _Pickled:
    """Stands in for numpy's own types while a batch is read: what was pickled is kept, nothing is done with it."""

    KINDS = ("dtype", "ndarray", "_reconstruct", "_frombuffer", "scalar")
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> Pixels:
        """The array, or the number, if it is one of integers."""
        if type(self).__name__ == "_reconstruct":  # state: version, shape, dtype, Fortran order, content
            _, shape, kind, fortran, content = self.state
        elif type(self).__name__ == "_frombuffer":
            content, kind, shape, order = self.arguments
            fortran = order == "F"
        else:
            (kind, content), shape, fortran = self.arguments, (), False
        name, order = kind.arguments[0], kind.state[1]
        name, order = (text.decode() if isinstance(text, bytes) else text for text in (name, order))
        if not re.fullmatch(r"[iu][1248]", name) or order not in ("<", ">", "|", "="):
            raise ValueError(f"an array of type {name!r}, expected integers")
        dtype = np.dtype((">" if order == ">" else "<") + name)
        array: Pixels = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        return array


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _parse_cifar_python(content: bytes) -> Pair:
    try:
        if any("PUT" in code.name and (at or 0) > len(content) for code, at, _ in pickletools.genops(content)):
            raise ValueError("more is to be remembered than is in it")  # and memory is taken for all of it
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = (batch[name] if name in batch else batch[name.decode()] for name in (b"data", b"labels"))
        images = images.array()
        if images.dtype != np.uint8 or images.shape[1:] not in ((3072,), (3, 32, 32)):
            raise ValueError(f"images {images.dtype} of shape {images.shape}, expected bytes of shape (N, 3072)")
        if isinstance(labels, _Pickled):
            labels = labels.array()
        elif len(labels) == len(images):  # a list may hold itself, and be endless when it is made an array
            labels = [label.array().item() if isinstance(label, _Pickled) else label for label in labels]
            if not all(isinstance(label, int) for label in labels):
                raise ValueError("labels that are no integers")
        if len(labels) != len(images):
            raise ValueError(f"truncated: {len(images)} images, {len(labels)} labels")
        return images.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64).reshape(len(images))
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"not a CIFAR-10 python batch ({error})") from error


_PARSERS = ((".bin", _parse_cifar_binary), ("", _parse_cifar_python))  # of CIFAR_FOLDERS
