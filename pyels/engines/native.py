"""The custom operator behind the compiled engines: allocates, passes addresses and sizes, and nothing else."""

# No `from __future__ import annotations` here: torch reads the operator's schema from the annotations.
import torch
from torch import Tensor

from pyels import _core


@torch.library.custom_op("pyels::partial_posterior", mutates_args=(), device_types="cpu")
def partial_posterior(
    images: Tensor,  # (N, C, H, W) uint8 or float32
    order: Tensor,  # (N,) int64 image numbers by class, or (0,) for 0 .. N-1
    begin: Tensor,  # (B,) int64 first entry of `order` for each query
    end: Tensor,  # (B,) int64 and the one after the last
    x: Tensor,  # (B, C, H, W) float32
    alpha: Tensor,  # (B,) float64
    sigma: Tensor,  # (B,) float64
    engine: str,
    window: int,
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m, s (B, H, W) and y (B, C, H, W) float64; then e, top (B, H, W) float64 and source (B, H, W) int64, or empty."""
    out = allocate(x, full)
    _core.partial_posterior(
        engine=engine,
        pixels=images.data_ptr(),
        is_uint8=images.dtype == torch.uint8,
        bank_shape=list(images.shape),
        order=order.data_ptr() if len(order) else 0,
        queries=len(x),
        x=x.data_ptr(),
        alpha=alpha.data_ptr(),
        sigma=sigma.data_ptr(),
        begin=begin.data_ptr(),
        end=end.data_ptr(),
        window=window,
        sources=sources,
        patch_size=patch_size,
        threads=threads,
        full=full,
        out=[tensor.data_ptr() for tensor in out],
    )
    return out


@partial_posterior.register_fake
def _(
    images: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    engine: str,
    window: int,
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return allocate(x, full)


def allocate(x: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = x.shape
    pixels = (batch, height, width)
    extra = pixels if full else (0,)
    return (
        x.new_empty(pixels, dtype=torch.float64),
        x.new_empty(pixels, dtype=torch.float64),
        x.new_empty(x.shape, dtype=torch.float64),
        x.new_empty(extra, dtype=torch.float64),
        x.new_empty(extra, dtype=torch.float64),
        x.new_empty(extra, dtype=torch.int64),
    )
