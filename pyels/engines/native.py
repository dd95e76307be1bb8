"""The custom operator behind the compiled engines: allocates, passes addresses and sizes, and nothing else."""

# No `from __future__ import annotations` here: torch reads the operator's schema from the annotations.
from typing import Any

import torch
from torch import Tensor

from pyels import _core

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("pyels::partial_posterior", mutates_args=(), device_types=("cpu", "cuda"))
def partial_posterior(
    images: Tensor,  # (N, C, H, W) uint8 or float32
    order: Tensor,  # (N,) int64 image numbers by class, or (0,) for 0 .. N-1
    begin: Tensor,  # (B,) int64 first entry of `order` for each query; in CPU memory
    end: Tensor,  # (B,) int64 and the one after the last; in CPU memory
    x: Tensor,  # (B, C, H, W) float32
    alpha: Tensor,  # (B,) float64; in CPU memory
    sigma: Tensor,  # (B,) float64; in CPU memory
    engine: str,
    window: int,
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
    tensor_cores: bool,  # see Problem in csrc/pyels.h
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m, s (B, H, W) and y (B, C, H, W) float64; then e, top (B, H, W) float64 and source (B, H, W) int64, or empty.

    Where images, order and x are on a GPU: on its current stream, without waiting for it, so that it can be captured in
    a graph, which then keeps alpha, sigma, begin and end as they were.
    """
    out = allocate(x, full)
    given = arguments(
        images, order, begin, end, x, alpha, sigma, window, sources, patch_size, threads, full, tensor_cores
    )
    if not x.is_cuda:
        _core.partial_posterior(**given, engine=engine, out=addresses(out))
    elif x.numel():
        _launch(given, (images, order, x), out)
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
    tensor_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return allocate(x, full)


def _launch(given: dict[str, Any], tensors: tuple[Tensor, ...], out: Results) -> None:
    """Engine "cuda": `given` as `arguments` made it of these tensors, among others."""
    device = out[0].get_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        for tensor in tensors:  # made on another stream, perhaps, and not to be reused before this is done
            tensor.record_stream(stream)
        # From torch's allocator, which hands memory out again in the order of the stream.
        workspace = out[0].new_empty(_core.cuda_workspace(**given, device=device), dtype=torch.uint8)
        _core.cuda_posterior(
            **given, out=addresses(out), workspace=workspace.data_ptr(), device=device, stream=stream.cuda_stream
        )


def allocate(x: Tensor, full: bool) -> Results:
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


def arguments(
    images: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    window: int,
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
    tensor_cores: bool = False,
) -> dict[str, Any]:
    """What every function of `_core` that evaluates queries is told."""
    return {
        "pixels": images.data_ptr(),
        "is_uint8": images.dtype == torch.uint8,
        "bank_shape": list(images.shape),
        "order": order.data_ptr() if len(order) else 0,
        "queries": len(x),
        "x": x.data_ptr(),
        "alpha": alpha.data_ptr(),
        "sigma": sigma.data_ptr(),
        "begin": begin.data_ptr(),
        "end": end.data_ptr(),
        "window": window,
        "sources": sources,
        "patch_size": patch_size,
        "threads": threads,
        "full": full,
        "tensor_cores": tensor_cores,
    }


def addresses(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
