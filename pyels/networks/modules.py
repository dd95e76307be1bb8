"""The torch modules that a function works with, and whether these answer alike at every call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_MOST = 1000  # things in a list that may hold modules: longer ones are data


def modules_of(function: Any) -> list[nn.Module]:
    """The module that a function is, or those that it uses of its closure, defaults, globals, arguments and object."""
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
        elif isinstance(one, (list, tuple, dict)):
            waiting += (one.values() if isinstance(one, dict) else one) if len(one) <= _MOST else ()
        elif isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, (FunctionType, MethodType)):
            waiting += _used_by(one)
        elif one is function and isinstance(getattr(type(one), "__call__", None), FunctionType):  # noqa: B004
            waiting += _used_by(MethodType(type(one).__call__, one))
    return list(found.values())


def _used_by(one: FunctionType | MethodType) -> list[Any]:
    owner = [one.__self__] if isinstance(one, MethodType) else []
    function: Any = getattr(one, "__func__", one)
    names = set(names_in(function.__code__))
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    own = [one for one in named if not hasattr(one, "__code__") or one.__module__ == function.__module__]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    wrapped = [function.__wrapped__] if hasattr(function, "__wrapped__") else []
    return [part for one in (*owner, *cells, *own, *given, *wrapped) for part in _parts(one, names)]


def _parts(one: Any, names: set[str]) -> list[Any]:
    """What a function that has these names in it uses of an object: the attributes of these names, or the whole."""
    if isinstance(one, (type, ModuleType, FunctionType)):
        return [one] if isinstance(one, FunctionType) else []
    parts = {**getattr(one, "__dict__", {}), **(one._modules if isinstance(one, nn.Module) else {})}
    used = [part for name, value in parts.items() if name in names for part in _parts(value, names)]
    return used if any(isinstance(part, (nn.Module, list, tuple, dict)) for part in used) else [one]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that code names, that of the functions inside it too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)


def vary(modules: Iterable[nn.Module]) -> list[str]:
    """The kinds of layers among them whose answers differ from call to call, or with what else is in the batch."""
    layers = [layer for module in modules for layer in module.modules()]
    return sorted({type(layer).__name__ for layer in layers if _varies(layer)})


def _varies(layer: nn.Module) -> bool:
    if isinstance(layer, _NormBase) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training or layer.running_mean is None
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training and layer.track_running_stats
    rates = [vars(layer).get(name) for name in ("p", "dropout", "drop_prob")]
    random = any(isinstance(rate, float) and rate > 0 for rate in rates) or isinstance(layer, nn.RReLU)
    return layer.training and random


def ready(module: nn.Module) -> nn.Module:
    """The module in evaluation mode; a copy in float32 where its weights are of another precision."""
    module = module.eval()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = copy.deepcopy(module).float()
    return module
