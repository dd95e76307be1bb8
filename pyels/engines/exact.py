"""The exact engines: one partial posterior after the other, of the parts in which a bank comes."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, checked
from pyels.definition import Definition, Gaussian, Masks, Square, WholeImage
from pyels.denoiser import Query
from pyels.engines.engine import Engine, threads_or_all
from pyels.engines.operator import answer, evaluate
from pyels.posterior import PartialPosterior, Want
from pyels.second import Answers, Asked

# Images (n, C, H, W), the selection of these, and their numbers in the bank; None: they are the bank.
Part = tuple[Tensor, Selection, Tensor | None]


@dataclass(eq=False)
class Exact(Engine):
    """What exact engines have in common: a part of a bank is evaluated by the compiled engine of their name. Each may
    say with which options, and how parts come."""

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        total: PartialPosterior | None = None
        with closing(self._all_parts(definition, bank, selection)) as parts:
            for images, responses, chosen, numbers in parts:
                part = self.evaluate_part(definition, images, chosen, query, want, responses)
                if definition.mirror:  # what a query has to do with mirror images, its own has with the images
                    other, there = definition.mirrored(), query.mirrored()
                    part = part.merge(self.evaluate_part(other, images, chosen, there, want, responses).mirrored())
                if numbers is not None:
                    part = part.renumbered(numbers)
                total = part if total is None else total.merge(part)
        if total is None:  # no query, or none that has an image
            total = self.evaluate_part(definition, *self._nothing(definition, bank, selection, query, want))
        return total

    def answer(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, asked: Asked
    ) -> Answers:
        total: Answers | None = None
        _, height, width = bank.shape
        with closing(self._all_parts(definition, bank, selection)) as parts:
            for images, responses, chosen, numbers in parts:
                part = self.answer_part(definition, images, chosen, query, asked, responses)
                if definition.mirror:
                    other, there, same = definition.mirrored(), query.mirrored(), asked.mirrored()
                    part = part.merge(self.answer_part(other, images, chosen, there, same, responses).mirrored())
                if numbers is not None:
                    part = part.renumbered(numbers, len(bank), height * width)
                total = part if total is None else total.merge(part)
        if total is None:
            total = self.answer_part(definition, *self._nothing(definition, bank, selection, query, asked))
        return total

    def compiled_options(self) -> dict[str, Any]:
        """The fields of the compiled engine's struct of options, by name."""
        return {}

    def evaluate_part(
        self,
        definition: Definition,
        images: Tensor,
        selection: Selection,
        query: Query,
        want: Want,
        responses: Tensor | None = None,
    ) -> PartialPosterior:
        """That of images (n, C, H, W) which are where the engine works, and of responses (n, R, H, W)."""
        return evaluate(self.name, self.compiled_options(), definition, images, selection, query, want, responses)

    def answer_part(
        self,
        definition: Definition,
        images: Tensor,
        selection: Selection,
        query: Query,
        asked: Asked,
        responses: Tensor | None = None,
    ) -> Answers:
        """Likewise."""
        return answer(self.name, self.compiled_options(), definition, images, selection, query, asked, responses)

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

    def _all_parts(
        self, definition: Definition, bank: PatchBank, selection: Selection
    ) -> Generator[tuple[Tensor, Tensor | None, Selection, Tensor | None], None, None]:
        """With what answers in place of the images."""
        others = definition.responses
        with closing(self.parts(bank, selection)) as parts:
            for images, chosen, numbers in parts:
                responses = None
                if others is not None:
                    responses = others.images if numbers is None else others.read(numbers)
                yield images, responses, chosen, numbers

    def _nothing(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, what: Any
    ) -> tuple[Tensor, Selection, Query, Any, Tensor | None]:
        """Arguments for a part without an image."""
        others = definition.responses
        image = torch.zeros((1, *bank.shape), dtype=bank.dtype, device=self.device)
        answer = None if others is None else torch.zeros((1, *others.shape), dtype=others.dtype, device=self.device)
        return image, selection.nothing(), query, what, answer


def chunks(images: Tensor, which: range | Tensor, size: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The chosen images, neighbours or numbers (n,), in parts of so many bytes: numbers and pixels."""
    step = max(1, size // images[0].nbytes)
    for start in range(0, len(which), step):
        part = which[start : start + step]
        if isinstance(part, range):
            yield torch.arange(part.start, part.stop, device=CPU), images[part.start : part.stop]
        else:
            yield part, images[part]


@dataclass(eq=False)
class Cpu(Exact):
    """Exact, float32 with float64 wherever rounding could show, multi-threaded. Where the largest pixel of a query is
    more than 1,000 sigma, whatever may matter is compared in float64, which takes longer.

    Parameters
    ----------
    threads  by default the CPUs this process may use; results do not depend on it
    """

    name: ClassVar[str] = "cpu"
    windows: ClassVar[tuple[type, ...]] = (WholeImage, Square, Gaussian, Masks)
    knows: ClassVar[tuple[str, ...]] = ("mirror", "responses", "precision", "second")
    threads: int = checked(None, threads_or_all)

    def compiled_options(self) -> dict[str, Any]:
        return {"threads": self.threads}


@dataclass(eq=False)
class Reference(Exact):
    """The definition in float64, single-threaded and slow: the oracle that the others are tested against."""

    name: ClassVar[str] = "reference"
    windows: ClassVar[tuple[type, ...]] = (WholeImage, Square, Gaussian, Masks)
    knows: ClassVar[tuple[str, ...]] = ("mirror", "responses", "precision", "second")
    dtype: ClassVar[torch.dtype] = torch.float64
