"""A machine: a definition over a bank, evaluated by an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import Levels, check_images, check_labels, check_patch_size
from pyels.definition import Definition, Masks, Sources, Square
from pyels.denoiser import Denoiser, Query, underived
from pyels.engines import Engine, choose_engine
from pyels.posterior import PartialPosterior, Posterior, Want


class Machine(Denoiser):
    """A closed-form denoiser: what a definition makes of a bank of images.

    `IS`, `ES`, `LS` and `ELS` are machines by name; any other definition is one in one line:

        pyels.Machine(bank, pyels.Definition(window=pyels.Square(5), sources="interior"))

    Parameters
    ----------
    bank        the training images
    definition  what is computed
    engine      "auto", "cpu", "cuda", "sampled" (or "faiss"), "reference", or an `Engine`; see
                `pyels.engines.choose_engine`
    options     options of the engine, such as threads=2

    Raises
    ------
    TypeError, ValueError  bad arguments; a definition that the engine cannot evaluate, with the reason
    ImportError            an engine that is not available
    """

    wishes = ("tolerance", "selection")
    boundaries: ClassVar[tuple[str, ...]] = ()  # of a machine that is made with `boundary`: what it may be

    def __init__(self, bank: PatchBank, definition: Definition, engine: str | Engine = "auto", **options: Any) -> None:
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank must be a pyels.PatchBank, got {type(bank).__name__}; use PatchBank(images, labels)")
        if not isinstance(definition, Definition):
            raise TypeError(f"definition must be a pyels.Definition, got {type(definition).__name__}")
        if definition.patch_size is not None:
            definition = definition.of_size(None, *bank.shape[1:])
        if isinstance(definition.window, Masks) and isinstance(definition.window.weights, Tensor):
            definition.window.at(1.0, 1.0, bank.shape)  # raises for weights that do not fit
        self.bank, self.definition = bank, definition
        self.engine = choose_engine(engine, definition, bank, **options)
        self.device = self.engine.device
        bank.check_unchanged()  # from here on

    def __repr__(self) -> str:
        square = isinstance(self.definition.window, Square)
        size = f"patch_size={self.patch_size}" if square else None
        what = repr(self.definition) if type(self) is Machine else size
        changed = [
            f"{one.name}={getattr(self.engine, one.name)!r}"
            for one in fields(self.engine)
            if isinstance(one.default, (str, float)) and getattr(self.engine, one.name) != one.default
        ]
        shown = [repr(self.bank), what, f"engine={self.engine.name!r}", *changed]
        return f"{type(self).__name__}({', '.join(part for part in shown if part)})"

    @property
    def patch_size(self) -> int | None:
        """The size of its windows where a call gives none; None: every call gives one, or whole images are compared."""
        return self.definition.patch_size

    @property
    def boundary(self) -> str | None:
        """ "zeros", "circular" or "interior" where patches from everywhere are sources; else None."""
        sources = Sources(self.definition.sources)
        everywhere = isinstance(self.definition.window, Square) and sources is not Sources.SAME_POSITION
        return sources.value if everywhere else None

    def estimate(self, query: Query) -> Tensor:
        """The posterior mean x0_hat (B, C, H, W), in the engine's dtype."""
        return self.partial(query, Want.MEAN).mean(self.engine.dtype)

    def posterior(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Posterior:
        """The mean with its error, log-evidence, entropy and heaviest source of every pixel; arguments as in
        `denoise`."""
        return Posterior(*self._posterior(x, alpha, sigma, labels, patch_size, **wishes))

    @underived
    def _posterior(self, *arguments: Any, **wishes: Any) -> tuple[Any, ...]:
        return self.partial(self.query(*arguments, **wishes)).finish(self.engine.dtype).tensors()

    def denoise_over_sizes(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        sizes: Sequence[int],
        labels: Any = None,
    ) -> Tensor:
        """The posterior means of the same queries for several patch sizes: what a calibration compares.

        Parameters
        ----------
        sizes   odd patch sizes; the other arguments as in `denoise`

        Returns
        -------
        (K, B, C, H, W), one mean for each of the K sizes, each as `denoise` gives it
        """
        return torch.stack([self.denoise(x, alpha, sigma, labels, k) for k in self._checked(sizes)])

    def posterior_over_sizes(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        sizes: Sequence[int],
        labels: Any = None,
    ) -> list[Posterior]:
        """As `denoise_over_sizes`, with all that `posterior` gives, one posterior for each size."""
        return [self.posterior(x, alpha, sigma, labels, k) for k in self._checked(sizes)]

    def partial(self, query: Query, want: Want = Want.POSTERIOR) -> PartialPosterior:
        """The posterior as a mergeable part of that over a larger bank.

        Parameters
        ----------
        query  as `self.query(x, alpha, sigma, ..)` makes it
        want   what is to be in it

        Image numbers in `source` count from the start of this machine's bank.
        """
        if not isinstance(query, Query):
            raise TypeError(f"query must be what machine.query(x, alpha, sigma, ..) gives, got {type(query).__name__}")
        if tuple(query.x.shape[1:]) != self.bank.shape:
            self.check_images(query.x)
        definition = self.definition.of_size(query.patch_size, *self.bank.shape[1:])
        selection = self._selected(query.labels, query.selection, len(query))
        asked = replace(query, labels=None, selection=None)  # which images count is all that engines know of these
        at_home = self.device.type == self.bank.device.type  # a GPU has a copy of its own of a bank in CPU memory
        if at_home:
            self.bank.check_unchanged()
        partial = self.engine.evaluate(definition, self.bank, selection, asked, want)
        if at_home:
            self.bank.check_unchanged(after=True)
        return partial

    def pairs(self, labels: Any, patch_size: int | None = None, batch: int = 1) -> int:
        """The number of pairs (query pixel, source patch) that one call of `denoise` evaluates."""
        _, height, width = self.bank.shape
        begin, end = self._ranges(labels, batch)
        return int((end - begin).sum()) * int(
            self.definition.of_size(patch_size, height, width).places(height, width).sum()
        )

    def check_size(self, patch_size: int | None) -> int:
        if not isinstance(self.definition.window, Square):
            return super().check_size(patch_size)
        return check_patch_size(patch_size, *self.bank.shape[1:], self.definition.wraps)

    def check_images(self, x: Tensor) -> Tensor:
        return check_images(x, shape=self.bank.shape, device=self.device)

    def _checked(self, sizes: Sequence[int]) -> list[int]:
        """All of them now, not the last one at the last."""
        if not len(sizes):
            raise ValueError("sizes is empty; give at least one patch size")
        return [self.check_size(k) for k in sizes]

    def _ranges(self, labels: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Where the images of each query begin and end, (B,) both."""
        selection = self._selected(check_labels(labels, batch), None, batch)
        return selection.begin, selection.end

    def _selected(self, labels: Tensor | None, selection: Selection | None, batch: int) -> Selection:
        if selection is None:
            return self.bank.select(labels).expand(batch)
        if labels is not None:
            raise ValueError("labels and selection were given; select the labels too, with bank.select(labels=..)")
        if selection.bank_size != len(self.bank):
            raise ValueError(
                f"the selection is of a bank of {selection.bank_size} images, but the machine's has {len(self.bank)}; "
                "use machine.bank.select(..)"
            )
        return selection.expand(batch)
