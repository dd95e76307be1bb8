"""The arrays of a bank in an npz or npy file: where they lie, so that images can be mapped or streamed, and how they
are written."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pyels.bank.file_images import Pixels, check_complete
from pyels.bank.latents import SCHEMA, Latents
from pyels.checks import CPU, warn
from pyels.files import replacing
from pyels.records import parse_record

_LONGEST_HEADER = 1 << 14  # of an npy array; those of numbers take 128 bytes
_MOST_PACKED = 1032  # bytes that deflate makes one of, at most
_MOST_TEXT = 1 << 20  # bytes


def _names(split: str) -> list[tuple[str, str]]:
    """What arrays of images and of labels are called, by MedMNIST, by Keras, by pyels, and where nobody says."""
    alone = [("images", "labels"), ("arr_0", "arr_1")] if split == "train" else []
    return [(f"{split}_images", f"{split}_labels"), *((f"{x}_{split}", f"y_{split}") for x in "xX"), *alone]


@dataclass
class Stored:
    """An array in an npy file, or in the member of an npz file that is named."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # of its first value, in the file
    member: str | None = None
    compressed: bool = False
    channels_last: bool = False

    @property
    def in_place(self) -> bool:
        """Whether its bytes are those of images (N, C, H, W)."""
        reordered = self.fortran or (self.channels_last and self.shape[3] > 1)
        return not (self.compressed or reordered or self.dtype.hasobject)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(N, C, H, W)"""
        n, *others = self.shape
        if self.channels_last:
            others = [others[2], *others[:2]]
        return (n, 1, *others) if len(others) == 2 else (n, *others)

    def read(self, path: Path, mapped: bool = True) -> Pixels:
        if self.in_place and mapped:
            return np.memmap(path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        values: Pixels
        if self.member is None:
            values = np.load(path, allow_pickle=False)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(self.member) as member:
                values = np.lib.format.read_array(member, allow_pickle=False)
        return values

    def read_images(self, path: Path) -> Pixels:
        values = self.read(path)
        return (np.moveaxis(values, -1, 1) if self.channels_last else values).reshape(self.image_shape)


@dataclass
class Arrays:
    """What a file holds of a bank: its images, all of them there, and what belongs to them."""

    images: Stored
    labels: Pixels | None = None
    checksums: Pixels | None = None
    class_names: list[str] | None = None
    latents: Latents | None = None

    def __post_init__(self) -> None:
        """See whether the channels come last, which pyels itself, whose files have checksums, never writes."""
        shape, foreign = self.images.shape, self.checksums is None
        if len(shape) == 3 and shape[2] <= 4 < min(shape[:2]):
            raise ValueError(
                f"one picture of shape {shape}, rather than images (N, C, H, W), (N, H, W) or (N, H, W, C)"
            )
        self.images.channels_last = foreign and len(shape) == 4 and shape[3] <= 4 < min(shape[1:3])


def find_arrays(path: Path, split: str) -> Arrays:
    size = path.stat().st_size
    if path.suffix == ".npy":
        if split != "train":
            raise ValueError(f"an npy file has no splits, got split {split!r}")
        with open(path, "rb") as file:
            images = Stored(*_read_header(file), offset=file.tell())
        if not images.dtype.hasobject:
            check_complete(path, images.shape, images.dtype.itemsize, size - images.offset)
        return Arrays(images)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        _check_cut_off_archive(path, size, [f"{name}.npy" for name, _ in _names(split)])
        raise ValueError(
            "neither an npz nor an npy file; of pictures, or of a data set's own files, give the folder"
        ) from None
    with archive:
        members = [name.removesuffix(".npy") for name in archive.namelist()]
        found = next((pair for pair in _names(split) if pair[0] in members), None)
        if found is None:
            wanted = " or ".join(repr(name) for name, _ in _names(split))
            raise ValueError(f"no array {wanted} in it, only {members[:20]}")
        images = _find_member(path, archive, found[0])
        # The others are read at once, with zip's own checksum; they are small.
        prefix = found[0].removesuffix("images") if found[0].endswith("images") else "-"
        labels, checksums = (
            _of_each_image(path, archive, name, images.shape) if name in members else None
            for name in (found[1], f"{prefix}checksums")
        )
        if labels is None and (unused := _seem_labels(path, archive, members, images.shape)):
            warn(f"{path}: {unused!r} is not read as labels; call it {found[1]!r} if it holds such")
        if checksums is not None and (checksums.shape != images.shape[:1] or checksums.dtype != np.uint32):
            raise ValueError(
                f"'{prefix}checksums' must be CRC-32, uint32 of shape {images.shape[:1]}, "
                f"not {checksums.dtype} of {checksums.shape}"
            )
        names, latents = (
            _text(path, archive, name, dimensions) if name in members else None
            for name, dimensions in (("class_names", 1), ("latents", 0))
        )
        latents = None if latents is None else Latents.of(parse_record(latents, SCHEMA))
        return Arrays(images, labels, checksums, names, latents)


def _text(path: Path, archive: zipfile.ZipFile, name: str, dimensions: int) -> Any:
    """A text, or a list of texts."""
    found = _find_member(path, archive, name)
    if found.dtype.kind != "U" or len(found.shape) != dimensions or found.nbytes > _MOST_TEXT:
        wanted = "text of shape (n,)" if dimensions else "one text"
        raise ValueError(f"{name!r} must be {wanted}, not {found.dtype} of {found.shape}")
    return found.read(path, mapped=False).tolist()


def _seem_labels(path: Path, archive: zipfile.ZipFile, members: list[str], shape: tuple[int, ...]) -> str | None:
    """What may hold the labels of images under a name that nobody looks for."""
    stored = set(archive.namelist())
    some = [n for n in members if n.lower().rstrip("s") in ("label", "target", "y") and f"{n}.npy" in stored]
    each = (shape[:1], (*shape[:1], 1))
    return next((name for name in some if _find_member(path, archive, name).shape in each), None)


def _of_each_image(path: Path, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> Pixels:
    found = _find_member(path, archive, name)
    if found.shape not in (shape[:1], (*shape[:1], 1)):
        raise ValueError(f"{name!r} must have shape {shape[:1]}, one for each image, not {found.shape}")
    return found.read(path, mapped=False)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether in Fortran order, of an npy file or member."""
    version = np.lib.format.read_magic(file)
    short = version == (1, 0)
    length = file.read(2 if short else 4)
    if int.from_bytes(length, "little") > _LONGEST_HEADER:
        raise ValueError(f"a header of {int.from_bytes(length, 'little')} bytes is that of no array of numbers")
    header = io.BytesIO(length + file.read(int.from_bytes(length, "little")))
    try:
        read = np.lib.format.read_array_header_1_0 if short else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(header)
    except (MemoryError, RecursionError) as error:  # what Python says of brackets in brackets
        raise ValueError("the header is damaged") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape} in the header is damaged")
    return shape, dtype, fortran


def _find_member(path: Path, archive: zipfile.ZipFile, name: str) -> Stored:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            found = Stored(*_read_header(member), offset=0, member=info.filename, compressed=True)
            whole = found.dtype.hasobject or member.tell() + found.nbytes == info.file_size
        if not whole or info.file_size > _MOST_PACKED * info.compress_size:
            raise ValueError(f"{name!r} of shape {found.shape} is damaged: its size in the archive is another")
        return found
    # Not through the archive: of a small member it would compare the checksum already, which names no image.
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # the local header's name and extra field come before the data
        start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
        file.seek(start)
        found = Stored(*_read_header(file), offset=file.tell(), member=info.filename)
    if not found.dtype.hasobject:
        check_complete(path, found.shape, found.dtype.itemsize, start + info.file_size - found.offset)
    return found


def _check_cut_off_archive(path: Path, size: int, names: list[str]) -> None:
    """Name the first image missing from an npz file that has lost its end, and with it zip's directory, if what is left
    tells: goes from one member's own header to the next."""
    with open(path, "rb") as file:
        while len(header := file.read(30)) == 30 and header.startswith(b"PK\3\4"):
            method, stored, name_length, extra_length = struct.unpack("<8xH8xI4x2H", header)
            name, extra = file.read(name_length).decode(errors="replace"), file.read(extra_length)
            if stored == 0xFFFFFFFF and len(extra) >= 20:  # sizes of 64 bits, as numpy writes them
                stored = struct.unpack_from("<Q", extra, 12)[0]
            start = file.tell()
            if name in names and method == zipfile.ZIP_STORED:
                shape, dtype, _ = _read_header(file)
                check_complete(path, shape, dtype.itemsize, size - file.tell())
            file.seek(start + stored)


def write_arrays(
    path: str | Path,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    pieces: Iterable[Tensor],
    latents: Latents | None = None,
    **others: Any,
) -> None:
    """Write images, in pieces (n, C, H, W), their checksums, and the other arrays that there are as an uncompressed
    npz."""
    checksums = array("I")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {
                "descr": torch.empty(0, dtype=dtype, device=CPU).numpy().dtype.str,
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(member, header)
            for piece in pieces:
                pixels = piece.numpy()
                checksums.extend(map(zlib.crc32, pixels))
                member.write(pixels.data.cast("B"))
        if latents is not None:
            others["latents"] = json.dumps(latents.record())
        others = {"checksums": np.array(checksums, dtype=np.uint32), **others}
        for name, values in others.items():
            if values is None:
                continue
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)
