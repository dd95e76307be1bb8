"""`pyels info`: what is here."""

from __future__ import annotations

import json
import platform
from typing import Any

import click
import torch

import pyels
from pyels import _core, presets
from pyels.bank import datasets
from pyels.cli.common import json_option
from pyels.engines import available_engines, cuda, default_threads, index


@click.command("info")
@click.option("--dataset", help="Describe this data set, by name or path.")
@json_option
def info_command(dataset: str | None, as_json: bool) -> None:
    """What this installation can do, or what a data set holds."""
    if dataset is not None:
        bank = datasets.load(dataset)
        counts = {str(c): bank.class_range(c)[1] - bank.class_range(c)[0] for c in bank.classes}
        result: dict[str, Any] = {
            "dataset": dataset,
            "images": len(bank),
            "shape": list(bank.shape),
            "dtype": str(bank.dtype).removeprefix("torch."),
            "megabytes": round(bank.nbytes / 1e6, 1),
            "images_per_class": counts,
            "checksums": "ok" if bank.verify() else "none",
            "indexes": index.describe(index.default_folder(bank)),
        }
    else:
        result = {
            "pyels": pyels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "engines": available_engines(),
            "gpu": cuda.missing() or torch.cuda.get_device_name(),
            "isa": _core.isa_in_use(),
            "isas": _core.available_isas(),
            "threads": default_threads(),
            "datasets": {name: _where(name) for name in datasets.NAMES},
            "presets": list(presets.PATCH_SIZES),
        }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif key == "indexes":
            value = "; ".join(
                f"{one['file']}: {one['lists']} lists, {one['megabytes']} MB, built in {one['seconds']} s"
                for one in value
            )
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        click.echo(f"{key:17} {value}")


def _where(name: str) -> str:
    if name == datasets.EMBEDDED:
        return "with the package"
    return str(datasets.where(name) or "not here; downloaded when first used")
