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
_AUTO = (Cpu, Reference)  # of banks in CPU memory, the fastest first
# Options by name, of whichever engine.
_OPTIONS = {name: check for kind in ENGINES.values() for name, check in checks_of(kind).items()}
_log = logging.getLogger("pyels")


def choose_engine(engine: str | Engine, definition: Definition, bank: PatchBank, **options: Any) -> Engine:
    """The engine that evaluates a definition over a bank; logs which and why at level INFO.

    Parameters
    ----------
    engine   "auto"       the fastest exact engine that can: "cuda" where the bank is on a GPU, else "cpu", else
                          "reference"
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
        chosen, why = _fastest(definition, bank, options)
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


def _fastest(definition: Definition, bank: PatchBank, options: dict[str, Any]) -> tuple[Engine, str]:
    """The first of the exact engines that can, where the bank is; with why the others cannot."""
    where = f"the bank is on {bank.device}"
    if bank.device != CPU:
        return _made(find_engine(Cuda.name), bank, options), where
    why: list[str] = []
    for kind in _AUTO:
        engine = _made(kind, bank, options)
        if (cannot := engine.cannot(definition, bank)) is None:
            return engine, "; ".join([*why, where])
        why.append(f"engine {kind.name!r} {cannot}")
    raise ValueError("; ".join(why))


def _made(kind: type[Engine], bank: PatchBank, options: dict[str, Any]) -> Engine:
    own = {name: value for name, value in options.items() if name in checks_of(kind)}
    if kind is Cuda and bank.device != CPU:
        own.setdefault("device", bank.device)
    return kind(**own)
