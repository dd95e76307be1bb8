"""Memory that is a mapped file, which somebody may write to, or cut off, while it is used.

What is missing of a file that was cut off reads as zeros instead of ending the process, and whoever used it asks
afterwards whether the file is still as it was. In between nothing is slower for it.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import pyels._core as _core


@dataclass(frozen=True)
class Stamp:
    """A file, and when it was last written to. To the clock of its file system, whose ticks are some milliseconds."""

    path: Path
    file: tuple[int, int]
    written: tuple[int, int]

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        status = os.stat(path)
        return cls(Path(path), (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns))

    def is_old(self) -> bool:
        """Whether this very file was written to since. What is mapped outlives that its name is deleted or replaced."""
        try:
            now = Stamp.of(self.path)
        except OSError:
            return False
        return now.file == self.file and now.written != self.written


def guard(tensor: Tensor, owner: object) -> None:
    """Guard the memory of a mapped tensor for as long as its owner is there."""
    if _core.guard_mapped(tensor.data_ptr(), tensor.nbytes):
        weakref.finalize(owner, _core.unguard_mapped, tensor.data_ptr()).atexit = False
