"""Folders of results that are built up one item at a time, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyels.files import read_tensors, write_json, write_tensors

UNFINISHED = "unfinished"


def noise_of_seed(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (C, H, W); depends on the seed alone, not on what else is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resumable(
    folder: str | Path, settings: Mapping[str, Any], count: int, compute: Callable[[int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """compute(0) .. compute(count - 1), stacked; items that an earlier, stopped run finished are read, not computed.

    Finished items wait in `folder`/unfinished together with the settings; call `finished` once the results made of
    them are safely written. Raises ValueError when the folder holds an unfinished run with other settings.
    """
    waiting = Path(folder) / UNFINISHED
    settings_file = waiting / "settings.json"
    now = json.loads(json.dumps(settings))
    if settings_file.exists():
        try:
            before = json.loads(settings_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{settings_file}: damaged ({error}); delete {waiting}") from error
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{folder} holds an unfinished run with {key} = {before.get(key)}, now {now.get(key)}; "
                f"repeat it as it was to finish it, choose another folder, or delete {waiting}"
            )
    else:
        waiting.mkdir(parents=True, exist_ok=True)
        write_json(settings_file, now)
    items = []
    for i in range(count):
        path = waiting / f"{i:06d}.safetensors"
        if not path.exists():
            write_tensors(path, compute(i))
        items.append(read_tensors(path))
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def finished(folder: str | Path) -> None:
    """Forget the items of `resumable`."""
    shutil.rmtree(Path(folder) / UNFINISHED)
