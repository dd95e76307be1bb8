"""The seam to the compiled engines: a custom operator that allocates, passes addresses and sizes, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import pyels._core as _core
from pyels.bank.selection import Selection
from pyels.checks import beside
from pyels.definition import Definition, Masks, Sources, Square, WholeImage
from pyels.denoiser import Query
from pyels.posterior import PartialPosterior, Want

# As csrc/pyels.h numbers them.
_WINDOWS = {WholeImage: 0, Square: 1, Masks: 2}
_SOURCES = {source: number for number, source in enumerate(Sources)}
_OPTIONS = {"cpu": _core.CpuOptions, "sampled": _core.SampledOptions, "cuda": _core.CudaOptions}


def evaluate(
    engine: str,
    options: Mapping[str, Any],
    definition: Definition,
    images: Tensor,
    selection: Selection,
    query: Query,
    want: Want,
    masks: Tensor | None = None,
    index: Mapping[str, Tensor] | None = None,
) -> PartialPosterior:
    """The partial posterior by a compiled engine; images are numbered as in `images`.

    Parameters
    ----------
    engine   "reference", "cpu", "sampled" or "cuda"
    options  the fields of its struct of options in csrc, by name
    images   (N, C, H, W) uint8 or float32, on the device where query.x is
    masks    (H*W, C, H, W) float64, of windows that are masks
    index    the fields of struct Lists, by name: sums are then estimates
    """
    index = index or {}
    task = {
        "engine": engine,
        "options": dict(options),
        "window": _WINDOWS[type(definition.window)],
        "sources": _SOURCES[Sources(definition.sources)],
        "patch_size": definition.size,
        "want": int(want),
        "index": list(index),
    }
    order = images.new_empty(0, dtype=torch.int64) if selection.order is None else selection.order.to(images.device)
    which, levels = (order, selection.begin, selection.end), (query.alpha, query.sigma)
    out = partial_posterior(images, *which, query.x, *levels, masks, list(index.values()), json.dumps(task))
    height, width = query.x.shape[2:]
    places = definition.places(height, width, query.x.device)
    count = beside(query.x, selection.counts)[:, None, None] * places
    return PartialPosterior(count=count, **dict(zip(_names(task), out, strict=True)))


# Not by torch.library.custom_op, whose operators take a second at their first call: they import torch's compiler.
_library = torch.library.Library("pyels", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "partial_posterior(Tensor images, Tensor order, Tensor begin, Tensor end, Tensor x, Tensor alpha, Tensor sigma, "
    "Tensor? masks, Tensor[] index, str task) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "partial_posterior", "CPU")
@torch.library.impl(_library, "partial_posterior", "CUDA")
def _partial_posterior(
    images: Tensor,  # (N, C, H, W) uint8 or float32
    order: Tensor,  # (M,) int64 image numbers, or (0,) for 0 .. N-1
    begin: Tensor,  # (B,) int64 first entry of `order` for each query; in CPU memory
    end: Tensor,  # (B,) int64 and the one after the last; in CPU memory
    x: Tensor,  # (B, C, H, W) float32
    alpha: Tensor,  # (B,) float64; in CPU memory
    sigma: Tensor,  # (B,) float64; in CPU memory
    masks: Tensor | None,  # (H*W, C, H, W) float64
    index: Sequence[Tensor],
    task: str,  # JSON, as `evaluate` makes it: what is computed, by which engine
) -> list[Tensor]:
    """The tensors of a `PartialPosterior` that `_names` names.

    Where images, order and x are on a GPU: on its current stream, without waiting for it, so that it can be captured in
    a graph, which then keeps alpha, sigma, begin and end as they were.
    """
    told = json.loads(task)
    out = _allocate(x, told)
    to = _filled(_core.Out(), dict(zip(_names(told), map(Tensor.data_ptr, out), strict=True)))
    problem = _bank_problem(images, told["patch_size"])
    _filled(
        problem,
        {
            "order": order.data_ptr() if len(order) else 0,
            "queries": len(x),
            "x": x.data_ptr(),
            "alpha": alpha.data_ptr(),
            "sigma": sigma.data_ptr(),
            "begin": begin.data_ptr(),
            "end": end.data_ptr(),
            "masks": 0 if masks is None else masks.data_ptr(),
            **{name: told[name] for name in ("window", "sources", "want")},
        },
    )
    options = _filled(_OPTIONS[told["engine"]](), told["options"]) if told["engine"] in _OPTIONS else None
    if not x.is_cuda:
        lists = _lists(dict(zip(told["index"], index, strict=True))) if told["index"] else None
        given = [one for one in (options, lists) if one is not None]
        getattr(_core, f"{told['engine']}_engine")(problem, *given, to)
    elif x.numel():
        _launch(problem, options, (images, order, x), out, to)
    return out


partial_posterior = torch.ops.pyels.partial_posterior.default


@torch.library.register_fake("pyels::partial_posterior", lib=_library)  # type: ignore[untyped-decorator]
def _(
    images: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    index: Sequence[Tensor],
    task: str,
) -> list[Tensor]:
    return _allocate(x, json.loads(task))


def describe_lists(images: Tensor, patch_size: int, threads: int, tensors: Mapping[str, Tensor]) -> None:
    """Fill in what an index says of its windows: mean, spread, code, norm and rest of its tensors."""
    options = _filled(_core.CpuOptions(), {"threads": threads})
    _core.describe_lists(_bank_problem(images, patch_size), options, _lists(tensors))


def _bank_problem(images: Tensor, patch_size: int) -> Any:
    """A problem that says of the bank what there is to say: images (N, C, H, W)."""
    pixels = "pixels_uint8" if images.dtype == torch.uint8 else "pixels_float"
    sizes = dict(zip(("images", "channels", "height", "width"), images.shape, strict=True))
    return _filled(_core.Problem(), {pixels: images.data_ptr(), "patch_size": patch_size, **sizes})


def _lists(tensors: Mapping[str, Tensor]) -> Any:
    """Struct Lists, of the tensors that it points to."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    counts = {"count": len(tensors["begin"]), "directions_count": len(tensors["directions"])}
    return _filled(_core.Lists(), {**addresses, **counts})


def _launch(problem: Any, options: Any, tensors: tuple[Tensor, ...], out: list[Tensor], to: Any) -> None:
    """Engine "cuda": of a problem that points to these tensors, among others."""
    device = out[0].get_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        for tensor in tensors:  # made on another stream, perhaps, and not to be reused before this is done
            tensor.record_stream(stream)
        # From torch's allocator, which hands memory out again in the order of the stream.
        workspace = out[0].new_empty(_core.cuda_workspace(problem, options, device), dtype=torch.uint8)
        _core.cuda_engine(problem, options, to, workspace.data_ptr(), device, stream.cuda_stream)


def _filled(struct: Any, values: Mapping[str, Any]) -> Any:
    for name, value in values.items():
        setattr(struct, name, value)
    return struct


def _names(task: Mapping[str, Any]) -> list[str]:
    """The fields of a `PartialPosterior` that are filled in."""
    names = ["m", "s", "y"]
    if Want.POSTERIOR in Want(task["want"]):
        names += ["e", "top", "source"]
    if task["index"]:
        names += ["ss", "sy", "yy", "chance"]
    return names


def _allocate(x: Tensor, task: Mapping[str, Any]) -> list[Tensor]:
    batch, _, height, width = x.shape
    return [
        x.new_empty(
            x.shape if name in ("y", "sy", "yy") else (batch, height, width),
            dtype=torch.int64 if name == "source" else torch.float64,
        )
        for name in _names(task)
    ]
