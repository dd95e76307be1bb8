"""Folders of results that are built up one item at a time, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyels.files import read_tensors, write_json, write_tensors
from pyels.sampling import Step

UNFINISHED = "unfinished"
_LARGEST_SEED = 2**63 - 1
_T = TypeVar("_T")


class Progress(Protocol):
    """What is told of a run's progress, from several threads."""

    def step(self, step: Step) -> None:
        """A step of a sampler was done."""

    def skip(self) -> None:
        """An item was found finished."""


def check_seeds(seed: int, count: int) -> None:
    """Raise ValueError unless seed .. seed + count - 1 are seeds."""
    if count < 1:
        raise ValueError(f"num must be at least 1, got {count}")
    if not 0 <= seed <= _LARGEST_SEED - count:
        raise ValueError(f"seed must be between 0 and {_LARGEST_SEED} less the number of samples, got {seed}")


def check_command(folder: str | Path, command: str | None) -> None:
    """Raise ValueError where another command wrote its results: they would be mixed, or lost."""
    before = _read_record(Path(folder)).get("command", command)
    if before != command:
        raise ValueError(f"{folder} holds results of pyels {before}; choose another folder for those of {command}")


def check_finished(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a finished run with other settings would be replaced."""
    before, now = _read_record(Path(folder)), json.loads(json.dumps(settings))
    check_command(folder, now.get("command"))
    for key, value in now.items():
        if before and before.get(key) != value:
            raise ValueError(
                f"{folder} holds finished results with {key} = {before.get(key)}, now {value}; choose another folder, "
                "or delete them"
            )


def noise_of_seed(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (C, H, W); depends on the seed alone, not on what else is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resumable(
    folder: str | Path,
    settings: Mapping[str, Any],
    count: int,
    compute: Callable[[int, Callable[[Step], None]], dict[str, Tensor]],
    progress: Progress,
    jobs: int = 1,
) -> dict[str, Tensor]:
    """compute(0) .. compute(count - 1), stacked; items that an earlier, stopped run finished are read, not computed.

    Finished items wait in `folder`/unfinished together with the settings; call `finished` once the results made of
    them are safely written. Raises ValueError when items of a run with other settings wait there.

    Parameters
    ----------
    compute  compute(i, on_step) gives the tensors of item i, and calls on_step after every step of a sampler
    jobs     items computed at the same time, each in a thread of its own
    """
    folder = Path(folder)
    waiting, settings_file = folder / UNFINISHED, folder / UNFINISHED / "settings.json"
    now = json.loads(json.dumps(settings))
    check_command(folder, now.get("command"))
    made_folder = not folder.exists()
    if waiting.exists() and not (settings_file.exists() and _any_item(waiting)):
        shutil.rmtree(waiting)  # nothing finished, or nobody knows with which settings
    if settings_file.exists():
        _check_settings(folder, settings_file, now)
    else:
        waiting.mkdir(parents=True, exist_ok=True)
        write_json(settings_file, now)
    stop = threading.Event()

    def on_step(step: Step) -> None:
        if stop.is_set():
            raise _Stopped
        progress.step(step)

    def item(i: int) -> dict[str, Tensor]:
        path = item_path(folder, i)
        if path.exists():
            progress.skip()
        else:
            write_tensors(path, compute(i, on_step))
        return read_tensors(path)

    try:
        items = _in_threads(item, count, jobs, stop)
    except BaseException:
        if not _any_item(waiting):  # leave things as they were
            shutil.rmtree(folder if made_folder else waiting, ignore_errors=True)
        raise
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def item_path(folder: str | Path, i: int) -> Path:
    """Where item i of `resumable` waits; with jobs=1, item i may read those before it."""
    return Path(folder) / UNFINISHED / f"{i:06d}.safetensors"


def _in_threads(item: Callable[[int], _T], count: int, jobs: int, stop: threading.Event) -> list[_T]:
    """item(0) .. item(count - 1), `jobs` at a time. After an error, or Ctrl-C, the others end at their next step."""
    if jobs == 1:
        return [item(i) for i in range(count)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(item, i) for i in range(count)]
        try:
            # The first to fail, not the first in line: its message is the one that matters.
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class _Stopped(Exception):
    """Ends an item because another one failed."""


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


def _read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder of results; empty where there is none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


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
