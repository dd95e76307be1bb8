"""The engines, and which one evaluates a machine."""

from __future__ import annotations

import logging
from typing import Any

from pyels.bank import PatchBank
from pyels.checks import CPU, checks_of
from pyels.definition import Definition
from pyels.engines.cuda import Cuda
from pyels.engines.engine import Engine, default_threads
from pyels.engines.exact import Cpu, Reference
from pyels.engines.sampled import Sampled

__all__ = [
    "ENGINES",
    "NAMES",
    "Cpu",
    "Cuda",
    "Engine",
    "Reference",
    "Sampled",
    "available_engines",
    "choose_engine",
    "default_threads",
    "find_engine",
]

ENGINES: dict[str, type[Engine]] = {kind.name: kind for kind in (Reference, Cpu, Cuda, Sampled)}
_ALIASES = {"faiss": "sampled"}
NAMES = ("auto", *ENGINES, *_ALIASES)
# Options by name, of whichever engine.
_OPTIONS = {name: check for kind in ENGINES.values() for name, check in checks_of(kind).items()}
_log = logging.getLogger("pyels")


def choose_engine(engine: str | Engine, definition: Definition, bank: PatchBank, **options: Any) -> Engine:
    """The engine that evaluates a definition over a bank; logs which and why at level INFO.

    Parameters
    ----------
    engine   "auto"       the fastest exact one: "cuda" where the bank is on a GPU, else "cpu"
             "cpu"        exact, float32, multi-threaded
             "cuda"       exact, float32, on an NVIDIA GPU; a bank in CPU memory is brought there
             "sampled"    approximate, with an error it knows, for large banks ("faiss" is another name of it); needs
                          `pip install pyels[faiss]` to build an index, but not to use one
             "reference"  the definition in float64, single-threaded and slow: the oracle the others are tested against
             or an `Engine` itself
    options  fields of the engines, such as threads=2, None for their defaults; those of other engines are checked, and
             have no effect

    Raises
    ------
    ValueError   an unknown name; a definition or bank that the engine cannot do; options that may not be
    TypeError    an option that no engine has
    ImportError  an engine that this installation lacks
    """
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"unknown argument {name!r}; engines have the options {', '.join(_OPTIONS)}")
    options = {name: _OPTIONS[name](value) for name, value in options.items() if value is not None}
    if isinstance(engine, Engine):
        if options:
            raise TypeError(f"{', '.join(options)}: options are given to the engine, {type(engine).__name__}(..)")
        chosen, why = engine, "given"
    elif engine == "auto":
        kind = Cpu if bank.device == CPU else find_engine(Cuda.name)
        chosen, why = _made(kind, bank, options), f"the bank is on {bank.device}"
    else:
        chosen, why = _made(find_engine(engine), bank, options), "asked for"
    if (cannot := chosen.cannot(definition, bank)) is not None:
        raise ValueError(f"engine {chosen.name!r} {cannot}")
    _log.info("engine %s: %s", chosen.name, why)
    return chosen


def find_engine(name: str) -> type[Engine]:
    """The engine of this name. Raises ValueError for an unknown one, ImportError where it is not available."""
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"engine must be one of {', '.join(NAMES)}, got {name!r}")
    kind = ENGINES[_ALIASES.get(name, name)]
    if (missing := kind.missing()) is not None:
        raise ImportError(f"engine {name!r} is not available: {missing}; or use engine='cpu'")
    return kind


def available_engines() -> list[str]:
    """The engines that this installation has, on this machine."""
    return [name for name, kind in ENGINES.items() if kind.missing() is None]


def _made(kind: type[Engine], bank: PatchBank, options: dict[str, Any]) -> Engine:
    own = {name: value for name, value in options.items() if name in checks_of(kind)}
    if kind is Cuda and bank.device != CPU:
        own.setdefault("device", bank.device)
    return kind(**own)
