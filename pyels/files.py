"""Writing results so that a reader never meets half a file."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to `path` when the block succeeds, deleted when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say of itself which file it was
        temporary.unlink(missing_ok=True)
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
