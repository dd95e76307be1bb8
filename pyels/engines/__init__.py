"""Choosing the engine that evaluates a machine."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from pyels.engines import cuda
from pyels.engines.native import partial_posterior

__all__ = ["ENGINES", "available_engines", "choose_engine", "default_threads", "partial_posterior"]

ENGINES = ("auto", "reference", "cpu", "cuda", "faiss")
_log = logging.getLogger("pyels")


def choose_engine(name: str, device: torch.device | None = None) -> str:
    """The engine that `name` stands for, for a bank on `device` (None: in CPU memory); logs why at level INFO.

    "auto"       the fastest exact engine for the bank's device: "cuda" on a GPU, else "cpu"
    "cpu"        exact, float32, multi-threaded
    "cuda"       exact, float32, on an NVIDIA GPU; a bank in CPU memory is brought there
    "faiss"      approximate, with an error it knows, for large banks; needs `pip install pyels[faiss]`
    "reference"  the definition in float64, single-threaded and slow: the oracle the others are tested against

    Raises ValueError for an unknown name, or for an engine that does not work where the bank is; ImportError for an
    engine that this installation lacks.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    on_gpu = device is not None and device.type == "cuda"
    if name == "auto":
        name = "cuda" if on_gpu else "cpu"
        why = f"the bank is on {device}" if on_gpu else "the bank is in CPU memory"
    else:
        why = "asked for"
    if name == "faiss" and name not in available_engines():
        raise ImportError("engine 'faiss' needs faiss, which is not installed: pip install pyels[faiss]")
    if name == "cuda" and (missing := cuda.missing()) is not None:
        raise ImportError(f"engine 'cuda' is not available: {missing}; or use engine='cpu'")
    if on_gpu and name != "cuda":
        raise ValueError(f"engine {name!r} needs the bank in CPU memory, but it is on {device}; use bank.to('cpu')")
    _log.info("engine %s: %s", name, why)
    return name


def available_engines() -> list[str]:
    """The engines that this installation has, on this machine."""
    names = ["cpu", "reference"]
    if cuda.missing() is None:
        names.append("cuda")
    if importlib.util.find_spec("faiss"):
        names.append("faiss")
    return names


def default_threads() -> int:
    """The number of CPUs that this process may use: its share, where torchrun started several on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
