"""Engine "sampled": importance sampling of the windows that an index finds, or of images at high noise, with the error
that this makes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from pyels.bank import PatchBank
from pyels.bank.selection import LIST, Selection
from pyels.checks import CPU, check_dice, check_tolerance, checked
from pyels.definition import Definition, Sources, Square
from pyels.denoiser import Query
from pyels.engines.drawn import draw
from pyels.engines.engine import Engine, beyond_float32, threads_or_all
from pyels.engines.exact import Cpu
from pyels.engines.index.file import open_index
from pyels.engines.index.lists import Index, Region
from pyels.engines.operator import evaluate
from pyels.mapped import Stamp
from pyels.posterior import PartialPosterior, Want

_log = logging.getLogger("pyels")
TOLERANCE = 0.01
MOST_PLACES = 1 << 16  # of an image, of all of which estimates are held


@dataclass(eq=False)
class Sampled(Engine):
    """Approximate, for large banks: finds the patches that matter, weighs them and some of the others exactly, and says
    how far it may be from the exact mean. Where noise is so high that most patches matter, some images stand for all.

    Parameters
    ----------
    threads    by default the CPUs this process may use; results do not depend on it
    tolerance  how far the mean of a pixel may be from the exact one (half a 95% interval) for its search to end
    index      folder of the indexes, which are built when first needed; see `pyels.engines.index.file.default_folder`
    dice       which of independent draws, from 0 to 2^32 - 1: with others, other windows and images are weighed, and by
               how much results differ is what chance decided. What is off alike for all, as by a heavy patch that
               nothing in the index hints at, they do not show

    Indexes are of all images or of a class, or of one process's share of these; a query that draws on another selection
    is evaluated exactly, and so is one whose largest pixel is more than 1,000 sigma. A streamed bank is mapped from its
    file, and what the index names is looked up there.
    """

    name: ClassVar[str] = "sampled"
    threads: int = checked(None, threads_or_all)
    tolerance: float = checked(TOLERANCE, check_tolerance)
    index: str | Path | None = checked(None, lambda folder: folder)
    dice: int = checked(0, check_dice)
    # By bank, which is kept so that its id stays its own, and size, wrapping and set of images.
    _indexes: dict[tuple[int, int, bool, str], tuple[PatchBank, Index, Stamp]] = field(
        default_factory=dict, init=False, repr=False
    )

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        lists = any(name.startswith(LIST) for name in selection.names)
        if lists or len(query) == 0 or not searches(definition, *bank.shape[1:]):
            return Cpu(self.threads).evaluate(definition, bank, selection, query, want)
        if beyond := beyond_float32(query):
            _log.info(
                "engine sampled: %d of %d queries are beyond float32, and evaluated exactly", len(beyond), len(query)
            )
            near = [b for b in range(len(query)) if b not in beyond]
            exact = Cpu(self.threads).evaluate(definition, bank, selection.of(beyond), query.of(beyond), want)
            if not near:
                return exact
            rest = self.evaluate(definition, bank, selection.of(near), query.of(near), want)
            return PartialPosterior.stack([rest, exact], torch.tensor(near + beyond, device=CPU))
        if Want.MEAN not in want:  # errors are of the mean
            whole = self.evaluate(definition, bank, selection, query, want | Want.MEAN)
            means = {name: getattr(whole, name) for name in ("y", "sy", "yy")}
            return replace(whole, **{name: one[:, :0] for name, one in means.items() if one is not None})
        given, bank = bank, bank.in_place()
        bank.check_file()  # a mapped file that was cut off would kill the process
        tolerance = self.tolerance if query.tolerance is None else query.tolerance
        options = {"threads": self.threads, "tolerance": tolerance, "dice": self.dice}
        parts, places = [], []
        for name, images, queries in selection.sets():
            if len(images) == 0:  # a share of few
                nothing = Cpu(self.threads).evaluate(definition, bank, selection.of(queries), query.of(queries), want)
                parts.append(nothing.as_estimate())
                places += queries
                continue
            left = []
            for b in queries:
                drawn = draw(definition, bank, name, images, query.of([b]), want, tolerance, self.threads, self.dice)
                if drawn is None:
                    left.append(b)
                else:
                    parts.append(drawn)
                    places.append(b)
            if not left:
                continue
            index, stamp = self._index(definition, bank, name, images)
            of_left = selection.of(left), query.of(left)
            self._check(stamp)  # the compiled engine trusts it
            sides = definition.sources is Sources.ZEROS
            of_regions = {int(at): lists.tensors() for at, lists in index.items() if sides or at is Region.INSIDE}
            parts.append(evaluate("sampled", options, definition, bank.images, *of_left, want, None, of_regions))
            self._check(stamp)
            places += left
        if bank is not given:  # which is looked at whenever it is read
            bank.check_unchanged(after=True)
        return PartialPosterior.stack(parts, torch.tensor(places, device=CPU))

    def _check(self, stamp: Stamp) -> None:
        if stamp.is_old():
            self._indexes.clear()
            raise ValueError(f"{stamp.path}: the index was written to while it was used; repeat the call")

    def settings(self) -> dict[str, Any]:
        settings = {**super().settings(), "tolerance": self.tolerance}
        return {**settings, "dice": self.dice} if self.dice else settings  # as in records of before there were others

    def _index(
        self, definition: Definition, bank: PatchBank, name: str, images: range | torch.Tensor
    ) -> tuple[Index, Stamp]:
        """That of the windows of a set of images."""
        of_set = definition.size, definition.bank_wraps, name
        key = id(bank), *of_set
        if key not in self._indexes:
            self._indexes[key] = bank, *open_index(bank, *of_set, images, self.index, self.threads)
        return self._indexes[key][1:]


def searches(definition: Definition, height: int, width: int) -> bool:
    """Whether there are windows to search among: LS, IS and ES have few, of which all have to be looked at, and so has
    ELS where every window overhangs the border."""
    k = definition.patch_size
    everywhere = isinstance(definition.window, Square) and definition.sources is not Sources.SAME_POSITION
    return everywhere and k is not None and k <= min(height, width) and height * width <= MOST_PLACES
