"""Memory that is a mapped file, which somebody may write to, or cut off, while it is used.

What is missing of a file that was cut off reads as zeros instead of ending the process, and whoever used it asks
afterwards whether the file is still as it was. In between nothing is slower for it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import pyels._core as _core


@dataclass(frozen=True)
class Stamp:
    """A file, its size, and, unless it is only `of_size`, when it was last written to. To the clock of its file system,
    whose ticks are some milliseconds."""

    path: Path
    file: tuple[int, int]
    written: tuple[int, int]
    of_size: bool

    @classmethod
    def of(cls, path: str | Path, of_size: bool = False) -> Stamp:
        status = os.stat(path)
        written = status.st_size, 0 if of_size else status.st_mtime_ns
        return cls(Path(path), (status.st_dev, status.st_ino), written, of_size)

    def is_old(self) -> bool:
        """Whether this very file was written to since. What is mapped outlives that its name is deleted or replaced."""
        try:
            now = Stamp.of(self.path, self.of_size)
        except OSError:
            return False
        return now.file == self.file and now.written != self.written


def guard(tensors: Sequence[Tensor], owner: object) -> None:
    """Guard the memory of tensors that are parts of one map for as long as their owner is there."""
    first = min(tensor.data_ptr() for tensor in tensors)
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    if _core.guard_mapped(first, last - first):
        weakref.finalize(owner, _core.unguard_mapped, first).atexit = False
