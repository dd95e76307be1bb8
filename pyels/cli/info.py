"""`pyels info`: what is here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

import pyels
from pyels import _core, datasets, presets
from pyels.bank import PatchBank
from pyels.cli.options import command, flag, in_words, option
from pyels.cli.settings import JsonOptions, ReadingOptions
from pyels.engines import available_engines, cuda, default_threads
from pyels.engines.index.file import default_folder, describe
from pyels.machines import MACHINES


@dataclass(frozen=True, kw_only=True)
class Info(ReadingOptions, JsonOptions):
    dataset: str | None = option(None, "Describe this data set, by name or path.")


@command(Info)
def info_command(given: Info) -> None:
    """What this installation can do, or what a data set holds."""
    if given.dataset is not None:
        result = _data_set(given.dataset, datasets.load(given.dataset, **given.reading()))
    elif asked := given.reading():
        raise ValueError(f"{in_words(map(flag, asked))}: nothing is read without --dataset")
    else:
        result = _installation()
    given.show(result, [f"{key:17} {_in_words(key, value)}" for key, value in result.items()])


def _data_set(dataset: str, bank: PatchBank) -> dict[str, Any]:
    counts = {str(c): bank.class_range(c)[1] - bank.class_range(c)[0] for c in bank.classes}
    return {
        "dataset": dataset,
        "images": len(bank),
        "shape": list(bank.shape),
        **({} if bank.latents is None else {"latents": bank.latents.record()}),
        "dtype": str(bank.dtype).removeprefix("torch."),
        "megabytes": round(bank.nbytes / 1e6, 1),
        "images_per_class": counts,
        "class_names": dict(enumerate(bank.class_names or [])),
        "checksums": "ok" if bank.verify() else "none",
        "indexes": describe(default_folder(bank)),
    }


def _installation() -> dict[str, Any]:
    return {
        "pyels": pyels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "engines": available_engines(),
        "gpu": cuda.missing() or torch.cuda.get_device_name(),
        "isa": _core.isa_in_use(),
        "isas": _core.available_isas(),
        "threads": default_threads(),
        "machines": list(MACHINES),
        "datasets": {name: _where(name) for name in datasets.NAMES},
        "presets": list(presets.PATCH_SIZES),
    }


def _where(name: str) -> str:
    if name == datasets.EMBEDDED:
        return "with the package"
    return str(datasets.where(name) or "not here; downloaded when first used")


def _in_words(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if key == "indexes":
        return "; ".join(
            f"{one['file']}: {one['lists']} lists, {one['megabytes']} MB, built in {one['seconds']} s" for one in value
        )
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
