"""The bank of training images that a machine draws on."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.files import replacing

_CHUNK = 1 << 26  # values looked at in one go when a whole bank is checked


class PatchBank:
    """Training images, stored as given: uint8 stays uint8, a memory map stays mapped, patches are never unfolded.

    Parameters
    ----------
    images  (N, C, H, W) uint8, standing for v / 127.5 - 1, or float32, made for [-1, 1] and refused beyond 10; torch
            tensor, numpy array or np.memmap. The bank shares its memory.
    labels  (N,) integers, or None

    Raises
    ------
    TypeError   images are neither uint8 nor float32, or labels are not integers
    ValueError  wrong shapes, an empty bank, NaN or infinite pixels

    Attributes
    ----------
    images   (N, C, H, W) tensor
    labels   (N,) int64 tensor, or None
    classes  the distinct labels, ascending; empty without labels
    order    (N,) int64 image numbers, those of one class side by side, ascending within a class
    """

    def __init__(self, images: Any, labels: Any = None) -> None:
        self.images = _as_tensor("images", images)
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise TypeError(
                f"images must be uint8 (0..255) or float32 (in [-1, 1]), got {self.images.dtype}; convert them first"
            )
        if self.images.dim() != 4:
            raise ValueError(f"images must have shape (N, C, H, W), got {tuple(self.images.shape)}")
        if self.images.numel() == 0:
            raise ValueError(f"the bank is empty: images have shape {tuple(self.images.shape)}")
        if self.images.device.type != "cpu":
            raise ValueError(f"images must be in CPU memory, got device {self.images.device}; use images.cpu()")
        self.images = self.images.contiguous()
        if self.images.dtype == torch.float32:
            _check_pixels(self.images)

        self.labels: Tensor | None = None
        self.order = torch.empty(0, dtype=torch.int64)
        self._ranges: dict[int, tuple[int, int]] = {}
        if labels is not None:
            given = _as_tensor("labels", labels)
            if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
                raise TypeError(f"labels must be integers, got {given.dtype}")
            if given.shape != (len(self.images),):
                raise ValueError(f"labels must have shape ({len(self.images)},), got {tuple(given.shape)}")
            self.labels = given.to(torch.int64)
            self.order = torch.argsort(self.labels, stable=True)
            values, counts = torch.unique(self.labels, return_counts=True)
            ends = counts.cumsum(0)
            for value, count, end in zip(values.tolist(), counts.tolist(), ends.tolist(), strict=True):
                self._ranges[value] = (end - count, end)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        classes = f", {len(self._ranges)} classes" if self.labels is not None else ""
        return f"PatchBank({len(self)} images of {'x'.join(map(str, self.shape))} {self.images.dtype}{classes})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def classes(self) -> list[int]:
        return list(self._ranges)

    def __getitem__(self, part: slice) -> PatchBank:
        """The images of a slice, as a bank that shares this one's memory where the step is 1."""
        if not isinstance(part, slice):
            raise TypeError(f"a bank is cut by slices, such as bank[:1000], got {type(part).__name__}")
        return PatchBank(self.images[part], None if self.labels is None else self.labels[part])

    def read(self, which: Tensor | slice) -> Tensor:
        """The chosen images as float32 in [-1, 1], (n, C, H, W)."""
        chosen = self.images[which]
        return chosen.float() / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen

    def class_range(self, label: int) -> tuple[int, int]:
        """Where a class begins and ends in `order`. Raises ValueError for a class with no images."""
        if self.labels is None:
            raise ValueError("labels were given, but the bank has none; build it with PatchBank(images, labels)")
        if label not in self._ranges:
            raise ValueError(f"label {label}: no images of this class in the bank, which has classes {self.classes}")
        return self._ranges[label]

    def fingerprint(self) -> str:
        """CRC-32, in hex, of the labels and of every image of a small bank, or 1,000 to 2,000 evenly spaced ones of a
        large one."""
        step = max(1, len(self) // 1000)
        crc = zlib.crc32(self.images[::step].contiguous().numpy().tobytes())
        if self.labels is not None:
            crc = zlib.crc32(self.labels.numpy().tobytes(), crc)
        return f"{crc:08x}"

    def save(self, path: str | Path) -> None:
        """Write the bank as an uncompressed npz with arrays `images` and `labels`, which `load` maps into memory.

        Written to a temporary name first, so that a failure leaves no half-written bank.
        """
        arrays = {"images": self.images.numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: a bank is saved as .npz")
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, split: str = "train") -> PatchBank:
        """Read an npz with arrays `images` (N, C, H, W) and, optionally, `labels` (N,), or an npy of images alone.

        An npz may instead hold `train_images`, `train_labels` and `test_images`, `test_labels`, of which `split`
        chooses. What is stored uncompressed stays on disk, mapped into memory for reading only. Raises ValueError
        naming a damaged file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            if path.suffix == ".npy":
                return cls(np.load(path, mmap_mode="r", allow_pickle=False))
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                prefix = "" if "images.npy" in names else f"{split}_"
                if f"{prefix}images.npy" not in names:
                    raise ValueError(
                        f"no array 'images' or '{split}_images' in it, only {[n.removesuffix('.npy') for n in names]}"
                    )
                images = _read_member(path, archive, f"{prefix}images.npy")
                has_labels = f"{prefix}labels.npy" in names
                labels = _read_member(path, archive, f"{prefix}labels.npy") if has_labels else None
            return cls(images, labels)
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path}: not a readable bank ({error})") from error


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """An array of an npz file: mapped where it is stored uncompressed, read otherwise."""
    info = archive.getinfo(name)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        data_offset = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with archive.open(info) as member:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # the local header's name and extra field come before the data
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
    start = info.header_offset + 30 + int(name_length) + int(extra_length) + data_offset
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, (list, tuple, range)):
        values = np.asarray(values)
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(values).__name__}")
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numeric, got dtype {values.dtype}")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind == "u" and values.dtype.itemsize > 1 and name == "labels":
        values = values.astype(np.int64)
    with warnings.catch_warnings():
        # torch warns of read-only arrays because it could write to them; a bank never does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(values))


def _check_pixels(images: Tensor) -> None:
    """Look at every pixel of a float bank, a bounded part at a time."""
    step = max(1, _CHUNK // images[0].numel())
    largest = 0.0
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        finite = torch.isfinite(chunk).flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"images hold NaN or infinite pixels, first in image {start + int((~finite).int().argmax())}"
            )
        largest = max(largest, float(chunk.abs().max()))
    if largest > 10:
        raise ValueError(
            f"float32 images must lie in [-1, 1], but reach {largest:.4g}; give 0..255 values as uint8, or scale them"
        )
