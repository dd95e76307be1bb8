"""Writing results so that a reader never meets half a file, and reading them so that a damaged one is noticed.

What is being written bears a temporary name beside the final one, `.pyels-` with eight hexadecimal digits. Nothing
else does: by its name, what a killed process left can be told and removed. Files of tensors hold a checksum of
themselves. Whoever works in a folder, or on a file in it, and may remove what was left of it, holds its lock.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import platform
import re
import secrets
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pyels.records import parse_record

_TEMPORARY = re.compile(r"\.pyels-[0-9a-f]{8}-(.+)")
LOCK = ".pyels-lock"
_CHECKSUM, _NONE_YET = "pyels-crc32", "00000000"
_CHECKSUM_IN_HEADER = re.compile(f'(?<="{_CHECKSUM}":")[0-9a-f]{{8}}(?=")'.encode())
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_AT_ONCE = 1 << 22  # bytes
_METADATA_ROOM = 1 << 12  # bytes
_SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


# ---- Names and places ----------------------------------------------------------------------------------------------


def path_of(text: str | Path) -> Path:
    """A path as the shell would have it: `~` is the home folder. Raises ValueError for none."""
    if not os.fspath(text):
        raise ValueError("a path must not be empty; the current folder is .")
    return Path(os.path.expanduser(text))


def temporary_name(path: str | Path) -> Path:
    """A new one beside `path`."""
    path = Path(path)
    return path.with_name(f".pyels-{secrets.token_hex(4)}-{path.name}")


def remove_temporary(path: Path) -> None:
    """Remove a file, or a folder of files, that may exist under a temporary name."""
    if not _TEMPORARY.fullmatch(path.name):
        raise ValueError(f"only what bears a temporary name may be removed, got {path}")
    if path.is_dir() and not path.is_symlink():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Remove what was left under temporary names in a folder that nobody else is writing to; or `of` a file in it that
    nobody else is writing."""
    for path in folder.glob(".pyels-*"):
        if (found := _TEMPORARY.fullmatch(path.name)) and of in (None, found[1]):
            remove_temporary(path)


def left_unfinished(folder: Path) -> set[str]:
    """The names of files in a folder that are being written under their own locks, or were when a kill came."""
    names = set()
    for path in folder.glob(".pyels-*"):
        if found := _TEMPORARY.fullmatch(path.name):
            names.add(found[1])
        elif path.name.startswith(f"{LOCK}-"):
            names.add(path.name.removeprefix(f"{LOCK}-"))
    return names


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name for a file or folder; renamed to `path` when the block succeeds, removed when it does not."""
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say of itself which file it was
        remove_temporary(temporary)
        raise


@contextmanager
def locked(folder: Path, work: str, wait: bool = False, of: str | None = None) -> Iterator[None]:
    """Hold a lock file in the folder, made if need be; in the end both go, the folder if it is empty.

    Parameters
    ----------
    work  what the folder is held for, for others to read
    wait  until nobody else holds it; otherwise a ValueError says who does
    of    the name of a file in the folder, which alone is held
    """
    path = folder / (LOCK if of is None else f"{LOCK}-{of}")
    while True:
        made = _make(folder)
        try:
            file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed below, where the lock ends)
        except FileNotFoundError:
            if os.path.lexists(folder):
                raise
            continue  # another run made the folder, wrote nothing and removed it
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another run"
            file.close()
            raise ValueError(
                f"{folder} is in use by {owner}; wait till it has ended, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): let no other run work in it", stacklevel=2)
        except BaseException:  # Ctrl-C while it waits
            file.close()
            raise
        if _is_at(path, file):
            break
        file.close()  # the run that held the folder until now removed the file that was opened here
    try:
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"pyels {work}, process {os.getpid()} on {platform.node()}, since {since}\n".encode())
        yield
    finally:
        if _is_at(path, file):
            path.unlink()  # not after it is closed, when it may be another run's
        file.close()
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _make(folder: Path) -> bool:
    """Whether the folder was not there."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


# ---- Contents ------------------------------------------------------------------------------------------------------


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, its own checksum in its metadata. Raises OSError when the disk is full or the folder
    cannot be written."""
    blob = safetensors.torch.save(
        {name: value.contiguous() for name, value in tensors.items()}, {**(metadata or {}), _CHECKSUM: _NONE_YET}
    )
    start = 8 + int.from_bytes(blob[:8], "little")
    body = memoryview(blob)[start:]
    checksum = f"{zlib.crc32(body, zlib.crc32(blob[:start])):08x}"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(_CHECKSUM_IN_HEADER.sub(checksum.encode(), blob[:start], count=1))
        file.write(body)


@contextmanager
def tensors_in_parts(
    path: str | Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, int, Tensor], None]]:
    """Write a file as `write_tensors` does, of tensors that are not all in memory at once.

    Yields write(name, first, values), which puts values into a tensor, from the one of number `first` on; what nobody
    wrote is 0. The metadata may be filled in until the block ends. By plain writes rather than a memory map, which a
    full disk would end the process for.
    """
    # The largest types first, so that none lies at an odd address; the metadata in what room the header leaves.
    in_file: dict[str, Any] = {}
    size = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        end = size + dtype.itemsize * math.prod(shape)
        in_file[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    length = -(-(len(_header(in_file)) + _METADATA_ROOM) // 8) * 8

    with replacing(path) as temporary, open(temporary, "w+b", buffering=0) as file:
        file.truncate(8 + length + size)

        def write(name: str, first: int, values: Tensor) -> None:
            place = 8 + length + in_file[name]["data_offsets"][0] + first * values.element_size()
            write_at(file, place, values.contiguous().flatten().numpy())

        yield write
        header = _header({"__metadata__": {**metadata, _CHECKSUM: _NONE_YET}, **in_file}).ljust(length)
        if len(header) > length:
            raise ValueError(f"{path}: metadata of more than {_METADATA_ROOM} bytes")
        write_at(file, 0, np.frombuffer(length.to_bytes(8, "little") + header, np.uint8))
        file.seek(0)
        checksum = 0
        while piece := file.read(_AT_ONCE):
            checksum = zlib.crc32(piece, checksum)
        header = _CHECKSUM_IN_HEADER.sub(f"{checksum:08x}".encode(), header, count=1)
        write_at(file, 8, np.frombuffer(header, np.uint8))


def _header(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def write_at(file: io.FileIO, place: int, values: np.ndarray[Any, Any]) -> None:
    """Write all of some values from a byte of a file on."""
    left = values.reshape(-1).view(np.uint8).data
    while left:
        written = os.pwrite(file.fileno(), left, place)
        left, place = left[written:], place + written


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError naming the file when it is damaged."""
    return TensorFile.read(path).tensors


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file.

    Attributes
    ----------
    tensors, metadata  what is in it
    has_checksum       of itself, as `write_tensors` writes it, and it agrees
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    has_checksum: bool

    @classmethod
    def read(cls, path: str | Path, mapped: bool = False) -> TensorFile:
        """Read a file, or map it after it was read once for its checksum. Raises FileNotFoundError, or ValueError
        naming it when it is damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            metadata, has_checksum = _verified(path)
            tensors = safetensors.torch.load_file(path) if mapped else safetensors.torch.load(path.read_bytes())
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged safetensors file ({error})") from error
        return cls(tensors, metadata, has_checksum)


def _verified(path: Path) -> tuple[dict[str, str], bool]:
    """The metadata, and whether there is a checksum among it. Raises ValueError where it does not agree."""
    with open(path, "rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        if len(size) < 8 or length > _LARGEST_HEADER:
            raise ValueError("it has no header")
        header = file.read(length)
        metadata: dict[str, str] = parse_record(header, {"__metadata__?": {}}).get("__metadata__", {})
        stored = _CHECKSUM_IN_HEADER.search(header)
        if stored is None:
            return metadata, False
        checksum = zlib.crc32(_CHECKSUM_IN_HEADER.sub(_NONE_YET.encode(), header, count=1), zlib.crc32(size))
        while piece := file.read(_AT_ONCE):
            checksum = zlib.crc32(piece, checksum)
    if checksum != int(stored[0], 16):
        raise ValueError("its checksum does not match")
    return metadata, True
