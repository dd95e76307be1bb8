"""A machine: a definition over a bank, evaluated by an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.bank import check_bank
from pyels.bank.selection import Selection
from pyels.checks import CPU, Levels, check_count, check_images, check_labels, check_pixels
from pyels.definition import Definition, Gaussian, Masks, Sized, Sources
from pyels.denoiser import Denoiser, Pullback, Query, refuse_derivative, underived
from pyels.engines import Engine, choose_engine
from pyels.posterior import PartialPosterior, Posterior, Want, alone
from pyels.second import Answers, Asked


class HeaviestSources(NamedTuple):
    """See `Machine.sources`."""

    image: Tensor
    row: Tensor
    column: Tensor
    weight: Tensor


class Machine(Denoiser):
    """A closed-form denoiser: what a definition makes of a bank of images.

    `IS`, `ES`, `LS` and `ELS` are machines by name; any other definition is one in one line:

        pyels.Machine(bank, pyels.Definition(window=pyels.Square(5), sources="interior"))

    Parameters
    ----------
    bank        the training images
    definition  what is computed
    responses   a `PatchBank` of as many images, or images (N, R, H, W): what answers in place of the bank's, as
                `Definition` has it
    engine      "auto", "cpu", "cuda", "sampled" (or "faiss"), "reference", or an `Engine`; see
                `pyels.engines.choose_engine`
    options     options of the engine, such as threads=2

    Raises
    ------
    TypeError, ValueError  bad arguments; a definition that the engine cannot evaluate, with the reason
    ImportError            an engine that is not available
    """

    wishes: tuple[str, ...] = ("tolerance", "selection", "precision")

    def __init__(
        self,
        bank: PatchBank,
        definition: Definition,
        engine: str | Engine = "auto",
        responses: PatchBank | Any = None,
        **options: Any,
    ) -> None:
        self.bank = check_bank(bank)
        if not isinstance(definition, Definition):
            raise TypeError(f"definition must be a pyels.Definition, got {type(definition).__name__}")
        if responses is not None:
            other = responses if isinstance(responses, PatchBank) else PatchBank(responses)
            definition = replace(definition, responses=other)
        if definition.responses is not None:
            _check_responses(definition.responses, bank)
        if definition.patch_size is not None:
            definition = definition.of_size(None, *bank.shape[1:])
        if isinstance(definition.window, Masks) and isinstance(definition.window.weights, Tensor):
            definition.window.at(1.0, 1.0, bank.shape)  # raises for weights that do not fit
        self.definition = definition
        self.engine = choose_engine(engine, definition, bank, **options)
        self.device, self.parameter = self.engine.device, definition.window.parameter
        if isinstance(definition.window, Gaussian):
            self.wishes = (*self.wishes, "patch_size")  # where it ends
        bank.check_unchanged()  # from here on

    def __repr__(self) -> str:
        size = f"patch_size={self.patch_size}" if isinstance(self.definition.window, Sized) else None
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
        everywhere = isinstance(self.definition.window, Sized) and sources is not Sources.SAME_POSITION
        return sources.value if everywhere else None

    def estimate(self, query: Query) -> Tensor:
        """The posterior mean x0_hat (B, R, H, W), in the engine's dtype."""
        if self.definition.fold is not None:
            return self._folded(query, self.partial(query, Want.WEIGHTS))
        return self.partial(query, Want.MEAN).mean(self.engine.dtype)

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        if self.definition.fold is not None:
            return self.estimate(query), refuse_derivative

        def pullback(gradient: Tensor) -> Tensor:
            cotangent = gradient.to(query.x.device, torch.float64)
            derivative = self._answers(query, self._asked(query, cotangent=cotangent)).derivative
            assert derivative is not None
            return derivative.to(query.x.dtype)

        return self.estimate(query), pullback

    def settings(self) -> dict[str, Any]:
        return self.engine.settings()

    def answer_shape(self, x: Tensor) -> tuple[int, ...]:
        others = self.definition.responses
        return tuple(x.shape) if others is None else (len(x), *others.shape)

    def posterior(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Posterior:
        """The mean with its error, log-evidence, entropy, heaviest source and variance of every pixel; arguments as in
        `denoise`."""
        arguments = x, alpha, sigma, labels, patch_size

        def variance() -> Tensor:
            of: Tensor = self._variance(*arguments, **wishes)
            return of

        tensors: tuple[Tensor, ...] = self._posterior(*arguments, **wishes)
        return Posterior.of(tensors, variance)

    @underived
    def _posterior(self, *arguments: Any, **wishes: Any) -> tuple[Any, ...]:
        query = self.query(*arguments, **wishes)
        return self._finished(query, self.partial(query)).tensors()

    def _finished(self, query: Query, partial: PartialPosterior) -> Posterior:
        posterior = partial.finish(self.engine.dtype)
        return posterior if self.definition.fold is None else replace(posterior, mean=self._folded(query, partial))

    @underived
    def _variance(self, *arguments: Any, **wishes: Any) -> Tensor:
        if self.definition.fold is not None:
            raise ValueError("the variance is that of the response at the centre of a window, and a fold has many")
        return self.variance_of(self.query(*arguments, **wishes))

    def variance_of(self, query: Query, partial: PartialPosterior | None = None) -> Tensor:
        """The posterior variance (B, R, H, W) of the response at each pixel; `partial` is the first pass, if done."""
        variance = self._answers(query, self._asked(query, partial, variance=True)).variance
        assert variance is not None
        return variance.to(self.engine.dtype)

    def influence(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Tensor:
        """The share of all pixels' weight that each image of the bank holds, (B, N), which sums to 1; arguments as in
        `denoise`. A mirror image's share is its image's."""
        query = self.query(x, alpha, sigma, labels, patch_size, **wishes)
        return self._influence(query, self._answers(query, self._asked(query, influence=True)))

    def _influence(self, query: Query, answers: Answers) -> Tensor:
        assert answers.influence is not None
        windows = self._definition(query).windows(*self.bank.shape[1:]).sum()
        return (answers.influence / windows).to(self.engine.dtype)

    def sources(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        top: int = 16,
        pixels: Any = None,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> HeaviestSources:
        """The heaviest sources of every pixel, or of chosen ones.

        Parameters
        ----------
        top     how many of each pixel; where it has fewer, the rest has image -1 and weight 0
        pixels  (P, 2) rows and columns; None: all pixels. Other arguments as in `denoise`

        Returns
        -------
        image, row, column (B, H, W, top), or (B, P, top), int64: the pixel at the centre of the source, of a mirror
        image that of the image itself; weight, likewise, descending: its share of the pixel's whole weight
        """
        query = self.query(x, alpha, sigma, labels, patch_size, **wishes)
        _, height, width = self.bank.shape
        where = check_pixels(pixels, height, width)
        asked = self._asked(query, top=check_count("top", top), pixels=where.to(query.x.device))
        shape = (len(query), *((height, width) if pixels is None else (len(where),)), top)
        return self._heaviest(self._answers(query, asked), shape)

    def _heaviest(self, answers: Answers, shape: tuple[int, ...]) -> HeaviestSources:
        assert answers.source is not None
        assert answers.weight is not None
        _, height, width = self.bank.shape
        source, weight = answers.source.reshape(shape), answers.weight.reshape(shape).to(self.engine.dtype)
        some = source >= 0
        image, row, column = source // (height * width), source // width % height, source % width
        image, row, column = (torch.where(some, one, -1) for one in (image, row, column))
        return HeaviestSources(image, row, column, weight)

    def explain(self, query: Query, top: int) -> tuple[Posterior, HeaviestSources, Tensor]:
        """`posterior`, `sources` of all pixels and `influence` of the same query, by one first and one second pass."""
        _, height, width = self.bank.shape
        partial = self.partial(query)
        pixels = torch.arange(height * width, device=query.x.device)
        answers = self._answers(query, self._asked(query, partial, influence=True, top=top, pixels=pixels))
        heaviest = self._heaviest(answers, (len(query), height, width, top))
        return self._finished(query, partial), heaviest, self._influence(query, answers)

    def denoise_over_sizes(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        sizes: Sequence[int],
        labels: Any = None,
    ) -> Tensor:
        """The posterior means of the same queries for several patch sizes.

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
        if (lacks := self.engine.lacks_for(query)) is not None:
            raise ValueError(f"engine {self.engine.name!r} {lacks}")

        def evaluate(definition: Definition, selection: Selection, query: Query, of: list[int] | None) -> Any:
            return self.engine.evaluate(definition, self.bank, selection, query, want)

        partial: PartialPosterior = self._at_every_level(query, evaluate, PartialPosterior.stack)
        return partial

    def _asked(self, query: Query, partial: PartialPosterior | None = None, **asked: Any) -> Asked:
        """What a second pass needs to know of the first, and what else is asked of it."""
        means = not {"variance", "cotangent"}.isdisjoint(asked)
        partial = self.partial(query, Want.SECOND if means else Want.WEIGHTS) if partial is None else partial
        windows = self._definition(query).windows(*self.bank.shape[1:]).to(partial.m.device)
        log_sum = torch.where(windows, partial.m + alone(np.log, torch.log, partial.s), torch.inf)
        return Asked(log_sum, partial.mean(torch.float64) if means else None, **asked)

    def _answers(self, query: Query, asked: Asked) -> Answers:
        def answer(definition: Definition, selection: Selection, query: Query, of: list[int] | None) -> Any:
            here = asked if of is None else asked.of(of)
            return self.engine.answer(definition, self.bank, selection, query, here)

        answers: Answers = self._at_every_level(query, answer, Answers.stack)
        return answers

    def _folded(self, query: Query, partial: PartialPosterior) -> Tensor:
        """The mean of the answers of all windows that cover a pixel."""

        def fold(definition: Definition, selection: Selection, query: Query, of: list[int] | None) -> Any:
            here = asked if of is None else asked.of(of)
            folded = self.engine.answer(definition, self.bank, selection, query, here).folded
            cover = definition.cover(*self.bank.shape[1:])
            if not (cover > 0).all():
                row, column = torch.nonzero(cover == 0)[0].tolist()
                raise ValueError(f"no window answers for pixel ({row}, {column}): use larger windows, or another fold")
            assert folded is not None
            return Answers(folded=folded / cover.to(folded.device))

        asked = self._asked(query, partial, fold=True)
        mean: Tensor = self._at_every_level(query, fold, Answers.stack).folded
        return mean.to(self.engine.dtype)

    def _at_every_level(self, query: Query, work: Callable[..., Any], stack: Callable[..., Any]) -> Any:
        """work(definition of this size and level, selection, query, which queries) of all queries; None: all at once.
        Masks may differ from level to level."""
        definition = self._definition(query)
        selection = self.bank.selection_of(query.labels, query.selection, len(query))
        query = replace(query, labels=None, selection=None)  # which images count is all that engines know of these
        at_home = self.device.type == self.bank.device.type  # a GPU has a copy of its own of a bank in CPU memory
        if at_home:
            self.bank.check_unchanged()
        if not isinstance(definition.window, Masks):
            done = work(definition, selection, query, None)
        else:
            tempered = replace(query, sigma=query.sigma * math.sqrt(definition.window.temperature))
            levels = list(zip(query.alpha.tolist(), query.sigma.tolist(), strict=True)) or [(1.0, 1.0)]
            parts, places = [], []
            for level in (distinct := dict.fromkeys(levels)):
                there = replace(definition, window=Masks(definition.window.at(*level, self.bank.shape)))
                if len(distinct) == 1:
                    parts.append(work(there, selection, tempered, None))
                    continue
                of = [b for b, own in enumerate(levels) if own == level]
                parts.append(work(there, selection.of(of), tempered.of(of), of))
                places += of
            done = stack(parts, torch.tensor(places, dtype=torch.int64, device=CPU)) if places else parts[0]
        if at_home:
            self.bank.check_unchanged(after=True)
        return done

    def _definition(self, query: Query) -> Definition:
        return self.definition_of(
            **{one: getattr(query, one) for one in ("patch_size", self.parameter) if one is not None}
        )

    def definition_of(self, patch_size: int | None = None, **said: Any) -> Definition:
        """The definition with what a query says of its window."""
        definition, value = self.definition, said.get(self.parameter or "")
        if value is not None:
            assert isinstance(definition.window, Gaussian | Masks)  # as all that have another parameter
            definition = replace(definition, window=definition.window.of(value))
        return definition.of_size(patch_size, *self.bank.shape[1:])

    def pairs(self, labels: Any, patch_size: int | None = None, batch: int = 1, **wishes: Any) -> int:
        """The number of pairs (query pixel, source patch) that one call of `denoise` evaluates."""
        return int(self.counts(labels, batch, patch_size=patch_size, **wishes).sum())

    def counts(self, labels: Any, batch: int = 1, **said: Any) -> Tensor:
        """The number of patches in S(p) of every pixel p, (B, H, W) float64."""
        begin, end = self._ranges(labels, batch)
        images = (1 + self.definition.mirror) * (end - begin).double()
        return images[:, None, None] * self.definition_of(**said).places(*self.bank.shape[1:])

    def check_wish(self, name: str, value: Any) -> Any:
        checked = super().check_wish(name, value)
        if checked is not None and name in ("patch_size", self.parameter):
            self.definition_of(**{name: checked})  # raises where windows cannot have it
        return checked

    def check_images(self, x: Tensor) -> Tensor:
        return check_images(x, shape=self.bank.shape, device=self.device)

    def _checked(self, sizes: Sequence[int]) -> list[int]:
        """All of them now, not the last one at the last."""
        if not len(sizes):
            raise ValueError("sizes is empty; give at least one patch size")
        return [self.check_wish("patch_size", k) for k in sizes]

    def _ranges(self, labels: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Where the images of each query begin and end, (B,) both."""
        selection = self.bank.selection_of(check_labels(labels, batch), None, batch)
        return selection.begin, selection.end


def _check_responses(responses: PatchBank, bank: PatchBank) -> None:
    if len(responses) != len(bank) or responses.shape[1:] != bank.shape[1:]:
        raise ValueError(
            f"responses must be {len(bank)} images of {bank.shape[1]} x {bank.shape[2]} pixels, one for each of the "
            f"bank, got {len(responses)} of {responses.shape[1]} x {responses.shape[2]}"
        )
    if responses.device != bank.device:
        raise ValueError(f"responses are on {responses.device}, but the bank is on {bank.device}")
    if responses.streamed and not bank.streamed:
        raise ValueError("responses that are streamed need a bank that is; load them without a memory_limit")
