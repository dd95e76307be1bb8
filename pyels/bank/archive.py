"""The arrays of a bank in an npz or npy file: where they lie, so that images can be mapped or streamed, and how they
are written."""

from __future__ import annotations

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
from pyels.files import replacing


@dataclass
class Stored:
    """An array in an npy file, or in the member of an npz file that is named."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # of its first value, in the file
    member: str | None = None
    compressed: bool = False

    @property
    def in_place(self) -> bool:
        return not (self.compressed or self.fortran or self.dtype.hasobject)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

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


def find_arrays(path: Path, split: str) -> tuple[Stored, Pixels | None, Pixels | None]:
    """The images of a file, all of them there, its labels and its checksums."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        with open(path, "rb") as file:
            images = Stored(*_read_header(file), offset=file.tell())
        if images.in_place:
            check_complete(path, images.shape, images.dtype.itemsize, size - images.offset)
        return images, None, None
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        _check_cut_off_archive(path, size, ("images.npy", f"{split}_images.npy"))
        raise
    with archive:
        names = archive.namelist()
        prefix = "" if "images.npy" in names else f"{split}_"
        if f"{prefix}images.npy" not in names:
            raise ValueError(
                f"no array 'images' or '{split}_images' in it, only {[n.removesuffix('.npy') for n in names]}"
            )
        images = _find_member(path, archive, f"{prefix}images.npy")
        # These are read at once, with zip's own checksum; they are small.
        labels, checksums = (
            _find_member(path, archive, name).read(path, mapped=False) if name in names else None
            for name in (f"{prefix}labels.npy", f"{prefix}checksums.npy")
        )
    if checksums is not None and (checksums.shape != images.shape[:1] or checksums.dtype != np.uint32):
        raise ValueError(
            f"'{prefix}checksums' must be CRC-32, uint32 of shape {images.shape[:1]}, "
            f"not {checksums.dtype} of {checksums.shape}"
        )
    return images, labels, checksums


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether in Fortran order, of an npy file or member."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran


def _find_member(path: Path, archive: zipfile.ZipFile, name: str) -> Stored:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            return Stored(*_read_header(member), offset=0, member=name, compressed=True)
    # Not through the archive: of a small member it would compare the checksum already, which names no image.
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # the local header's name and extra field come before the data
        start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
        file.seek(start)
        found = Stored(*_read_header(file), offset=file.tell(), member=name)
    if found.in_place:
        check_complete(path, found.shape, found.dtype.itemsize, start + info.file_size - found.offset)
    return found


def _check_cut_off_archive(path: Path, size: int, names: tuple[str, ...]) -> None:
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
    labels: Tensor | None,
) -> None:
    """Write images, in pieces (n, C, H, W), their checksums, and labels as an uncompressed npz."""
    checksums = array("I")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            descr = np.dtype(np.uint8 if dtype == torch.uint8 else np.float32).str
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for piece in pieces:
                pixels = piece.numpy()
                checksums.extend(map(zlib.crc32, pixels))
                member.write(pixels.data.cast("B"))
        others = {"checksums": np.array(checksums, dtype=np.uint32)}
        if labels is not None:
            others["labels"] = labels.numpy()
        for name, values in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
