"""Engine "faiss": importance sampling of the windows that an index finds, with the error that this makes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyels import _core
from pyels.bank import PatchBank
from pyels.engines.native import allocate, outputs, problem
from pyels.index import Index
from pyels.posterior import PartialPosterior

MOST_PLACES = 1 << 16  # of an image, as places in an index are 16-bit numbers


def sampled_posterior(
    bank: PatchBank,
    index: Index,
    begin: Tensor,  # (B,) int64 images of each query, all the same and those of the index: first entry of `order`
    end: Tensor,  # (B,) int64 and the one after the last
    by_class: bool,  # begin and end are places in bank.order, not image numbers
    x: Tensor,  # (B, C, H, W) float32
    alpha: Tensor,  # (B,) float64
    sigma: Tensor,  # (B,) float64
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
    tolerance: float,
    count: Tensor,  # (B, H, W) float64
) -> PartialPosterior:
    m, s, y, e, top, source = allocate(x, full)
    ss, chance, sy, yy = (torch.empty_like(like) for like in (s, s, y, y))
    order = bank.order if by_class else bank.order[:0]
    options = _core.SampledOptions()
    options.threads, options.tolerance = threads, tolerance
    _core.sampled_engine(
        problem(bank.images, order, begin, end, x, alpha, sigma, 1, sources, patch_size, full),
        options,
        index.lists(),
        outputs((m, s, y, e, top, source, ss, sy, yy, chance)),
    )
    sampled = {"ss": ss, "sy": sy, "yy": yy, "chance": chance}
    if not full:
        return PartialPosterior(m, s, y, count, **sampled)
    return PartialPosterior(m, s, y, count, e, top, source, **sampled)
