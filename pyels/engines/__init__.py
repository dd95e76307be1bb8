"""Choosing the engine that evaluates a machine."""

from __future__ import annotations

import importlib.util
import logging
import os

from pyels.engines.native import partial_posterior

__all__ = ["ENGINES", "available_engines", "choose_engine", "default_threads", "partial_posterior"]

ENGINES = ("auto", "reference", "cpu", "cuda", "faiss")
_log = logging.getLogger("pyels")


def choose_engine(name: str) -> str:
    """The engine that `name` stands for; logs why at level INFO.

    "auto"       the fastest exact engine for the bank's device: "cpu"
    "cpu"        exact, float32, multi-threaded
    "faiss"      approximate, with an error it knows, for large banks; needs `pip install pyels[faiss]`
    "reference"  the definition in float64, single-threaded and slow: the oracle the others are tested against

    Raises ValueError for an unknown name, ImportError for an engine that this installation lacks.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "faiss" and name not in available_engines():
        raise ImportError("engine 'faiss' needs faiss, which is not installed: pip install pyels[faiss]")
    if name not in ("auto", *available_engines()):
        raise ImportError(f"this version of pyels has no {name!r} engine; use engine='auto' or 'cpu'")
    if name == "auto":
        _log.info("engine cpu: the bank is in CPU memory")
        return "cpu"
    _log.info("engine %s: asked for", name)
    return name


def available_engines() -> list[str]:
    """The engines that this installation has."""
    return ["cpu", "reference"] + (["faiss"] if importlib.util.find_spec("faiss") else [])


def default_threads() -> int:
    """The number of CPUs that this process may use: its share, where torchrun started several on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
