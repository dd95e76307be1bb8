"""Folders of results that are built up one item at a time, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyels.files import read_tensors, write_json, write_tensors

UNFINISHED = "unfinished"
_LARGEST_SEED = 2**63 - 1


def check_seeds(seed: int, count: int) -> None:
    """Raise ValueError unless seed .. seed + count - 1 are seeds."""
    if count < 1:
        raise ValueError(f"num must be at least 1, got {count}")
    if not 0 <= seed <= _LARGEST_SEED - count:
        raise ValueError(f"seed must be between 0 and {_LARGEST_SEED} less the number of samples, got {seed}")


def noise_of_seed(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (C, H, W); depends on the seed alone, not on what else is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resumable(
    folder: str | Path, settings: Mapping[str, Any], count: int, compute: Callable[[int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """compute(0) .. compute(count - 1), stacked; items that an earlier, stopped run finished are read, not computed.

    Finished items wait in `folder`/unfinished together with the settings; call `finished` once the results made of
    them are safely written. Raises ValueError when items of a run with other settings wait there.
    """
    folder = Path(folder)
    waiting, settings_file = folder / UNFINISHED, folder / UNFINISHED / "settings.json"
    now = json.loads(json.dumps(settings))
    made_folder = not folder.exists()
    if waiting.exists() and not (settings_file.exists() and _any_item(waiting)):
        shutil.rmtree(waiting)  # nothing finished, or nobody knows with which settings
    if settings_file.exists():
        _check_settings(folder, settings_file, now)
    else:
        waiting.mkdir(parents=True, exist_ok=True)
        write_json(settings_file, now)
    items = []
    try:
        for i in range(count):
            path = waiting / f"{i:06d}.safetensors"
            if not path.exists():
                write_tensors(path, compute(i))
            items.append(read_tensors(path))
    except BaseException:
        if not _any_item(waiting):  # leave things as they were
            shutil.rmtree(folder if made_folder else waiting, ignore_errors=True)
        raise
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def finished(folder: str | Path) -> None:
    """Forget the items of `resumable`. Renamed first: a kill in the middle must not leave items without settings."""
    done = Path(folder) / f".{UNFINISHED}-done"
    shutil.rmtree(done, ignore_errors=True)
    (Path(folder) / UNFINISHED).rename(done)
    shutil.rmtree(done)


@contextmanager
def result_folder(folder: str | Path) -> Iterator[None]:
    """Make the folder before any work is done for it; one that was made and stayed empty is removed again."""
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _any_item(waiting: Path) -> bool:
    return any(waiting.glob("[0-9]*.safetensors"))


def _check_settings(folder: Path, settings_file: Path, now: dict[str, Any]) -> None:
    try:
        before = json.loads(settings_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{settings_file}: damaged ({error}); delete {settings_file.parent}") from error
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} holds an unfinished run with {key} = {before.get(key)}, now {now.get(key)}; "
                f"repeat it as it was to finish it, choose another folder, or delete {settings_file.parent}"
            )
