"""What an engine is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch

from pyels._core import FLOAT32_REACH, isa_in_use
from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, check_threads, checks_of, from_environment, is_captured
from pyels.definition import Definition, Square, WholeImage
from pyels.denoiser import Query
from pyels.posterior import PartialPosterior, Want
from pyels.second import Answers, Asked


@dataclass(eq=False)
class Engine(ABC):
    """Evaluates definitions over banks. Its fields are its options.

    Attributes
    ----------
    name     as `engine=` and the command line know it
    windows  the kinds of window that it takes
    knows    what else of the formula it takes: "mirror", "responses", "precision" (of a query), and "second", the
             second pass, of which folds and derivatives are made
    dtype    of the posterior means that it gives
    device   where it works
    """

    name: ClassVar[str]
    windows: ClassVar[tuple[type, ...]] = (WholeImage, Square)
    knows: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[torch.dtype] = torch.float32
    device = CPU

    def __post_init__(self) -> None:
        for name, check in checks_of(self).items():
            setattr(self, name, check(getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without what it keeps from call to call, which they find again."""
        new = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory()
            for one in fields(self)
            if not one.init
        }
        return {**vars(self), **new}

    @classmethod
    def missing(cls) -> str | None:
        """What this installation or machine lacks for it; None: nothing."""
        return None

    def cannot(self, definition: Definition, bank: PatchBank) -> str | None:
        """Why it does not evaluate the definition over the bank, as what follows its name; None: it does."""
        if bank.device != CPU:
            return f"needs the bank in CPU memory, but it is on {bank.device}; use bank.to('cpu')"
        return self.lacks(definition)

    def lacks(self, definition: Definition) -> str | None:
        """`cannot`, for any bank."""
        if not isinstance(definition.window, self.windows):
            taken = ", ".join(kind.__name__ for kind in self.windows)
            return f"takes windows {taken}, not {type(definition.window).__name__}; use engine='cpu'"
        if definition.fold is not None and "second" not in self.knows:
            return f"does not fold windows, but fold is {definition.fold!r}; use engine='cpu', or leave it out"
        if definition.mirror and "mirror" not in self.knows:
            return "does not look at mirror images; use engine='cpu', or leave out mirror=True"
        if definition.responses is not None and "responses" not in self.knows:
            return "lets no other images answer; use engine='cpu', or leave out responses"
        return None

    def lacks_for(self, query: Query) -> str | None:
        """What of a query it does not take, likewise."""
        if query.precision is not None and "precision" not in self.knows:
            return "takes no precision of the query; use engine='cpu', or leave it out"
        return None

    @abstractmethod
    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        """The partial posterior of every pixel over the selected images, where query.x is.

        Parameters
        ----------
        definition  one that it can evaluate, with the size of its window
        selection   as many queries as there are
        want        what has to be in it

        Image numbers in `source` are those of the bank.
        """

    def answer(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, asked: Asked
    ) -> Answers:
        """What is asked of the normalised weights, where query.x is, by a second pass; arguments as of `evaluate`."""
        raise self.no_second_pass()

    def no_second_pass(self) -> ValueError:
        return ValueError(
            f"engine {self.name!r} has no second pass, which derivatives, variances, influence and sources come from; "
            "use engine='cpu'"
        )

    def settings(self) -> dict[str, Any]:
        """What the bits of a result depend on, beside its inputs."""
        return {"engine": self.name, "isa": isa_in_use()}


def beyond_float32(query: Query) -> list[int]:
    """The queries whose largest pixel is so many sigma that float32 differences are too coarse for the weights. Engine
    "cpu" takes these in double."""
    if is_captured(query.x):
        return []
    largest = query.x.flatten(1).abs().amax(1).double().cpu()
    return torch.nonzero(largest > FLOAT32_REACH * query.sigma).flatten().tolist()


def threads_or_all(threads: int | None) -> int:
    return check_threads(threads) or default_threads()


def default_threads() -> int:
    """The number of CPUs that this process may use: its share, where torchrun started several on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // from_environment("LOCAL_WORLD_SIZE", otherwise=1, least=1))
