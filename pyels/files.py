"""Writing results so that a reader never meets half a file.

What is being written bears a temporary name beside the final one, `.pyels-` with eight hexadecimal digits. Nothing
else does: by its name, what a killed process left can be told and removed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

_TEMPORARY = re.compile(r"\.pyels-[0-9a-f]{8}-.+")


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


def remove_temporaries(folder: Path) -> None:
    """Remove what was left under temporary names in a folder that nobody else is writing to."""
    for path in folder.glob(".pyels-*"):
        if _TEMPORARY.fullmatch(path.name):
            remove_temporary(path)


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


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError when the disk is full or the folder cannot be written."""
    blob = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(blob)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError naming the file when it is damaged."""
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from error
