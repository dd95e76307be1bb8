"""The custom operator behind the compiled engines: allocates, passes addresses and sizes, and nothing else."""

# No `from __future__ import annotations` here: torch reads the operator's schema from the annotations.
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
    given = problem(images, order, begin, end, x, alpha, sigma, window, sources, patch_size, full)
    if x.is_cuda:
        if x.numel():
            cuda_options = _core.CudaOptions()
            cuda_options.tensor_cores = tensor_cores
            _launch(given, cuda_options, (images, order, x), out)
    elif engine == "reference":
        _core.reference_engine(given, outputs(out))
    else:
        options = _core.CpuOptions()
        options.threads = threads
        _core.cpu_engine(given, options, outputs(out))
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


def _launch(given: _core.Problem, options: _core.CudaOptions, tensors: tuple[Tensor, ...], out: Results) -> None:
    """Engine "cuda": `given` as `problem` made it of these tensors, among others."""
    device = out[0].get_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        for tensor in tensors:  # made on another stream, perhaps, and not to be reused before this is done
            tensor.record_stream(stream)
        # From torch's allocator, which hands memory out again in the order of the stream.
        workspace = out[0].new_empty(_core.cuda_workspace(given, options, device), dtype=torch.uint8)
        _core.cuda_engine(given, options, outputs(out), workspace.data_ptr(), device, stream.cuda_stream)


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


def problem(
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
    full: bool,
) -> _core.Problem:
    """What every engine is told."""
    a = bank_problem(images, patch_size)
    a.order = order.data_ptr() if len(order) else 0
    a.queries = len(x)
    a.x, a.alpha, a.sigma = x.data_ptr(), alpha.data_ptr(), sigma.data_ptr()
    a.begin, a.end = begin.data_ptr(), end.data_ptr()
    a.window, a.sources, a.want = window, sources, 3 if full else 1
    return a


def bank_problem(images: Tensor, patch_size: int) -> _core.Problem:
    a = _core.Problem()
    if images.dtype == torch.uint8:
        a.pixels_uint8 = images.data_ptr()
    else:
        a.pixels_float = images.data_ptr()
    a.images, a.channels, a.height, a.width = images.shape
    a.patch_size = patch_size
    return a


def outputs(results: tuple[Tensor, ...]) -> _core.Out:
    """The addresses of m, s, y, e, top, source and, of a sampled posterior, ss, sy, yy, chance."""
    out = _core.Out()
    for name, tensor in zip(("m", "s", "y", "e", "top", "source", "ss", "sy", "yy", "chance"), results, strict=False):
        setattr(out, name, tensor.data_ptr())
    return out
