"""The file of an index: where it lies, that it is built once, and how it is checked and mapped."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
from torch import Tensor
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.bank.selection import ALL, as_numbers
from pyels.engines.index.building import build
from pyels.engines.index.lists import KEY, Index, Lists, Region, Windows, regions
from pyels.files import TensorFile, left_unfinished, locked, remove_temporaries
from pyels.mapped import Stamp, guard
from pyels.records import parse_record, short

_VERSION = 6
_RECORD = {
    "version": range(1 << 31),
    "lists": range(1 << 31),
    "seconds": float,
    "megabytes": float,
    "patch_size": range(1 << 31),
}


def open_index(
    bank: PatchBank,
    patch_size: int,
    wraps: bool,
    name: str,
    images: range | Tensor,
    folder: str | Path | None = None,
    threads: int = 1,
) -> tuple[Index, Stamp]:
    """The index over a bank's windows, mapped from its file, or built first, with a progress bar, and saved; and the
    stamp of the file, to be asked after the index was used.

    Parameters
    ----------
    patch_size  window size k, odd
    wraps       all H * W windows, wrapped around; otherwise those that lie wholly inside, and those of the sides
    name        of the set of images, as `Selection.names`
    images      (n,) numbers of its images
    folder      where indexes are kept, see `default_folder`

    Raises
    ------
    ValueError   the file is damaged, or was built from another bank
    ImportError  it has to be built, and faiss is not installed
    """
    folder = default_folder(bank) if folder is None else Path(folder)
    of_set = "" if name == ALL else f"-{name.removeprefix(f'{ALL}-')}"
    path = folder / f"k{patch_size}{'-wrapped' if wraps else ''}{of_set}.safetensors"
    about = {
        "version": _VERSION,
        "bank_crc32": bank.fingerprint(),
        "bank_shape": [len(bank), *bank.shape],
        "patch_size": patch_size,
        "wraps": wraps,
        "images": name,
    }
    _tidy(folder)
    if not path.exists():
        with locked(folder, f"building index {path.stem}", wait=True, of=path.name):
            remove_temporaries(folder, path.name)  # of whoever was waited for, and was killed
            if not path.exists():  # another thread or process may have built it meanwhile
                total = 2 * len(images) * len(Windows(Region.INSIDE, bank.shape, patch_size, wraps).centres())
                with tqdm(total=total, desc=f"index {path.stem}", unit="window", unit_scale=True, leave=False) as bar:
                    build(bank, as_numbers(images), patch_size, wraps, path, about, threads, bar.update)
    return _load(path, about)


def _tidy(folder: Path) -> None:
    """Remove what builds that were killed, of any index, have left in a folder; others may be running."""
    for name in left_unfinished(folder):
        if not re.fullmatch(r"k\d+.*\.safetensors", name):
            continue  # of a run that writes here too, under a lock of its own
        with suppress(ValueError, OSError), locked(folder, "tidying up", of=name):
            remove_temporaries(folder, name)


def default_folder(bank: PatchBank) -> Path:
    """Beside the file of a bank that was loaded from one; else in the user's cache, by the bank's checksum."""
    if bank.path is not None:
        return bank.path.with_name(f"{bank.path.name}.index")
    return Path(platformdirs.user_cache_dir("pyels")) / "index" / bank.fingerprint()


def describe(folder: str | Path) -> list[dict[str, Any]]:
    """What is known of every index in a folder: patch size, class, number of lists, build time, size."""
    return [{"file": path.name, **_read_about(path)} for path in sorted(Path(folder).glob("k*.safetensors"))]


def _read_about(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # to open a pipe would wait for who writes to it
            raise ValueError("not a regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            about: dict[str, Any] = parse_record((file.metadata() or {}).get(KEY, "null"), _RECORD)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a readable index ({error}); delete it to have it built again") from error
    return about


def _load(path: Path, about: dict[str, Any]) -> tuple[Index, Stamp]:
    before = _read_about(path)
    for key, value in about.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} is an index with {key} = {short(before.get(key))}, but this bank needs {value}; delete it to "
                "have it built again, or give another folder for indexes"
            )
    images, *shape = about["bank_shape"]
    index: Index = {}
    fault = None
    try:
        stamp = Stamp.of(path)
        file = TensorFile.read(path, mapped=True)
        if not file.has_checksum:
            raise ValueError("it has no checksum")
        for region in regions(about["patch_size"], about["wraps"]):
            index[region] = Lists(**{f.name: file.tensors[f"{region.lists_name}.{f.name}"] for f in fields(Lists)})
            windows = Windows(region, tuple(shape), about["patch_size"], about["wraps"])
            if fault := index[region].fault(images, windows):
                break
    except (KeyError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ValueError(f"{path}: damaged index ({fault}); delete it to have it built again")
    guard([tensor for lists in index.values() for tensor in lists.tensors().values()], index[Region.INSIDE])
    return index, stamp
