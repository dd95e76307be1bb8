"""Data sets by name or path, as banks: `pyels.datasets.load`."""

from pyels.bank.datasets import EMBEDDED, NAMES, from_pairs, load, read_idx, where

__all__ = ["EMBEDDED", "NAMES", "from_pairs", "load", "read_idx", "where"]
