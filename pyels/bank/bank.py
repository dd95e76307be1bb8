"""The bank of training images that a machine draws on."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.bank.archive import find_arrays, write_arrays
from pyels.bank.file_images import DTYPES, BankFileError, FileImages, parse_bytes
from pyels.bank.selection import Selection, select
from pyels.checks import check_labels

_PIECE = 1 << 22  # bytes looked at in one go when all of a bank in memory is


class PatchBank:
    """Training images, stored as given: uint8 stays uint8, a memory map stays mapped, patches are never unfolded.

    A bank that `load` was given a `memory_limit` for, and that takes more, is streamed: machines read it from its file,
    a part at a time.

    Parameters
    ----------
    images  (N, C, H, W) uint8, standing for v / 127.5 - 1, or float32, made for [-1, 1] and refused beyond 10; torch
            tensor, in CPU memory or on a CUDA device, numpy array or np.memmap. The bank shares its memory.
    labels  (N,) integers, or None

    Raises
    ------
    TypeError   images are neither uint8 nor float32, or labels are not integers
    ValueError  wrong shapes, an empty bank, NaN or infinite pixels

    Attributes
    ----------
    images   (N, C, H, W) tensor; a ValueError where the bank is streamed, `read` gives some of them
    dtype    torch.uint8 or torch.float32
    streamed whether the images are in a file and read when needed
    labels   (N,) int64 tensor, or None
    classes  the distinct labels, ascending; empty without labels
    order    (N,) int64 image numbers, those of one class side by side, ascending within a class
    """

    def __init__(self, images: Any, labels: Any = None) -> None:
        self._file: FileImages | None = None  # where the images are, or are mapped from
        self._images: Tensor | None = None  # None: streamed
        self._checked: set[tuple[int, int | None]] = set()  # what of mapped images agrees with its checksums
        if isinstance(images, FileImages):  # from `load`, or a slice of such a bank
            self._file = images
        else:
            self._images = _as_tensor("images", images)
        stored = images if self._images is None else self._images
        if stored.dtype not in (torch.uint8, torch.float32):
            raise TypeError(
                f"images must be uint8 (0..255) or float32 (in [-1, 1]), got {stored.dtype}; convert them first"
            )
        if len(stored.shape) != 4:
            raise ValueError(f"images must have shape (N, C, H, W), got {tuple(stored.shape)}")
        if 0 in stored.shape:
            raise ValueError(f"the bank is empty: images have shape {tuple(stored.shape)}")
        self.dtype: torch.dtype = stored.dtype
        self._shape: tuple[int, int, int, int] = tuple(stored.shape)
        if self._images is not None:
            if self._images.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    "images must be in CPU memory or on a CUDA device, "
                    f"got device {self._images.device}; use images.cpu()"
                )
            self._images = self._images.contiguous()
            if self.dtype == torch.float32:
                _check_pixels(self.pieces())

        self.labels: Tensor | None = None
        self.order = torch.empty(0, dtype=torch.int64)
        self._ranges: dict[int, tuple[int, int]] = {}
        if labels is not None:
            given = _as_tensor("labels", labels).cpu()
            if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
                raise TypeError(f"labels must be integers, got {given.dtype}")
            if given.shape != (len(self),):
                raise ValueError(f"labels must have shape ({len(self)},), got {tuple(given.shape)}")
            self.labels = given.to(torch.int64)
            self.order = torch.argsort(self.labels, stable=True)
            values, counts = torch.unique(self.labels, return_counts=True)
            ends = counts.cumsum(0)
            for value, count, end in zip(values.tolist(), counts.tolist(), ends.tolist(), strict=True):
                self._ranges[value] = (end - count, end)

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        classes = f", {len(self._ranges)} classes" if self.labels is not None else ""
        return f"PatchBank({len(self)} images of {'x'.join(map(str, self.shape))} {self.dtype}{classes})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, c, h, w = self._shape
        return c, h, w

    @property
    def nbytes(self) -> int:
        """What the pixels take, wherever they are."""
        return int(np.prod(self._shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def path(self) -> Path | None:
        """The file that all images of this bank are in, mapped or streamed; None where there is no such file."""
        return self._file.path if self._file is not None and self._file.is_whole else None

    @property
    def streamed(self) -> bool:
        return self._images is None

    @property
    def memory_limit(self) -> int | None:
        """Bytes that the pixels of a streamed bank may take in memory; None: it is not streamed."""
        return self._file.memory_limit if self._images is None and self._file is not None else None

    @property
    def images(self) -> Tensor:
        if self._images is None:
            assert self._file is not None
            raise ValueError(
                f"the images of this bank stay in {self._file.path}, as its memory_limit asks for; use bank.read for "
                "some of them, or load it without a memory_limit"
            )
        return self._images

    @property
    def device(self) -> torch.device:
        """Where the images are; CPU memory, for a streamed bank."""
        return torch.device("cpu") if self._images is None else self._images.device

    def to(self, device: str | torch.device) -> PatchBank:
        """The same images and labels on another device, as `torch.Tensor.to`; a streamed bank stays in its file."""
        if self._images is None or self.device == torch.device(device):
            return self
        self.check_file()
        return PatchBank(self._images.to(device), self.labels)

    @property
    def classes(self) -> list[int]:
        return list(self._ranges)

    def __getitem__(self, part: slice) -> PatchBank:
        """The images of a slice, as a bank that shares this one's memory where the step is 1, or its file and limit."""
        if not isinstance(part, slice):
            raise TypeError(f"a bank is cut by slices, such as bank[:1000], got {type(part).__name__}")
        file = None if self._file is None else self._file[part]
        cut = PatchBank(
            file if self._images is None else self._images[part], None if self.labels is None else self.labels[part]
        )
        cut._file = file
        return cut

    def read(self, which: Tensor | slice) -> Tensor:
        """The chosen images as float32 in [-1, 1], (n, C, H, W), in CPU memory."""
        if self._images is not None:
            chosen = self._images[which.to(self.device) if isinstance(which, Tensor) else which].cpu()
        else:
            assert self._file is not None
            chosen = self._file.read(torch.arange(len(self))[which])
        return chosen.float() / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen

    def stream(self, which: range | Tensor | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """All images of a streamed bank, or those of the given numbers (n,), a part at a time and in this order.

        Yields their numbers, (n,) int64, and pixels as stored, (n, C, H, W), which are overwritten by the next part's.
        """
        if self._file is None or self._images is not None:
            raise ValueError("this bank is not streamed; use bank.images")
        yield from self._file.stream(range(len(self)) if which is None else which)

    def verify(self) -> bool:
        """Read the whole file and compare every image with the checksum that `save` wrote.

        Returns False where there are no checksums: the bank was not loaded from a file, or another program wrote it, or
        it is compressed (and was checked when loaded). Raises ValueError naming the file and the first damaged image.
        """
        if self._file is None or self._file.checksums is None:
            return False
        self._file.forget()
        self._checked.clear()
        if self._images is None:
            for _ in self.stream():
                pass
        else:
            self.check_file()
        return True

    def check_file(self, first: int = 0, last: int | None = None) -> None:
        """Raise ValueError if the file that the images are mapped from has been truncated, or if of images first ..
        last - 1 (looked at once) one is damaged. For use before mapped pixels are: beyond the end of its file, a map
        kills the process."""
        if self._file is not None and self._images is not None:
            self._file.check_length()
            if (first, last) not in self._checked:
                self._file.check(torch.arange(len(self))[first:last], self._images[first:last])
                self._checked.add((first, last))

    def check_selected(self, selection: Selection) -> None:
        """`check_file` of the images of a selection."""
        if self._file is not None and self._images is not None:
            self._file.check_length()
        for _, images, _ in selection.sets():
            if len(images):
                self.check_file(int(images[0]), int(images[-1]) + 1)

    def pieces(self, step: int = 1) -> Generator[Tensor, None, None]:
        """Every step-th image as stored, (n, C, H, W) in CPU memory, a bounded part at a time, each valid until the
        next."""
        if self._images is None:
            assert self._file is not None
            for _, pixels in self._file.stream(range(0, len(self), step)):
                yield pixels
        else:
            length = step * max(1, _PIECE * len(self) // max(1, self.nbytes))
            for start in range(0, len(self), length):
                yield self._images[start : start + length : step].cpu().contiguous()

    def select(self, labels: Any = None, images: Any = None, without: Any = None) -> Selection:
        """Which images count for each query, for `machine.denoise(.., selection=)`.

        Parameters
        ----------
        labels   (B,) integers: the images of each query's class; None: of all classes
        images   image numbers, for all queries, or a list of them for each: only these
        without  likewise: all but these

        Raises
        ------
        TypeError, ValueError  numbers that are none of the bank's, a class without images, a query that is left none
        """
        if labels is not None:
            labels = [labels] if isinstance(labels, int) else labels
            labels = check_labels(labels, len(labels))
        return select(len(self), self.order, self.class_range, labels, images, without)

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
        crc = 0
        with closing(self.pieces(step)) as pieces:
            for piece in pieces:
                crc = zlib.crc32(piece.numpy().data, crc)
        if self.labels is not None:
            crc = zlib.crc32(self.labels.numpy().tobytes(), crc)
        return f"{crc:08x}"

    def save(self, path: str | Path) -> None:
        """Write the bank as an uncompressed npz with arrays `images`, `labels` and `checksums`, for `load`.

        `checksums` is the CRC-32 of every image's bytes, (N,) uint32. Written to a temporary name first, so that a
        failure leaves no half-written bank.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: a bank is saved as .npz")
        self.check_file()  # no new checksums for what was damaged before
        with closing(self.pieces()) as pieces:
            write_arrays(path, self._shape, self.dtype, pieces, self.labels)

    @classmethod
    def load(cls, path: str | Path, split: str = "train", memory_limit: int | str | None = None) -> PatchBank:
        """Read an npz with arrays `images` (N, C, H, W) and, optionally, `labels` (N,), or an npy of images alone.

        An npz may instead hold `train_images`, `train_labels` and `test_images`, `test_labels`, of which `split`
        chooses. What is stored uncompressed stays on disk, mapped into memory for reading only.

        Parameters
        ----------
        path          the file
        split         "train" or "test"
        memory_limit  bytes, or text such as "500MB", "2GB", "1.5GiB": the most that the pixels of this bank and of all
                      its slices take of this process's memory at any time, what is read ahead included. Where they take
                      more, the bank is streamed: machines read it a part at a time, with the same results to rounding.
                      The engine's own memory (at most 256 MB), labels (16 bytes an image), checksums (5 bytes) and what
                      `read` returns come on top. None: no limit

        Raises
        ------
        FileNotFoundError  no such file
        ValueError         not a bank; a truncated or damaged file, named with the number of the image in it, also when
                           it is only found out while a streamed bank is used; a limit that does not hold two images, or
                           that compressed images exceed
        """
        path = Path(path)
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            images, labels, checksums = find_arrays(path, split)
            if limit is not None and images.nbytes <= limit:
                limit = None
            file = None
            if images.in_place and images.dtype in DTYPES and len(images.shape) == 4 and 0 not in images.shape:
                file = FileImages(path, images.offset, images.shape, images.dtype, checksums, limit)
            if limit is None:
                bank = cls(images.read(path), labels)
                bank._file = file
            elif file is None:
                raise BankFileError(
                    f"{path}: its images take {images.nbytes} bytes, more than the memory_limit of {limit}, and only "
                    "uncompressed uint8 or float32 images are streamed; save them with PatchBank.save"
                )
            else:
                bank = cls(file, labels)
                if bank.dtype == torch.float32:
                    with closing(bank.pieces()) as pieces:
                        _check_pixels(pieces)
            return bank
        except (PermissionError, MemoryError, BankFileError):
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path}: not a readable bank ({error})") from error


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


def _check_pixels(pieces: Iterable[Tensor]) -> None:
    """Look at every pixel of a float bank."""
    largest, start = 0.0, 0
    for piece in pieces:
        for chunk in torch.split(piece, max(1, _PIECE // (4 * piece[0].numel()))):  # each is copied once or twice
            finite = torch.isfinite(chunk).flatten(1).all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"images hold NaN or infinite pixels, first in image {start + int((~finite).int().argmax())}"
                )
            largest = max(largest, float(chunk.abs().max()))
            start += len(chunk)
    if largest > 10:
        raise ValueError(
            f"float32 images must lie in [-1, 1], but reach {largest:.4g}; give 0..255 values as uint8, or scale them"
        )
