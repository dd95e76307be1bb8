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
from pyels.definition import Definition, Gaussian, Masks, Sources, Square, WholeImage
from pyels.denoiser import Query
from pyels.posterior import PartialPosterior, Want
from pyels.second import Answers, Asked

# As csrc/pyels.h numbers them.
_WINDOWS = {WholeImage: 0, Square: 1, Gaussian: 1, Masks: 2}
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
    responses: Tensor | None = None,
    index: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> PartialPosterior:
    """The partial posterior by a compiled engine; images are numbered as in `images`.

    Parameters
    ----------
    engine     "reference", "cpu", "sampled" or "cuda"
    options    the fields of its struct of options in csrc, by name
    images     (N, C, H, W) uint8 or float32, on the device where query.x is
    responses  (N, R, H, W) uint8 or float32, likewise: what answers in place of these
    index      the fields of struct Lists, by name, for every region: sums are then estimates
    """
    index = index or {}
    arrays, task = _task(engine, options, definition, query, responses)
    of_regions = [tensor for lists in index.values() for tensor in lists.values()]
    task.update(want=int(want), index={int(region): list(lists) for region, lists in index.items()})
    which = *_selected(images, selection), query.x, query.alpha, query.sigma
    out = partial_posterior(*which, list(arrays.values()), of_regions, json.dumps(task))
    height, width = query.x.shape[2:]
    places = definition.places(height, width, query.x.device)
    count = beside(query.x, selection.counts)[:, None, None] * places
    return PartialPosterior(count=count, **dict(zip(_names(task), out, strict=True)))


def answer(
    engine: str,
    options: Mapping[str, Any],
    definition: Definition,
    images: Tensor,
    selection: Selection,
    query: Query,
    asked: Asked,
    responses: Tensor | None = None,
) -> Answers:
    """What a second pass over these images answers; arguments as of `evaluate`."""
    arrays, task = _task(engine, options, definition, query, responses)
    all_given = {"log_sum": asked.log_sum, "mean": asked.mean, "cotangent": asked.cotangent, "pixel": asked.pixels}
    all_given["fold_taps"] = definition.fold_taps if asked.fold else None
    given = {name: tensor for name, tensor in all_given.items() if tensor is not None}
    second = {name: tensor.to(query.x.device).contiguous() for name, tensor in given.items()}
    wanted = {"folded": asked.fold, "variance": asked.variance, "derivative": asked.cotangent is not None}
    wanted |= {"influence": asked.influence, "heaviest": asked.top > 0, "heaviest_source": asked.top > 0}
    task.update(second=list(second), top=asked.top, wanted=[name for name, is_wanted in wanted.items() if is_wanted])
    which = *_selected(images, selection), query.x, query.alpha, query.sigma
    out = second_pass(*which, list(arrays.values()), list(second.values()), json.dumps(task))
    named = {"heaviest": "weight", "heaviest_source": "source"}
    return Answers(**{named.get(name, name): one for name, one in zip(task["wanted"], out, strict=True)})


def _task(
    engine: str, options: Mapping[str, Any], definition: Definition, query: Query, responses: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays that are there for some problems alone, by name, and what a task begins with."""
    all_arrays = {"taps": definition.taps, "precision": query.precision, "responses": responses}
    if isinstance(definition.window, Masks):
        assert isinstance(definition.window.weights, Tensor)
        all_arrays["sets" if definition.window.weights.dtype == torch.bool else "masks"] = definition.window.weights
    arrays = {name: array for name, array in all_arrays.items() if array is not None}
    return arrays, {
        "engine": engine,
        "options": dict(options),
        "window": _WINDOWS[type(definition.window)],
        "sources": _SOURCES[Sources(definition.sources)],
        "patch_size": definition.size,
        "arrays": list(arrays),
    }


def _selected(images: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = images.new_empty(0, dtype=torch.int64) if selection.order is None else selection.order.to(images.device)
    return images, order, selection.begin, selection.end


# Not by torch.library.custom_op, whose operators take a second at their first call: they import torch's compiler.
_library = torch.library.Library("pyels", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENTS = (
    "Tensor images, Tensor order, Tensor begin, Tensor end, Tensor x, Tensor alpha, Tensor sigma, Tensor[] arrays"
)
_library.define(  # type: ignore[no-untyped-call]
    f"partial_posterior({_ARGUMENTS}, Tensor[] index, str task) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag
)
_library.define(  # type: ignore[no-untyped-call]
    f"second_pass({_ARGUMENTS}, Tensor[] second, str task) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag
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
    arrays: Sequence[Tensor],  # those that the task names
    index: Sequence[Tensor],  # likewise
    task: str,  # JSON, as `evaluate` makes it: what is computed, by which engine
) -> list[Tensor]:
    """The tensors of a `PartialPosterior` that `_names` names.

    Where images, order and x are on a GPU: on its current stream, without waiting for it, so that it can be captured in
    a graph, which then keeps alpha, sigma, begin and end as they were.
    """
    told = json.loads(task)
    out = _allocate(x, arrays, told)
    to = _filled(_core.Out(), dict(zip(_names(told), map(Tensor.data_ptr, out), strict=True)))
    problem = _problem(images, order, begin, end, x, alpha, sigma, arrays, told)
    options = _options(told)
    if not x.is_cuda:
        tensors = iter(index)
        lists = [_lists(int(at), dict(zip(names, tensors, strict=False))) for at, names in told["index"].items()]
        given = [one for one in (options, lists) if one]
        getattr(_core, f"{told['engine']}_engine")(problem, *given, to)
    elif x.numel():
        _launch(_core.cuda_engine, problem, (options, to), (images, order, x))
    return out


@torch.library.impl(_library, "second_pass", "CPU")
@torch.library.impl(_library, "second_pass", "CUDA")
def _second_pass(
    images: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    arrays: Sequence[Tensor],
    second: Sequence[Tensor],  # those that the task names, (B, H, W), (B, R, H, W) or (k,) float64 or (P,) int64
    task: str,  # JSON, as `answer` makes it
) -> list[Tensor]:
    """What the task wants of struct Second; other arguments as of `partial_posterior`."""
    told = json.loads(task)
    given = dict(zip(told["second"], second, strict=True))
    out = _allocate_answers(images, x, arrays, given, told)
    struct = _filled(_core.Second(), {name: tensor.data_ptr() for name, tensor in given.items()})
    _filled(struct, dict(zip(told["wanted"], map(Tensor.data_ptr, out), strict=True)))
    _filled(struct, {"top": told["top"], "pixels": len(given["pixel"]) if "pixel" in given else 0})
    problem = _problem(images, order, begin, end, x, alpha, sigma, arrays, told)
    options = _options(told)
    if not x.is_cuda:
        getattr(_core, f"{told['engine']}_second")(problem, *([] if options is None else [options]), struct)
    elif x.numel():
        _launch(_core.cuda_second, problem, (struct,), (images, order, x, *second))
    return out


partial_posterior = torch.ops.pyels.partial_posterior.default
second_pass = torch.ops.pyels.second_pass.default


@torch.library.register_fake("pyels::partial_posterior", lib=_library)  # type: ignore[untyped-decorator]
def _(*given: Any) -> list[Tensor]:
    *_, x, _, _, arrays, _, task = given
    return _allocate(x, arrays, json.loads(task))


@torch.library.register_fake("pyels::second_pass", lib=_library)  # type: ignore[untyped-decorator]
def _(*given: Any) -> list[Tensor]:
    images, _, _, _, x, _, _, arrays, second, task = given
    told = json.loads(task)
    return _allocate_answers(images, x, arrays, dict(zip(told["second"], second, strict=True)), told)


def describe_lists(images: Tensor, patch_size: int, threads: int, region: int, tensors: Mapping[str, Tensor]) -> None:
    """Fill in what lists say of their windows, those of a region: mean, spread, lead and tail of these tensors."""
    options = _filled(_core.CpuOptions(), {"threads": threads})
    _core.describe_lists(_bank_problem(images, patch_size), options, _lists(region, tensors))


def _bank_problem(images: Tensor, patch_size: int) -> Any:
    """A problem that says of the bank what there is to say: images (N, C, H, W)."""
    sizes = dict(zip(("images", "channels", "height", "width"), images.shape, strict=True))
    return _filled(_core.Problem(), {**_pixels("pixels", images), "patch_size": patch_size, **sizes})


def _problem(
    images: Tensor,
    order: Tensor,
    begin: Tensor,
    end: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    arrays: Sequence[Tensor],
    told: Mapping[str, Any],
) -> Any:
    """Struct Problem, which points to these tensors."""
    problem = _bank_problem(images, told["patch_size"])
    tensors = {"x": x, "alpha": alpha, "sigma": sigma, "begin": begin, "end": end}
    tensors |= dict(zip(told["arrays"], arrays, strict=True))
    if (responses := tensors.pop("responses", None)) is not None:
        _filled(problem, {**_pixels("responses", responses), "response_channels": responses.shape[1]})
    _filled(problem, {name: tensor.data_ptr() for name, tensor in tensors.items()})
    _filled(problem, {"order": order.data_ptr() if len(order) else 0, "queries": len(x)})
    return _filled(problem, {name: told[name] for name in ("window", "sources", "want") if name in told})


def _pixels(name: str, images: Tensor) -> dict[str, int]:
    return {f"{name}_{'uint8' if images.dtype == torch.uint8 else 'float'}": images.data_ptr()}


def _options(told: Mapping[str, Any]) -> Any:
    return _filled(_OPTIONS[told["engine"]](), told["options"]) if told["engine"] in _OPTIONS else None


def _lists(region: int, tensors: Mapping[str, Tensor]) -> Any:
    """Struct Lists of a region, of the tensors that it points to."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    counts = {"region": region, "count": len(tensors["begin"]), "directions_count": len(tensors["directions"])}
    return _filled(_core.Lists(), {**addresses, **counts})


def _launch(work: Any, problem: Any, told: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> None:
    """Engine "cuda": of a problem that, with what else is told, points to these tensors, among others."""
    device = tensors[0].get_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        for tensor in tensors:  # made on another stream, perhaps, and not to be reused before this is done
            tensor.record_stream(stream)
        # From torch's allocator, which hands memory out again in the order of the stream.
        workspace = tensors[0].new_empty(_core.cuda_workspace(problem, told[0], device), dtype=torch.uint8)
        work(problem, *told, workspace.data_ptr(), device, stream.cuda_stream)


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


def _allocate(x: Tensor, arrays: Sequence[Tensor], task: Mapping[str, Any]) -> list[Tensor]:
    batch, _, height, width = x.shape
    means = Want.MEAN in Want(task["want"])
    answers = (batch, _answer_channels(x, arrays, task) if means else 0, height, width)
    return [
        x.new_empty(
            answers if name in ("y", "sy", "yy") else (batch, height, width),
            dtype=torch.int64 if name == "source" else torch.float64,
        )
        for name in _names(task)
    ]


def _answer_channels(x: Tensor, arrays: Sequence[Tensor], task: Mapping[str, Any]) -> int:
    """R."""
    answers: Tensor = dict(zip(task["arrays"], arrays, strict=True)).get("responses", x)
    return answers.shape[1]


def _allocate_answers(
    images: Tensor, x: Tensor, arrays: Sequence[Tensor], second: Mapping[str, Tensor], task: Mapping[str, Any]
) -> list[Tensor]:
    """Zeros to be added to; no sources yet."""
    answers = (len(x), _answer_channels(x, arrays, task), *x.shape[2:])
    listed = (len(x), len(second.get("pixel", ())), task["top"])
    shapes = {"folded": answers, "variance": answers, "derivative": x.shape, "influence": (len(x), len(images))}
    return [
        x.new_full(listed, -1, dtype=torch.int64)
        if name == "heaviest_source"
        else x.new_zeros(shapes.get(name, listed), dtype=torch.float64)
        for name in task["wanted"]
    ]
