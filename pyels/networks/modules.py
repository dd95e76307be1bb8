"""The torch modules that a function works with, and whether these answer alike at every call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def modules_of(function: Any) -> list[nn.Module]:
    """The module that a function is, or those that its closure, defaults, globals, arguments or object hold."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            found[id(one)] = one
        else:
            waiting += _holds(one, one is function)
    return list(found.values())


def _holds(one: Any, is_function: bool) -> Iterable[Any]:
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, MethodType):
        return [one.__func__, one.__self__, *getattr(one.__self__, "__dict__", {}).values()]
    if isinstance(one, FunctionType):
        cells = [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
        named = [one.__globals__[name] for name in _names(one.__code__) if name in one.__globals__]
        own = [value for value in named if getattr(value, "__module__", None) == one.__module__ or _may_hold(value)]
        wrapped = [one.__wrapped__] if hasattr(one, "__wrapped__") else []
        return [*cells, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values(), *own, *wrapped]
    if isinstance(one, (list, tuple)):
        return one
    if isinstance(one, dict):
        return one.values()
    return [type(one).__call__, *vars(one).values()] if is_function and hasattr(one, "__dict__") else []


def _may_hold(value: Any) -> bool:
    return isinstance(value, (nn.Module, functools.partial, MethodType, list, tuple, dict))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def vary(modules: Iterable[nn.Module]) -> list[str]:
    """The kinds of layers among them whose answers differ from call to call, or with what else is in the batch."""
    layers = [layer for module in modules for layer in module.modules()]
    return sorted({type(layer).__name__ for layer in layers if _varies(layer)})


def _varies(layer: nn.Module) -> bool:
    if isinstance(layer, _NormBase) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training or layer.running_mean is None
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training and layer.track_running_stats
    rates = [getattr(layer, name, None) for name in ("p", "dropout", "drop_prob")]
    random = any(isinstance(rate, float) and rate > 0 for rate in rates) or isinstance(layer, nn.RReLU)
    return layer.training and random


def ready(module: nn.Module) -> nn.Module:
    """The module in evaluation mode; a copy in float32 where its weights are of another precision."""
    module = module.eval()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = copy.deepcopy(module).float()
    return module
