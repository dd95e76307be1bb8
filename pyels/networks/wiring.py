"""The conventions in which networks differ, tried on one that does not denoise: which of them make it do so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyels.denoiser import Query
from pyels.networks.adapters import Asked, NetworkDenoiser
from pyels.networks.prediction import PREDICTIONS
from pyels.schedules import SCHEDULES, make_schedule

_TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "1000 * t - 1 for t": lambda t: (1000 * t - 1).clamp(min=0),
    "1000 * t for t": lambda t: 1000 * t,
    "t / 1000 for t": lambda t: t / 1000,
    "1 - t for t": lambda t: 1 - t,
    "1000 * (1 - t) for t": lambda t: 1000 * (1 - t),
}
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))


def rewired(given: NetworkDenoiser, most: int) -> Iterator[tuple[tuple[str, ...], NetworkDenoiser]]:
    """The network wired otherwise in how it is asked, and what was changed, in words: of schedule, time and pixel range
    up to `most`, 0, 1 or 2."""
    changes = [
        *((0, f"schedule={name!r}", _set(schedule=make_schedule(name))) for name in SCHEDULES),
        *((1, name, _with_times(time)) for name, time in _TIMES.items()),
        (1, "timesteps=1000", _set(timesteps=1000)),
        *((2, f"pixel_range=({low:g}, {high:g})", _set(pixel_range=(low, high))) for low, high in _RANGES),
    ]
    yield (), given
    for _, words, change in changes if most > 0 else ():
        yield (words,), change(given)
    for part, words, change in changes if most > 1 else ():
        for other, more, another in changes:
            if part < other:
                yield (words, more), another(change(given))


def readings(given: NetworkDenoiser, query: Query) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The estimates of x0 that one answer of the network means by each of the predictions, and what was changed."""
    with torch.no_grad():
        asked = given.ask(query)
    for predicts in (given.predicts, *(name for name in PREDICTIONS if name != given.predicts)):
        reader = _set(predicts=predicts)(given)
        words = () if predicts == given.predicts else (f"predicts={predicts!r}",)
        for sign in (1, -1):
            turned = Asked(asked.x, asked.alpha, asked.sigma, sign * asked.answer)
            more = () if sign == 1 else ("the other sign of the output",)
            try:
                yield (*words, *more), reader.x0_of(turned)
            except ValueError:  # such an answer says nothing of x0 at this level
                continue


def _set(**conventions: object) -> Callable[[NetworkDenoiser], NetworkDenoiser]:
    def change(given: NetworkDenoiser) -> NetworkDenoiser:
        changed = copy.copy(given)
        vars(changed).update(conventions)
        return changed

    return change


def _with_times(time: Callable[[Tensor], Tensor]) -> Callable[[NetworkDenoiser], NetworkDenoiser]:
    def change(given: NetworkDenoiser) -> NetworkDenoiser:
        asked, takes = given.function, given.takes
        return _set(function=lambda x, t, labels: asked(*(x, time(t), labels)[:takes]), takes=3, timesteps=None)(given)

    return change
