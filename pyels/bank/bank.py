"""The bank of training images that a machine draws on."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyels.bank.archive import find_arrays, write_arrays
from pyels.bank.file_images import DTYPES, BankFileError, FileImages, parse_bytes
from pyels.bank.latents import Latents
from pyels.bank.pixels import PIECE, check_pixels, looks_channels_last
from pyels.bank.selection import Selection, image_numbers, select
from pyels.checks import CPU, check_labels, warn
from pyels.mapped import Stamp, guard


class PatchBank:
    """Training images, stored as given: uint8 stays uint8, a memory map stays mapped, patches are never unfolded.

    A bank that `load` was given a `memory_limit` for, and that takes more, is streamed: machines read it from its file,
    a part at a time.

    Parameters
    ----------
    images       (N, C, H, W) uint8, standing for v / 127.5 - 1, or float32, of pictures in [-1, 1], of latents up to
                 1e6; torch tensor, in CPU memory or on a CUDA device, numpy array or np.memmap. The bank shares its
                 memory. float16 and bfloat16 are taken too, and become float32
    labels       (N,) or (N, 1) integers, or None
    class_names  what the classes 0, 1, .. are called, or None
    latents      where the images are latents that an autoencoder made, by which, and how they were scaled

    Raises
    ------
    TypeError   images are of another type, or labels are not integers
    ValueError  wrong shapes, an empty bank, NaN or infinite pixels, values that are not in [-1, 1] but seem meant to be

    Warns
    -----
    UserWarning  images look like (N, H, W, C), or like values in [0, 1], masks of 0 and 1, or normalised otherwise

    Attributes
    ----------
    images       (N, C, H, W) tensor; a ValueError where the bank is streamed, `read` gives some of them
    dtype        torch.uint8 or torch.float32
    streamed     whether the images are in a file and read when needed
    shared       whether somebody else may hold the memory of the images: not where `pyels.datasets.load` read them, and
                 what is written there through numpy views is not noticed
    labels       (N,) int64 tensor, or None
    classes      the distinct labels, ascending; empty without labels
    class_names  as given
    latents      as given; None: the images are pictures, or nobody said
    order        (N,) int64 image numbers, those of one class side by side, ascending within a class
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        latents: Latents | None = None,
    ) -> None:
        stored = images if isinstance(images, FileImages) else _as_tensor("images", images)
        if isinstance(stored, Tensor) and stored.dtype in (torch.float16, torch.bfloat16):
            stored = stored.float()
        if stored.dtype not in (torch.uint8, torch.float32):
            raise TypeError(
                f"images must be uint8 (0..255) or float32 (in [-1, 1]), got {stored.dtype}; convert them first"
            )
        if len(stored.shape) != 4:
            grey = "; of grey images (N, H, W), give images[:, None]" if len(stored.shape) == 3 else ""
            raise ValueError(f"images must have shape (N, C, H, W), got {tuple(stored.shape)}{grey}")
        if 0 in stored.shape:
            raise ValueError(f"the bank is empty: images have shape {tuple(stored.shape)}")
        if isinstance(stored, Tensor):
            if stored.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"images must be in CPU memory or on a CUDA device, got device {stored.device}; use images.cpu()"
                )
            stored = stored.contiguous()
        class_names = class_names.tolist() if isinstance(class_names, np.ndarray) else class_names
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names or []):
            raise TypeError(f"class_names must be a list of text, of classes 0, 1, .., got {class_names!r:.60}")
        if latents is not None and len(latents.shift) != stored.shape[1]:
            raise ValueError(f"the latents have {len(latents.shift)} channels, but the images {stored.shape[1]}")
        self.latents = latents
        self._hold(stored, self._checked_labels(labels, stored.shape[0]), class_names, _mapped(images, stored))
        if latents is None and not isinstance(stored, FileImages) and looks_channels_last(stored.shape):
            n, c, h, w = stored.shape
            warn(
                f"images of shape ({n}, {c}, {h}, {w}) are taken as {c} channels of {h}x{w}; if (N, H, W, C) is meant, "
                "give images.transpose(0, 3, 1, 2) of an array, images.permute(0, 3, 1, 2) of a tensor"
            )
        with closing(self.pieces()) as pieces:
            check_pixels(pieces, self.shape[0], latents is not None)
        self.check_unchanged()  # from here on

    def _hold(
        self,
        stored: Tensor | FileImages,
        labels: Tensor | None,
        class_names: Sequence[str] | None,
        mapped: Stamp | None = None,
    ) -> None:
        """Take what has been checked."""
        self._file = stored if isinstance(stored, FileImages) else None  # where the images are, or are mapped from
        self._images = None if isinstance(stored, FileImages) else stored  # None: streamed
        self._mapped = mapped  # of an np.memmap
        self.shared = True  # whether somebody else may hold the memory of the images, as whoever gave them does
        self._as_made: Any = None  # see `check_unchanged`
        self._in_place: PatchBank | None = None  # see `in_place`
        self._fingerprint: str | None = None
        self._checked: set[tuple[int, int | None]] = set()  # what of mapped images agrees with its checksums
        self.dtype: torch.dtype = stored.dtype
        n, c, h, w = stored.shape
        self._shape = (n, c, h, w)
        self.class_names = None if class_names is None else list(class_names)
        self.labels = labels
        self.order = torch.empty(0, dtype=torch.int64, device=CPU)
        self._ranges: dict[int, tuple[int, int]] = {}
        if labels is not None:
            self.order = torch.argsort(labels, stable=True)
            values, counts = torch.unique(labels, return_counts=True)
            ends = counts.cumsum(0)
            for value, count, end in zip(values.tolist(), counts.tolist(), ends.tolist(), strict=True):
                self._ranges[value] = (end - count, end)

    def _like(self, stored: Tensor | FileImages, labels: Tensor | None) -> PatchBank:
        """A bank of images of this one, which need no second look."""
        bank = object.__new__(PatchBank)
        bank.latents = self.latents
        bank._hold(stored, labels, self.class_names)
        return bank

    @staticmethod
    def _checked_labels(labels: Any, count: int) -> Tensor | None:
        if labels is None:
            return None
        given = _as_tensor("labels", labels).cpu()
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {given.dtype}")
        if given.shape not in ((count,), (count, 1)):
            raise ValueError(f"labels must have shape ({count},), got {tuple(given.shape)}")
        whole = given.to(torch.int64, copy=True).flatten()
        if given.dtype == torch.uint64 and bool((whole < 0).any()):
            raise ValueError("labels must be below 2^63; number the classes 0, 1, ..")
        return whole

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        classes = f", {len(self._ranges)} classes" if self.labels is not None else ""
        return f"PatchBank({len(self)} images of {'x'.join(map(str, self.shape))} {self.dtype}{classes})"

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        from pyels.notebook import png_of_bank

        return png_of_bank(self)

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
        there = self._like(self._images.to(device), self.labels)
        self.check_unchanged(after=True)
        return there

    @property
    def classes(self) -> list[int]:
        return list(self._ranges)

    def name_of(self, label: int) -> str:
        """A class in words: its number, and its name where it has one."""
        named = self.class_names is not None and 0 <= label < len(self.class_names)
        return f"{label} ({self.class_names[label]})" if self.class_names is not None and named else str(label)

    def __getitem__(self, part: Any) -> PatchBank:
        """Some of the images, as a bank: of a slice, one that shares this one's memory where the step is 1, or its file
        and limit; of image numbers (n,) or a mask (N,), in memory, or in the file where this one is streamed."""
        if not isinstance(part, slice):
            part = self._numbers(part)
        if len(range(len(self))[part] if isinstance(part, slice) else part) == 0:
            raise ValueError(f"the bank is empty: none of its {len(self)} images was asked for")
        file = None if self._file is None else self._file[part]
        if self._images is None:
            assert file is not None
            stored: Tensor | FileImages = file
        else:
            self.check_file(0, 0)
            stored = self._images[part if isinstance(part, slice) else part.to(self.device)].contiguous()
        cut = self._like(stored, None if self.labels is None else self.labels[part])
        cut.shared = self.shared
        if isinstance(stored, FileImages) or _is_same_memory(stored, self.images):
            cut._file, cut._mapped = file, self._mapped
        elif file is not None:  # a copy, which has nothing more to do with the file
            file.check(torch.arange(len(cut), device=CPU), stored)
        self.check_unchanged(after=True)
        return cut

    def stacked(self) -> PatchBank:
        """The same images, with the channels below each other, (1, C*H, W)."""
        bank = object.__new__(PatchBank)
        bank.__dict__.update(self.__dict__)
        n, c, h, w = self._shape
        bank._shape = n, 1, c * h, w
        bank._images = None if self._images is None else self._images.view(bank._shape)
        bank._file = None if self._file is None else self._file.of_shape(*bank.shape)
        bank._in_place = None
        return bank

    def __getstate__(self) -> dict[str, Any]:
        self.check_file()
        own = {"_mapped": None, "_as_made": None, "_in_place": None} | ({} if self.streamed else {"_file": None})
        return {**self.__dict__, **own}  # images of its own

    def _numbers(self, part: Any) -> Tensor:
        if not isinstance(part, (Tensor, np.ndarray, list, tuple, range)):
            raise TypeError(f"a bank is cut by a slice, image numbers or a mask, got {type(part).__name__}")
        mask = _as_tensor("bank[..]", part).cpu()
        if mask.dtype != torch.bool:
            return image_numbers(len(self), "bank[..]", part)
        if mask.shape != (len(self),):
            raise ValueError(f"a mask must have shape ({len(self)},), got {tuple(mask.shape)}")
        return mask.nonzero()[:, 0]

    def read(self, which: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The chosen images as float32 or float64 in [-1, 1], (n, C, H, W), in CPU memory."""
        if self._images is not None:
            self.check_file(0, 0)
            chosen = self._images[which.to(self.device) if isinstance(which, Tensor) else which].cpu()
        else:
            assert self._file is not None
            chosen = self._file.read(torch.arange(len(self), device=CPU)[which])
        chosen = chosen.to(dtype) / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen.to(dtype)
        self.check_unchanged(after=True)
        return chosen

    def stream(
        self, which: range | Tensor | None = None, patience: float = 60.0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """All images of a streamed bank, or those of the given numbers (n,), a part at a time and in this order.

        Yields their numbers, (n,) int64, and pixels as stored, (n, C, H, W), which are overwritten by the next part's.
        Other threads that need the bank wait until the end; in one that has waited while the caller was busy with a
        single part for more than `patience` seconds, as it is where it waits for that thread, ValueError is raised.
        """
        if self._file is None or self._images is not None:
            raise ValueError("this bank is not streamed; use bank.images")
        yield from self._file.stream(range(len(self)) if which is None else which, patience)

    def in_place(self) -> PatchBank:
        """The same images; those of a streamed bank mapped from its file, for whoever looks at single ones here and
        there. Of a map, memory holds what the system has room for, and no `memory_limit` counts that.

        Raises ValueError for images that are float16 in the file, or not side by side.
        """
        if self._file is None or self._images is not None:
            return self
        if self._in_place is None:
            file, pixels = self._file.mapped()
            stored = _as_tensor("images", pixels)
            there = self._like(stored, self.labels)
            there._file, there._mapped, there._fingerprint = file, _mapped(pixels, stored), self._fingerprint
            self._in_place = there
        return self._in_place

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
            if self._file.check_written():
                self._checked.clear()
            if (first, last) not in self._checked:
                self._file.check(torch.arange(len(self), device=CPU)[first:last], self._images[first:last])
                self._checked.add((first, last))

    def check_selected(self, selection: Selection) -> None:
        """`check_file` of the images of a selection."""
        for _, images, _ in selection.sets():
            if len(images):
                self.check_file(int(images[0]), int(images[-1]) + 1)

    def pieces(self) -> Generator[Tensor, None, None]:
        """All images as stored, (n, C, H, W) in CPU memory, a bounded part at a time, each valid until the next."""
        if self._images is None:
            assert self._file is not None
            for _, pixels in self._file.stream(range(len(self))):
                yield pixels
        else:
            self.check_file(0, 0)
            length = max(1, PIECE * len(self) // max(1, self.nbytes))
            for part in torch.split(self._images, length):
                yield part.cpu()
            self.check_unchanged(after=True)  # or what was cut off of a mapped file would be zeros

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
            labels = [labels] if getattr(labels, "ndim", int(hasattr(labels, "__len__"))) == 0 else labels
            labels = check_labels(labels, len(labels))
        return select(len(self), self.order, self.class_range, labels, images, without)

    def selection_of(self, labels: Tensor | None, selection: Selection | None, batch: int) -> Selection:
        """Which images count for so many queries, by their labels or by a selection."""
        if selection is None:
            return self.select(labels).expand(batch)
        if labels is not None:
            raise ValueError("labels and selection were given; select the labels too, with bank.select(labels=..)")
        if selection.bank_size != len(self):
            raise ValueError(
                f"the selection is of a bank of {selection.bank_size} images, but the machine's has {len(self)}; "
                "use machine.bank.select(..)"
            )
        return selection.expand(batch)

    def class_range(self, label: int) -> tuple[int, int]:
        """Where a class begins and ends in `order`. Raises ValueError for a class with no images."""
        if self.labels is None:
            raise ValueError("labels were given, but the bank has none; build it with PatchBank(images, labels)")
        if label not in self._ranges:
            count, shown = len(self.classes), self.classes[:20]
            among = f"{shown}" if count == len(shown) else f"{', '.join(map(str, shown))} and {count - len(shown)} more"
            raise ValueError(f"label {label}: no images of this class in the bank, which has classes {among}")
        return self._ranges[label]

    def fingerprint(self) -> str:
        """CRC-32, in hex, of every image and of the labels: at 1 to 2 GB/s, once for a bank."""
        self.check_unchanged()
        if self._fingerprint is None:
            crc = 0
            with closing(self.pieces()) as pieces:
                for piece in pieces:
                    crc = zlib.crc32(piece.numpy().data, crc)
            if self.labels is not None:
                crc = zlib.crc32(self.labels.numpy().tobytes(), crc)
            self._fingerprint = f"{crc:08x}"
        return self._fingerprint

    def check_unchanged(self, after: bool = False) -> None:
        """Raise ValueError if the images are no longer those that they were when the bank was made.

        Of images in memory that somebody else may hold every byte is looked at, at about 1 GB/s a thread; of others,
        and of images on a GPU, how often torch has changed them (not what is written through numpy views of them), and
        of a file, when it was last written. `after` they were used, a file must not have been written to at all, and
        memory is left to the next call.
        """
        if self._images is None:
            return  # the file is looked at whenever it is read
        if self._file is not None:
            if after:
                self._file.check_written(again=False)
            else:
                self.check_file(0, 0)
            return
        if self._mapped is not None and self._mapped.is_old():
            raise ValueError(f"{self._mapped.path}: has been written to since it was mapped; map it again")
        if not after and (self._mapped is None or self._mapped.of_size):
            # Tensors that were made in torch.inference_mode do not count their changes.
            look = self._images.is_inference() or (self.shared and not self._images.is_cuda)
            state = look, self._checksums(self._images) if look else self._images._version
            if self._as_made is None or self._as_made[0] != look:
                self._as_made = state
            if state != self._as_made:
                raise ValueError(
                    "the images of this bank have been changed since it was made; make a new bank of them, or change a "
                    "copy"
                )

    @staticmethod
    def _checksums(images: Tensor) -> list[int]:
        length = max(1, PIECE // max(1, images[0].nbytes))
        parts = [part.cpu().numpy().data for part in torch.split(images, length)]
        if len(parts) == 1:
            return [zlib.crc32(parts[0])]
        with ThreadPoolExecutor() as pool:  # zlib works without the GIL
            return list(pool.map(zlib.crc32, parts))

    def save(self, path: str | Path) -> None:
        """Write the bank as an uncompressed npz with arrays `images`, `labels` and `checksums`, for `load`.

        `checksums` is the CRC-32 of every image's bytes, (N,) uint32. Written to a temporary name first, so that a
        failure leaves no half-written bank.
        """
        path = Path(path).expanduser()
        if path.suffix != ".npz":
            raise ValueError(f"{path}: a bank is saved as .npz")
        self.check_file()  # no new checksums for what was damaged before
        with closing(self.pieces()) as pieces:
            others = {"labels": self.labels, "class_names": self.class_names}
            write_arrays(path, self._shape, self.dtype, pieces, self.latents, **others)

    @classmethod
    def load(cls, path: str | Path, split: str = "train", memory_limit: int | str | None = None) -> PatchBank:
        """Read an npz with arrays `images` (N, C, H, W) and, optionally, `labels` (N,), or an npy of images alone.

        An npz may instead hold `train_images`, `train_labels` and `test_images`, `test_labels`, or `x_train`,
        `y_train` and so on, of which `split` chooses. Files that `save` did not write may also hold (N, H, W), and
        (N, H, W, C) of up to 4 channels where height and width are more. What is stored uncompressed stays on disk,
        mapped into memory for reading only.

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
        path = Path(path).expanduser()
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        try:
            found = find_arrays(path, split)
            images, others = found.images, (found.labels, found.class_names, found.latents)
            takes = images.nbytes * (2 if images.dtype == np.float16 else 1)  # as float32
            if limit is not None and takes <= limit:
                limit = None
            file = None
            if images.in_place and images.dtype in DTYPES and len(images.image_shape) == 4 and images.nbytes:
                file = FileImages(path, images.offset, images.image_shape, images.dtype, found.checksums, limit)
            if limit is None:
                bank = cls(images.read_images(path), *others)
                bank._file = file
            elif file is None:
                raise BankFileError(
                    f"{path}: its images take {takes} bytes, more than the memory_limit of {limit}, and only "
                    "uncompressed uint8, float16 or float32 images (N, C, H, W) are streamed; save them with "
                    "PatchBank.save"
                )
            else:
                bank = cls(file, *others)
            return bank
        except (PermissionError, MemoryError, BankFileError):
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path}: not a readable bank ({error})") from error


def check_bank(bank: PatchBank) -> PatchBank:
    if not isinstance(bank, PatchBank):
        raise TypeError(f"bank must be a pyels.PatchBank, got {type(bank).__name__}; use PatchBank(images, labels)")
    return bank


def _mapped(images: Any, stored: Tensor | FileImages) -> Stamp | None:
    """The file of an np.memmap, or of a view of one, that the images are in, guarded against its being cut off. Of one
    that is written to through the map only the size says anything."""
    while isinstance(images, np.ndarray) and not isinstance(images, np.memmap):
        images = images.base
    if not isinstance(images, np.memmap) or images._mmap is None or not isinstance(stored, Tensor):  # type: ignore[attr-defined]
        return None
    pages = np.frombuffer(images._mmap, np.uint8)  # type: ignore[attr-defined]
    first = stored.data_ptr() - pages.ctypes.data
    if not 0 <= first <= first + stored.nbytes <= len(pages):
        return None  # a copy
    guard([stored], images._mmap)  # type: ignore[attr-defined]
    try:
        return None if images.filename is None else Stamp.of(images.filename, of_size=images.mode != "r")
    except OSError:
        return None  # deleted


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, (list, tuple, range)):
        if len(values) and hasattr(values[0], "getbands"):
            raise TypeError(f"{name} are PIL images; give pyels.datasets.from_pairs pairs of image and label")
        values = np.asarray(values)
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(values).__name__}")
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise TypeError(f"{name} must be numeric, got dtype {values.dtype}")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # torch warns of read-only arrays because it could write to them; a bank never does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(values))
