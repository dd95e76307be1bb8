"""The exact engines: one partial posterior after the other, of the parts in which a bank comes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, checked
from pyels.definition import Definition, Masks, Square, WholeImage
from pyels.denoiser import Query
from pyels.engines.engine import Engine, threads_or_all
from pyels.engines.operator import evaluate
from pyels.posterior import PartialPosterior, Want

# Images (n, C, H, W), the selection of these, and their numbers in the bank; None: they are the bank.
Part = tuple[Tensor, Selection, Tensor | None]


@dataclass(eq=False)
class Exact(Engine):
    """What exact engines have in common. Each says how a part of a bank is evaluated, and may say how parts come."""

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        total: PartialPosterior | None = None
        with closing(self.parts(bank, selection)) as parts:
            for images, chosen, numbers in parts:
                part = self.evaluate_part(definition, images, chosen, query, want)
                if numbers is not None:
                    part = part.renumbered(numbers)
                total = part if total is None else total.merge(part)
        if total is None:  # no query, or none that has an image
            none = selection.nothing()
            image = torch.zeros((1, *bank.shape), dtype=bank.dtype, device=self.device)
            total = self.evaluate_part(definition, image, none, query, want)
        return total

    @abstractmethod
    def evaluate_part(
        self, definition: Definition, images: Tensor, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        """That of images (n, C, H, W) which are where the engine works."""

    def parts(self, bank: PatchBank, selection: Selection) -> Generator[Part, None, None]:
        """The selected images: at once, or where the bank is streamed one part after the other, each valid until the
        next."""
        if not bank.streamed:
            bank.check_selected(selection)
            yield bank.images, selection, None
            return
        with closing(bank.stream(selection.images(), math.inf)) as parts:
            for numbers, images in parts:
                yield images, selection.among(numbers), numbers


@dataclass(eq=False)
class Cpu(Exact):
    """Exact, float32 with float64 wherever rounding could show, multi-threaded. Where the largest pixel of a query is
    more than 1,000 sigma, whatever may matter is compared in float64, which takes longer.

    Parameters
    ----------
    threads  by default the CPUs this process may use; results do not depend on it
    """

    name: ClassVar[str] = "cpu"
    threads: int = checked(None, threads_or_all)

    def evaluate_part(
        self, definition: Definition, images: Tensor, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        return evaluate("cpu", {"threads": self.threads}, definition, images, selection, query, want)


@dataclass(eq=False)
class Reference(Exact):
    """The definition in float64, single-threaded and slow: the oracle that the others are tested against."""

    name: ClassVar[str] = "reference"
    windows: ClassVar[tuple[type, ...]] = (WholeImage, Square, Masks)
    dtype: ClassVar[torch.dtype] = torch.float64

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        window = definition.window
        if not isinstance(window, Masks) or len(query) == 0:
            return super().evaluate(definition, bank, selection, query, want)
        parts, places = [], []
        levels = list(zip(query.alpha.tolist(), query.sigma.tolist(), strict=True))
        for level in dict.fromkeys(levels):  # masks may differ from one to the other
            at = [b for b, own in enumerate(levels) if own == level]
            there = replace(definition, window=Masks(window.at(*level, bank.shape)))
            parts.append(super().evaluate(there, bank, selection.of(at), query.of(at), want))
            places += at
        return PartialPosterior.stack(parts, torch.tensor(places, device=CPU))

    def evaluate_part(
        self, definition: Definition, images: Tensor, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        weights = definition.window.weights if isinstance(definition.window, Masks) else None
        masks = weights if isinstance(weights, Tensor) else None
        return evaluate("reference", {}, definition, images, selection, query, want, masks)
