"""Images in a file: read a bounded part at a time by plain reads, and found out when truncated or damaged.

Plain reads rather than a memory map: mapped pages stay resident, and a file that is cut off while it is mapped kills
the process with SIGBUS where a read can still say what is missing.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.bank.selection import as_numbers
from pyels.checks import CPU

Pixels = np.ndarray[Any, Any]

# What is stored, and what it is read as.
DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float32}
# Long enough that the fixed costs of a call to the engine do not matter, short enough to be read ahead in time.
CHUNK_BYTES = 1 << 25
_LOOK = 0.5  # seconds from look to look of who waits for a turn
_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


class BankFileError(ValueError):
    """A bank file is truncated, damaged, or cannot be read within the memory limit; the message names the file."""


def parse_bytes(size: int | str) -> int:
    """Bytes, from an int or text such as "500MB", "2GB" (powers of 1000) or "1.5GiB" (of 1024)."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"memory_limit must be bytes as an int, or text such as '2GB', got {type(size).__name__}")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", size, re.IGNORECASE)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"memory_limit must be bytes, or text such as '500MB', '2GB' or '1.5GiB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"memory_limit must be positive, got {size}")
    return size


def check_complete(path: Path, shape: Sequence[int], itemsize: int, held: int) -> None:
    """Raise BankFileError naming the first image of (N, ...) that `held` bytes do not hold completely."""
    image_bytes = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    if shape and held < shape[0] * image_bytes:
        raise BankFileError(f"{path}: truncated: image {max(0, held) // image_bytes} of {shape[0]} is cut off")


class _Turn:
    """Whose turn it is to use the buffers of a streamed bank. Others wait; but the thread that has it, threads that it
    waits for, and a forked child of its process would wait for ever."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self.process, self._lock, self._thread = os.getpid(), threading.Lock(), 0
        self.until = math.inf  # when the others have waited enough
        self.buffers: list[Tensor] = []

    @contextmanager
    def taken(self, path: Path) -> Iterator[list[Tensor]]:
        if self.process != os.getpid():
            self._renew()
        if self._thread == threading.get_ident():
            raise BankFileError(
                f"{path}: this thread is in the middle of streaming the bank, and another part of it, or a machine, "
                "would need the memory of the part at hand; collect what is needed first, or load the bank twice"
            )
        lock = self._lock
        while not lock.acquire(timeout=_LOOK):
            if time.monotonic() > self.until:
                raise BankFileError(
                    f"{path}: another thread is in the middle of streaming the bank and keeps to one part of it, as if "
                    "it waited for this thread; let it collect what is needed first, load the bank twice, or give "
                    "bank.stream more patience"
                )
        self._thread = threading.get_ident()
        try:
            yield self.buffers
        finally:
            self._thread, self.until = 0, math.inf
            lock.release()


class FileImages:
    """The images (N, C, H, W) that lie one after the other in a file, or some of them.

    With a `memory_limit` they are read by `stream` and `read`. Without, they are mapped elsewhere, and this only knows
    whether the file is still as it was and what the checksums are.

    Attributes
    ----------
    path          the file
    shape         (N, C, H, W)
    dtype         torch.uint8 or torch.float32, which stored float16 become
    numbers       the images' numbers in the file
    memory_limit  bytes; slices share it
    checksums     (number of images in the file,) uint32 CRC-32 of every image's bytes, or None
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        checksums: Pixels | None,
        memory_limit: int | None,
    ) -> None:
        self.path, self.shape, self.dtype, self.memory_limit = path, shape, DTYPES[dtype], memory_limit
        self._stored = dtype
        self.numbers: range | Pixels = range(shape[0])
        self.checksums = checksums
        self._offset, self._in_file = offset, shape[0]
        values = int(np.prod(shape[1:], dtype=np.int64))
        self._image_bytes = values * dtype.itemsize
        # What one takes in each of two buffers; float16 takes half of one more while it is read.
        self._memory_bytes = values * self.dtype.itemsize + (self._image_bytes // 2 if self._converts else 0)
        status = os.stat(path)
        self._identity, self._written = _identity(status), status.st_mtime_ns
        # What follows is shared with slices of this.
        self._verified = np.zeros(shape[0], dtype=bool)
        self._turn = _Turn()
        if memory_limit is not None and memory_limit < 2 * self._memory_bytes:
            raise BankFileError(
                f"{path}: memory_limit must hold two images, 2 x {self._memory_bytes} bytes, got {memory_limit}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _converts(self) -> bool:
        return self._stored.itemsize != self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """All images of the file, in their order."""
        return isinstance(self.numbers, range) and self.numbers == range(self._in_file)

    def __getitem__(self, part: slice | Tensor) -> FileImages:
        cut = self.of_shape(*self.shape[1:])
        cut.numbers = self.numbers[part] if isinstance(part, slice) else self._numbers_in_file(part)
        cut.shape = (len(cut.numbers), *self.shape[1:])
        return cut

    def of_shape(self, channels: int, height: int, width: int) -> FileImages:
        """The same images, of this shape."""
        other = object.__new__(FileImages)
        other.__dict__.update(self.__dict__)
        other.shape = len(self), channels, height, width
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turn": None}  # another process has its own, and its own limit

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=_Turn())

    def stream(self, which: range | Tensor, patience: float = math.inf) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The chosen images in turn, as (n,) int64 numbers and (n, C, H, W) pixels, which the next ones overwrite.

        Reads ahead in a thread of its own while the caller works on what it was given. The two buffers together stay
        within the memory limit; whoever else streams from this file meanwhile waits, for `patience` seconds while the
        caller keeps one part. Closing the iterator ends it. Raises BankFileError where that is over, where the same
        thread streams already, and in a forked child that goes on with it.
        """
        assert self.memory_limit is not None
        length = max(1, min(self.memory_limit // 2, CHUNK_BYTES) // self._memory_bytes)
        parts = [which[i : i + length] for i in range(0, len(which), length)]
        with self._turn.taken(self.path) as buffers, self._open() as file, ThreadPoolExecutor(1) as reader:
            process = os.getpid()
            if not buffers:  # kept from call to call; what is not written to takes no memory
                buffers += [torch.empty((length, *self.shape[1:]), dtype=self.dtype, device=CPU) for _ in range(2)]

            def read(i: int) -> tuple[Tensor, Tensor]:
                numbers = as_numbers(parts[i])
                pixels = buffers[i % 2][: len(numbers)].view(-1, *self.shape[1:])
                self._fill(file, numbers, pixels)
                return numbers, pixels

            ahead = reader.submit(read, 0) if parts else None
            for i in range(len(parts)):
                assert ahead is not None
                if os.getpid() != process:  # a fork takes no threads along
                    raise BankFileError(f"{self.path}: streaming was begun before a fork; begin it anew")
                ready = ahead.result()
                if i + 1 < len(parts):
                    ahead = reader.submit(read, i + 1)
                self._turn.until = time.monotonic() + patience
                yield ready
                self._turn.until = math.inf

    def read(self, which: Tensor) -> Tensor:
        """The chosen images, in memory of their own."""
        pixels = torch.empty((len(which), *self.shape[1:]), dtype=self.dtype, device=CPU)
        with self._open() as file:
            self._fill(file, which, pixels)
        return pixels

    def mapped(self) -> tuple[FileImages, Pixels]:
        """Without a limit, and the images mapped from the file for reading only. Raises BankFileError where they do not
        lie in it as they are used."""
        remedy = "load them without a memory_limit"
        if self._converts:
            raise BankFileError(
                f"{self.path}: its images are {self._stored}, and cannot be looked at where they lie, as this engine "
                f"does; save them as float32, or {remedy}"
            )
        if not (isinstance(self.numbers, range) and self.numbers.step == 1):
            raise BankFileError(
                f"{self.path}: images that do not lie side by side cannot be looked at where they lie, as this engine "
                f"does; {remedy}"
            )
        other = self.of_shape(*self.shape[1:])
        other.memory_limit = None
        with self._open() as file:
            place = self._offset + self.numbers[0] * self._image_bytes
            return other, np.memmap(file, self._stored, "r", place, self.shape)

    def check(self, numbers: Tensor, pixels: Tensor) -> None:
        """Compare images with their checksums unless that was done before."""
        if self.checksums is None:
            return
        in_file = self._numbers_in_file(numbers)
        images = pixels.numpy()
        for i in np.flatnonzero(~self._verified[in_file]):
            number = in_file[i]
            if zlib.crc32(np.ascontiguousarray(images[i], self._stored).data) != self.checksums[number]:
                raise BankFileError(f"{self.path}: image {number} is damaged (its checksum does not match)")
            self._verified[number] = True

    def forget(self) -> None:
        """Let the checksums be compared once more."""
        self._verified[self._numbers_in_file(as_numbers(range(len(self))))] = False

    def check_written(self, again: bool = True) -> bool:
        """Whether the file was written to since this was last asked; to be asked before mapped images are used, and
        after. All images are then compared with their checksums once more when they are used.

        Raises BankFileError if the file has become too short, or was written to and has no checksums, or may not have
        been written to `again`.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return False  # deleted: what is mapped remains
        return _identity(status) == self._identity and self._check_written(status, again)

    def _check_written(self, status: os.stat_result, again: bool = True) -> bool:
        if status.st_size < self._offset + self._in_file * self._image_bytes:
            check_complete(self.path, (self._in_file, self._image_bytes), 1, status.st_size - self._offset)
        if status.st_mtime_ns == self._written:
            return False
        if self.checksums is None or not again:
            raise BankFileError(f"{self.path}: has been written to since it was loaded; load it again")
        self._written = status.st_mtime_ns
        self._verified[:] = False
        return True

    @contextmanager
    def _open(self) -> Iterator[io.FileIO]:
        with open(self.path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if _identity(status) != self._identity:
                raise BankFileError(f"{self.path}: has been replaced by another file since it was loaded")
            self._check_written(status)
            yield file
            self._check_written(os.fstat(file.fileno()), again=False)  # what was read may be of before and after

    def _fill(self, file: io.FileIO, numbers: Tensor, pixels: Tensor) -> None:
        """Read images into `pixels`, neighbouring ones in one go."""
        if not len(numbers):
            return
        in_file, size = self._numbers_in_file(numbers), self._image_bytes
        stored = np.empty(pixels.shape, self._stored) if self._converts else pixels.numpy()
        into = stored.data.cast("B")
        starts = np.flatnonzero(np.diff(in_file, prepend=-2) != 1)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(in_file)], strict=True):
            number, done, wanted = int(in_file[start]), start * size, end * size
            try:
                file.seek(self._offset + number * size)
                while done < wanted and (count := file.readinto(into[done:wanted])):
                    done += count
            except OSError as error:
                raise BankFileError(
                    f"{self.path}: image {number + done // size - start} cannot be read ({error.strerror or error})"
                ) from error
            if done < wanted:
                at = number + done // size - start
                raise BankFileError(f"{self.path}: truncated: image {at} of {self._in_file} is cut off")
        if self._converts:
            pixels.copy_(torch.from_numpy(stored))
        self.check(numbers, pixels)

    def _numbers_in_file(self, numbers: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        if isinstance(self.numbers, range):
            return self.numbers.start + self.numbers.step * numbers.numpy()
        found: Pixels = self.numbers[numbers.numpy()]
        return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
