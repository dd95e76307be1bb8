"""Picture files of any kind that Pillow reads, one by one or as folders and zips of them, as arrays."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pyels.bank.file_images import Pixels
from pyels.checks import warn
from pyels.records import short

MODES = ("L", "RGB", "RGBA")  # grey, colour, colour with transparency: 1, 3 and 4 channels of 8 bits
_MODES = {
    **dict.fromkeys(("1", "L"), "L"),
    **dict.fromkeys(("RGB", "RGBX", "P", "CMYK", "YCbCr", "HSV"), "RGB"),
    **dict.fromkeys(("RGBA", "RGBa", "LA", "La", "PA"), "RGBA"),
}
# Of these Pillow knows no pixels, or has another program find them.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_OTHER_PICTURES = {".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".svg"}
_LARGE, _MOST_PACKED = 1 << 24, 5000  # pixels, and how many of them a byte may stand for beyond
_LARGEST_LIST = 1 << 28  # bytes of a dataset.json: of some millions of pictures
# What systems and programs put beside the data; beside these, all that begins with a dot.
_NO_DATA = {"#recycle", "#snapshot", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "__pycache__"}
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation", "dev", "eval")}


@dataclass(frozen=True)
class Look:
    """What pictures are made to be.

    Attributes
    ----------
    size  pixels of a side; None: as they are
    crop  whether a square is cut out of the middle first, instead of squeezing all into one
    mode  "L" (grey), "RGB" or "RGBA"; what is transparent then lies on white; None: as they are
    """

    size: int | None = None
    crop: bool = False
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in (None, *MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.crop and self.size is None:
            raise ValueError("crop is of pictures that are resized: give a size too")


class ModeError(ValueError):
    """A picture is none of 8 bits a channel in grey or colour."""


def as_pixels(name: str, image: Image.Image, look: Look) -> Pixels:
    """A picture as every viewer shows it, (C, H, W) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in _MODES:
        raise ModeError(f"{name} has mode {image.mode}; convert it to 8-bit grey, RGB or RGBA first")
    seen = _MODES[image.mode]
    if "transparency" in image.info and (glass := image.convert("RGBA")).getchannel("A").getextrema() != (255, 255):
        image, seen = glass, "RGBA"
    image = image.convert(seen)
    if seen == "RGBA" and look.mode in ("L", "RGB"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(look.mode or seen)
    if look.size is not None:
        if look.crop:
            side = min(image.size)
            left, top = ((pixels - side) // 2 for pixels in image.size)
            image = image.crop((left, top, left + side, top + side))
        image = image.resize((look.size, look.size), Image.Resampling.BILINEAR)
    pixels: Pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def read_pictures(
    path: Path, split: str, limit: int | None, look: Look, skip_unreadable: bool, check_memory: Callable[[int], None]
) -> tuple[Pixels, Pixels | None, list[str] | None]:
    """The pictures of a folder or zip (N, C, H, W) uint8, their labels (N,), and the names of classes 0, 1, ..

    Raises ValueError naming the file that cannot be read, or that is of another size or mode than the first, and what
    `check_memory` raises of the bytes that all of them will take.
    """
    with _Files(path) as files:
        names, labels, classes = _arrange(files, split)
        chosen = spread(labels, len(names), limit)
        names, labels = [names[i] for i in np.arange(len(names))[chosen]], None if labels is None else labels[chosen]
        images, read = np.empty(0, np.uint8), list[int]()
        animated, unreadable = list[str](), list[str]()
        for i, name in enumerate(tqdm(names, desc=f"reading {path.name}", unit="image", disable=len(names) < 1000)):
            try:
                with files.open(name) as file, Image.open(file, formats=_formats()[0]) as image:
                    _check_size(file, image)
                    pixels = as_pixels(str(path / name), image, look)
                    if image.format != "MPO" and getattr(image, "is_animated", False):
                        animated.append(name)
            except ModeError:
                raise
            except Exception as error:  # a damaged picture can fail in any way
                reason = f"{path / name}: not a readable image ({error or type(error).__name__})"
                if not skip_unreadable:
                    raise ValueError(f"{reason}; skip_unreadable leaves such files out") from error
                unreadable.append(reason)
                continue
            if not read:
                check_memory(len(names) * pixels.nbytes)
                images = np.empty((len(names), *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise ValueError(_differs(path, name, pixels.shape, names[read[0]], images.shape[1:]))
            images[len(read)] = pixels
            read.append(i)
    if unreadable:
        warn(f"{len(unreadable)} of {len(names)} pictures cannot be read and are left out, first {unreadable[0]}")
    if not read:
        raise ValueError(f"{path}: none of its {len(names)} pictures can be read")
    if animated:
        warn(f"of {len(animated)} pictures only the first of several frames is used, first {path / animated[0]}")
    return images[: len(read)], None if labels is None else labels[read], classes


def spread(labels: Pixels | None, count: int, limit: int | None) -> slice | Pixels:
    """Which so many of `count` images: the first; where they lie class after class, as many of each as there are."""
    if limit is None or labels is None or limit >= count:
        return slice(limit)
    starts = np.flatnonzero(np.diff(labels, prepend=~labels[:1]))
    if len(starts) != len(np.unique(labels)):
        return slice(limit)
    place_in_class = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
    chosen: Pixels = np.sort(np.argsort(place_in_class, kind="stable")[:limit])
    return chosen


def _check_size(file: IO[bytes], image: Image.Image) -> None:
    """Raise ValueError for a small file that would become a huge picture, below what Pillow itself takes for a bomb."""
    pixels, position = image.width * image.height, file.tell()
    if pixels > _LARGE and pixels > _MOST_PACKED * file.seek(0, os.SEEK_END):
        raise ValueError(f"{image.width}x{image.height} pixels in {file.tell()} bytes")
    file.seek(position)


@functools.cache
def _formats() -> tuple[list[str], frozenset[str]]:
    """The formats that are read, and the suffixes of their files."""
    Image.init()
    formats = [one for one in Image.OPEN if one not in _NO_PICTURES]
    return formats, frozenset(suffix for suffix, one in Image.registered_extensions().items() if one in formats)


def _differs(path: Path, name: str, shape: Sequence[int], first: str, wanted: Sequence[int]) -> str:
    if shape[0] != wanted[0]:
        return (
            f"{path / name} has {shape[0]} channels, but {path / first} has {wanted[0]}; give a mode, "
            f"{', '.join(MODES)}, to bring all to one"
        )
    size, other = (f"{w}x{h}" for _, h, w in (shape, wanted))
    return f"{path / name} is {size}, but {path / first} is {other}; give a size to bring all to one"


# ---- What lies where -----------------------------------------------------------------------------------------------


class _Files:
    """The files of a folder or a zip, by names with slashes. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        except Exception as error:  # of another version, encrypted, damaged
            raise ValueError(f"{path}: not a readable zip ({error})") from error

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def names(self) -> list[str]:
        """Of all files, and of all folders with a slash at the end, but of none that a system hides."""
        names = self._walk() if self._zip is None else self._zip.namelist()
        parts = sorted(name.split("/") for name in names)
        return ["/".join(one) for one in parts if not any(map(_is_no_data, one))]

    def _walk(self) -> Iterator[str]:
        """Follows links, but into no folder that the link lies in."""
        folders: list[tuple[str, tuple[Any, ...]]] = [("", ())]
        while folders:
            name, above = folders.pop()
            status = os.stat(self.path / name)
            if (here := (status.st_dev, status.st_ino)) in above or _is_no_data(Path(name).name):
                continue
            with os.scandir(self.path / name) as entries:
                for entry in entries:
                    is_folder = os.path.isdir(entry.path)  # entry.is_dir() raises for a link to itself
                    yield name + entry.name + "/" * is_folder
                    if is_folder:
                        folders.append((f"{name}{entry.name}/", (*above, here)))

    def open(self, name: str) -> IO[bytes]:
        if self._zip is not None:
            return self._zip.open(name)
        if not stat.S_ISREG(os.stat(self.path / name).st_mode):  # to open a pipe would wait for who writes to it
            raise ValueError("not a regular file")
        return open(self.path / name, "rb")


def _is_no_data(name: str) -> bool:
    return name.startswith(".") or name in _NO_DATA


def _arrange(files: _Files, split: str) -> tuple[list[str], Pixels | None, list[str] | None]:
    """Which of the files are pictures of the split, their labels, and what the classes are called."""
    path, names = files.path, files.names()
    suffixes = _formats()[1]
    pictures = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
    others = Counter(os.path.splitext(name)[1].lower() for name in names if not name.endswith("/"))
    if not pictures:
        raise ValueError(f"{path}: no images in it that Pillow reads, only {_kinds(others) or 'empty folders'}")
    if left_out := others & Counter(dict.fromkeys(_OTHER_PICTURES - suffixes, len(names))):
        warn(f"{path}: pictures that Pillow does not read here are left out: {_kinds(left_out)}")
    top = "" if path.is_dir() else _only_folder(names)
    inside = [name.removeprefix(top) for name in pictures]
    of_split = _part_of(path, inside, split)
    part = top + of_split
    if of_split:
        if strays := [name for name in inside if "/" not in name]:
            warn(f"{path}: {_some(strays)} beside the folders of its splits left out")
        names, pictures = ([name for name in given if name.startswith(part)] for given in (names, pictures))
    if f"{part}dataset.json" in names:
        listed = _listed_labels(files, f"{part}dataset.json")
        if listed is not None:
            return pictures, _labels_of(path, part, pictures, listed), None
    return _by_folder(path, part, names, pictures)


def _only_folder(names: list[str]) -> str:
    """The folder, with a slash, that a program packed as a whole; empty where it is that of a split."""
    folders = {name.split("/")[0] if "/" in name else "" for name in names}
    folder = folders.pop() if len(folders) == 1 else ""
    return f"{folder}/" if folder and not any(_split_name(folder) in some for some in _SPLITS.values()) else ""


def _by_folder(
    path: Path, part: str, names: list[str], pictures: list[str]
) -> tuple[list[str], Pixels | None, list[str] | None]:
    """The pictures, of which every folder beside each other is a class."""

    def tail(name: str) -> list[str]:
        return name[len(part) :].split("/")

    classes = sorted({tail(name)[0] for name in names if len(tail(name)) > 1})
    inside = [name for name in pictures if len(tail(name)) > 1]
    strays = [name for name in pictures if len(tail(name)) == 1]
    if not inside:
        return pictures, None, None
    if len(strays) > len(inside):
        raise ValueError(
            f"{path}: {_some(strays)} beside folders of pictures, {', '.join(classes[:3])}: is each folder a class? "
            "Keep the pictures that belong together in a folder of their own, and give that"
        )
    if strays:
        warn(f"{path}: {_some(strays)} beside class folders left out")
    if nested := [name for name in inside if len(tail(name)) > 2]:
        warn(f"{path}: {_some(nested)} in folders of class folders, where the uppermost folder is the class")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.asarray([number[tail(name)[0]] for name in inside], dtype=np.int64)
    filled = set(labels.tolist())
    if empty := [name for i, name in enumerate(classes) if i not in filled]:
        warn(f"{path}: class folders without pictures, which keep their numbers: {', '.join(empty)}")
    return inside, labels, classes


def _part_of(path: Path, pictures: list[str], split: str) -> str:
    """The folder of a split, with a slash; empty where the folders are none of splits."""
    folders = sorted({name.split("/")[0] for name in pictures if "/" in name})
    found = {one: [f for f in folders if _split_name(f) in names] for one, names in _SPLITS.items()}
    known = [folder for some in found.values() for folder in some]
    if known and len(known) == len(folders):
        if not found[split]:
            raise ValueError(f"{path}: no folder of split {split!r} in it, only {', '.join(folders)}")
        rank = [_SPLITS[split].index(_split_name(folder)) for folder in found[split]]
        if rank.count(min(rank)) > 1:
            raise ValueError(f"{path}: which of {', '.join(found[split])} is split {split!r}? Give one of them")
        return found[split][rank.index(min(rank))] + "/"
    if all(found.values()):
        raise ValueError(f"{path}: are {', '.join(folders)} classes or splits? Give one of the folders in it")
    if split != "train":
        raise ValueError(f"{path}: no folder {split} in it, and so no split {split!r}")
    return ""


def _split_name(folder: str) -> str:
    """train of train2017 and training of training_set."""
    return re.split(r"[\d_-]", folder.lower())[0]


def _listed_labels(files: _Files, name: str) -> dict[str, Any] | None:
    """The labels of a dataset.json as EDM and StyleGAN write it, by names of files, empty where it says that there are
    none; None where it is another program's."""
    try:
        with files.open(name) as file:
            text = file.read(_LARGEST_LIST + 1)
        if len(text) > _LARGEST_LIST:
            raise ValueError(f"larger than {_LARGEST_LIST} bytes")
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("labels", ""), list | None):
            return None
        return {str(picture): label for picture, label in content["labels"] or []}
    except Exception as error:  # brackets in brackets, a damaged zip
        raise ValueError(f"{files.path / name}: no list of [picture, label] as 'labels' ({error})") from error


def _labels_of(path: Path, part: str, pictures: list[str], listed: dict[str, Any]) -> Pixels | None:
    if not listed:
        return None
    labels = []
    for name in pictures:
        label = listed.get(name[len(part) :])
        if isinstance(label, bool) or not isinstance(label, int) or not -(2**63) <= label < 2**63:
            got = short(repr(label))
            raise ValueError(
                f"{path / part}/dataset.json: the label of {name} must be an integer of 64 bits, got {got}"
            )
        labels.append(label)
    return np.asarray(labels, dtype=np.int64)


def _kinds(files: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in files.most_common(5))


def _some(names: list[str]) -> str:
    return f"{len(names)} pictures, such as {names[0]}," if len(names) > 1 else f"a picture, {names[0]},"
