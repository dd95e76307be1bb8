"""Engine "cuda": where the images lie that a GPU works on.

The kernels are reached by the same operator as the cpu engine's, which runs where its tensors are. What is left to do
here is to bring the images there: all of them, once, where they fit; else a part at a time, the next one on its way
while the GPU works on the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import pyels._core as _core
from pyels._core import FLOAT32_REACH
from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, checked, is_captured
from pyels.definition import Definition, WholeImage
from pyels.denoiser import Query
from pyels.engines.engine import beyond_float32
from pyels.engines.exact import Exact, Part, chunks
from pyels.posterior import PartialPosterior, Want
from pyels.second import Answers, Asked, moved

OLDEST = 8, 0  # compute capability
# Of the memory that is free on the device, what the images may take; more is left to networks and to results.
SHARE = 0.6
CHUNK_BYTES = 1 << 27
PRECISIONS = ("highest", "high")
_bringing = threading.Lock()


def check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def check_device(device: Any) -> torch.device:
    if device is None:
        return default_device()
    given = torch.device(device)
    if given.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    return given if given.index is not None else default_device()


@dataclass(eq=False)
class Cuda(Exact):
    """Exact, float32, on an NVIDIA GPU; a bank in CPU memory is brought there.

    Parameters
    ----------
    precision  "highest"  exact to float32 rounding
               "high"     inner products of small windows (k * k * C <= 80) of a uint8 bank may be taken on tensor
                          cores: means keep to the same bound, 1e-4, but log-weights err by up to 2e-3, mostly all of a
                          pixel alike, if x = alpha * x0 + sigma * noise with x0 within [-1, 1]; where they would err by
                          more, and for a second pass, the same as "highest"
    device     the GPU; by default the one that torch uses in this thread
    """

    name: ClassVar[str] = "cuda"
    knows: ClassVar[tuple[str, ...]] = ("second",)
    precision: str = checked(PRECISIONS[0], check_precision)
    device: torch.device = checked(None, lambda device: check_device(device))
    # The last bank of which all images were brought to the device, and there its images and their order by class.
    _brought: tuple[PatchBank, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @classmethod
    def missing(cls) -> str | None:
        return missing()

    def cannot(self, definition: Definition, bank: PatchBank) -> str | None:
        if bank.device not in (CPU, self.device):
            return f"works on {self.device}, but the bank is on {bank.device}; use bank.to('{self.device}')"
        return self.lacks(definition)

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        if is_captured(query.x) and (self._brought is None or self._brought[0] is not bank):
            raise RuntimeError("call the machine once before a CUDA graph captures it: then its bank is on the GPU")
        if is_captured(query.x) and selection.order is not None and selection.order is not bank.order:
            raise RuntimeError("a CUDA graph cannot capture lists of images; select by labels, or leave the graph out")
        if beyond := beyond_float32(query):
            raise ValueError(
                f"sigma = {float(query.sigma[beyond].max()):g}: the largest pixel of x is more than {FLOAT32_REACH:g} "
                "sigma, beyond what engine 'cuda' computes in float32; use engine='cpu', or a larger sigma"
            )
        there = replace(query, x=query.x.to(self.device))
        want |= Want.MEAN  # which its kernels always find
        return super().evaluate(definition, bank, selection, there, want).to(query.x.device)

    def answer(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, asked: Asked
    ) -> Answers:
        if isinstance(definition.window, WholeImage) or asked.influence or asked.top:
            raise ValueError(
                "engine 'cuda' has folds, variances and derivatives of squares, but no influence and no sources, and "
                "nothing of the kind for whole images; use engine='cpu'"
            )
        if is_captured(query.x):
            raise RuntimeError("a CUDA graph cannot capture folds, variances and derivatives; leave the graph out")
        there = replace(query, x=query.x.to(self.device))
        answers = super().answer(definition, bank, selection, there, moved(asked, self.device))
        return moved(answers, query.x.device)

    def compiled_options(self) -> dict[str, Any]:
        return {"tensor_cores": self.precision == "high"}

    def parts(self, bank: PatchBank, selection: Selection) -> Generator[Part, None, None]:
        if not bank.streamed:
            bank.check_selected(selection)
            if (brought := self._bring(bank)) is not None:
                _, images, order = brought
                yield images, selection if selection.order is not bank.order else replace(selection, order=order), None
                return
        which = selection.images()
        some = bank.stream(which) if bank.streamed else chunks(bank.images, which, CHUNK_BYTES)
        with closing(upload(some, self.device)) as parts:
            for numbers, images in parts:
                yield images, selection.among(numbers), numbers

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "gpu": torch.cuda.get_device_name(self.device), "precision": self.precision}

    def _bring(self, bank: PatchBank) -> tuple[PatchBank, Tensor, Tensor] | None:
        """All images of a bank and its order on the device, brought there if need be; None where they do not fit."""
        with _bringing:  # several threads may use one machine
            if self._brought is None or self._brought[0] is not bank:
                self._brought = None  # makes room
                if fits(bank.images, self.device):
                    self._brought = bank, bank.images.to(self.device), bank.order.to(self.device)
            return self._brought


def missing() -> str | None:
    """What this installation or machine lacks for engine "cuda"; None: nothing."""
    if not _core.HAS_CUDA:
        return (
            "pyels was built without it; install pyels from source where a CUDA compiler (nvcc 12 or newer) is on the "
            "PATH, with pip's option -Ccmake.define.PYELS_CUDA=ON"
        )
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"torch {torch.__version__} was built without CUDA; install a build of torch with CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    if torch.cuda.get_device_capability() < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, and {torch.cuda.get_device_name()} has less"
    if version := _core.cuda_driver_lacks():
        return f"pyels was built with CUDA {version // 1000}, which needs a newer driver than there is"
    return None


def default_device() -> torch.device:
    """The one that torch uses in this thread."""
    return torch.device("cuda", torch.cuda.current_device())


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether all images may be on the device at once."""
    if images.device == device:
        return True
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return images.nbytes <= SHARE * (free + reusable)


class _Slot:
    """A part on its way: pinned memory that the device copies from by itself, and memory on the device."""

    def __init__(self, device: torch.device) -> None:
        self.pinned: Tensor | None = None
        self.pixels: Tensor | None = None
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._device = device

    def send(self, pixels: Tensor, stream: torch.cuda.Stream) -> None:
        if self.pinned is None or len(self.pinned) < len(pixels):
            self.pinned = torch.empty(pixels.shape, dtype=pixels.dtype, device=CPU, pin_memory=True)
            self.pixels = torch.empty(pixels.shape, dtype=pixels.dtype, device=self._device)
            # Memory that the allocator hands out may be in use until the current stream has come this far.
            self.used.record(torch.cuda.current_stream(self._device))
        assert self.pixels is not None
        self.copied.synchronize()  # what is pinned may still be read
        self.pinned[: len(pixels)].copy_(pixels)
        with torch.cuda.stream(stream):
            self.used.wait(stream)  # and what is on the device may still be worked on
            self.pixels[: len(pixels)].copy_(self.pinned[: len(pixels)], non_blocking=True)
            self.copied.record(stream)


def upload(
    parts: Generator[tuple[Tensor, Tensor], None, None], device: torch.device
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Parts of a bank in CPU memory, as numbers (there) and pixels on the device, which the part after next overwrites.

    The caller launches its work on the current stream before it asks for the next part, which is copied meanwhile.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    slots = (_Slot(device), _Slot(device))

    def sent() -> Iterable[tuple[_Slot, Tensor, int]]:
        for i, (numbers, pixels) in enumerate(parts):
            slots[i % 2].send(pixels, stream)
            yield slots[i % 2], numbers, len(pixels)

    try:
        ahead = iter(sent())
        current = next(ahead, None)
        while current is not None:
            slot, numbers, count = current
            here = torch.cuda.current_stream(device)
            slot.copied.wait(here)
            assert slot.pixels is not None
            yield numbers, slot.pixels[:count]
            slot.used.record(here)
            current = next(ahead, None)
    finally:
        parts.close()
        stream.synchronize()  # before the buffers go
