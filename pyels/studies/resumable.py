"""Folders of results, which belong to people: what a run may do there, and how it goes on where it was stopped.

One run at a time works in a folder: it holds a lock that names it and ends with its process. What it finished waits in
`unfinished`, a folder that says in its settings.json that it is ours. Nothing is removed but files that we name, in
folders that we mark, and folders that we made and that are empty.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyels.checks import CPU
from pyels.files import TensorFile, locked, remove_temporaries, replacing, temporary_name, write_json, write_tensors
from pyels.records import read_record, short
from pyels.sampling import Step

UNFINISHED = "unfinished"
_SETTINGS = "settings.json"
_RECORD = "run.json"
_MARK = {"unfinished_run_of": "pyels"}
_BEFORE_THE_MARK = ("demo", "sample", "calibrate", "compare", "scaling")  # wrote settings that had none
_KEY = "pyels-item"
_ITEM = re.compile(r"\d{6,}\.safetensors")
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
    """Raise ValueError where another command, or somebody else, wrote results: they would be mixed, or lost."""
    record = Path(folder) / _RECORD
    before = _read(record).get("command")
    if before is None and os.path.lexists(record):
        raise ValueError(f"{record} is not of pyels, or it is damaged; choose another folder, or delete it")
    if before not in (None, command):
        raise ValueError(f"{folder} holds results of pyels {before}; choose another folder for those of {command}")


def check_results(folder: str | Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError where results would be replaced: those of a finished run with other settings, or files of the
    same names of which nothing in the folder says that they are ours."""
    folder, now = Path(folder), json.loads(json.dumps(settings))
    check_command(folder, now.get("command"))
    before = _read(folder / _RECORD)
    for key, value in now.items():
        if before and before.get(key) != value:
            raise ValueError(
                f"{folder} holds finished results with {key} = {short(before.get(key))}, now {short(value)}; choose "
                "another folder, or delete them"
            )
    for name in names:
        if not before and os.path.lexists(folder / name) and _settings_of(folder / UNFINISHED) is None:
            raise ValueError(
                f"{folder} holds {name}, and nothing there says that it is of pyels; choose another folder, or move it"
            )


def noise_of_seed(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (C, H, W); depends on the seed alone, not on what else is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device=CPU)


@contextmanager
def result_folder(folder: str | Path, command: str) -> Iterator[None]:
    """Hold the folder for the results of a command, made if need be, before any work is done for it.

    Removes what a run that was killed left half done, and in the end what this one leaves so. SIGTERM is as Ctrl-C.
    Raises ValueError, and touches nothing, while another run holds the folder.
    """
    folder = Path(folder)
    with locked(folder, command), _terminations_as_interrupts():
        _tidy(folder)
        try:
            yield
        finally:
            _tidy(folder)


def resumable(
    folder: str | Path,
    settings: Mapping[str, Any],
    count: int,
    compute: Callable[[int, Callable[[Step], None]], dict[str, Tensor]],
    progress: Progress,
    jobs: int = 1,
) -> dict[str, Tensor]:
    """compute(0) .. compute(count - 1), stacked; items that an earlier, stopped run finished are read, not computed.

    To be called in `result_folder`. Finished items wait in `folder`/unfinished together with the settings; call
    `finished` once the results made of them are safely written. Raises ValueError when items of a run with other
    settings wait there, or anything that is not ours.

    Parameters
    ----------
    compute  compute(i, on_step) gives the tensors of item i, and calls on_step after every step of a sampler
    jobs     items computed at the same time, each in a thread of its own
    """
    folder = Path(folder)
    now = json.loads(json.dumps(settings))
    check_command(folder, now.get("command"))
    _begin(folder / UNFINISHED, now)
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
            write_tensors(path, compute(i, on_step), {_KEY: _name_of(folder, i)})
        return read_item(folder, i)

    items = _in_threads(item, count, jobs, stop)
    kinds = [{name: (value.shape, value.dtype) for name, value in item.items()} for item in items]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"{item_path(folder, i)} holds other tensors than the first item; delete it")
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def read_item(folder: str | Path, i: int) -> dict[str, Tensor]:
    """Item i of `resumable`, finished; with jobs=1, item i may read those before it. Raises ValueError naming the file
    where it is not as it was written."""
    path = item_path(folder, i)
    try:
        file = TensorFile.read(path)
        if not file.has_checksum:
            raise ValueError("it has no checksum, as those of this version have")
        if file.metadata.get(_KEY) != _name_of(folder, i):
            raise ValueError("it is of another run, or another item of this one")
    except ValueError as error:
        raise ValueError(f"{path}: not as it was written ({error}); delete it to have it computed again") from error
    return file.tensors


def _name_of(folder: str | Path, i: int) -> str:
    """Of item i of the run whose items wait there."""
    settings = json.dumps(_settings_of(Path(folder) / UNFINISHED), sort_keys=True)
    return f"{i} of {zlib.crc32(settings.encode()):08x}"


def item_path(folder: str | Path, i: int) -> Path:
    """Where item i of `resumable` waits."""
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
    """Forget the items of `resumable`; the rest of their folder goes when `result_folder` is left."""
    for path in _items(Path(folder) / UNFINISHED):
        path.unlink()


@contextmanager
def _terminations_as_interrupts() -> Iterator[None]:
    """Unless somebody handles SIGTERM already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tidy(folder: Path) -> None:
    """Remove what no run goes on from: what was being written, and a folder of items that has none."""
    waiting = folder / UNFINISHED
    if _settings_of(waiting) is not None:
        remove_temporaries(waiting)
        if [path.name for path in waiting.iterdir()] == [_SETTINGS]:
            waiting.rename(temporary_name(waiting))  # a kill from here on must not leave it without its mark
    remove_temporaries(folder)


def _begin(waiting: Path, now: dict[str, Any]) -> None:
    """Make the folder of items, or see that those that wait there are of the same run."""
    if not os.path.lexists(waiting):
        with replacing(waiting) as temporary:
            temporary.mkdir()
            write_json(temporary / _SETTINGS, {**_MARK, **now})
        return
    before = _settings_of(waiting)
    if before is None:
        raise ValueError(
            f"{waiting} is not of pyels, or its {_SETTINGS} is damaged; choose another folder, or move or delete it"
        )
    if not _items(waiting):  # but files of somebody else
        write_json(waiting / _SETTINGS, {**_MARK, **now})
        return
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{waiting.parent} holds an unfinished run with {key} = {short(before.get(key))}, now "
                f"{short(now.get(key))}; repeat it as it was to finish it, choose another folder, or delete {waiting}"
            )


def _items(waiting: Path) -> list[Path]:
    return [path for path in waiting.iterdir() if _ITEM.fullmatch(path.name)]


def _settings_of(waiting: Path) -> dict[str, Any] | None:
    """Those of the run whose items wait there; None where nothing says that the folder is ours."""
    settings = _read(waiting / _SETTINGS)
    unmarked = "version" in settings and settings.get("command") in _BEFORE_THE_MARK
    if not (unmarked or _MARK.items() <= settings.items()):
        return None
    return {key: value for key, value in settings.items() if key not in _MARK}


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is no record that can be read."""
    try:
        record: dict[str, Any] = read_record(path, {"command?": str, "version?": str}, "a record of pyels")
    except (OSError, ValueError):
        return {}
    return record
