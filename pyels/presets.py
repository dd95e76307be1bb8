"""Published settings: patch sizes that Kamb & Ganguli calibrated to their networks, the stepping of their released
code, and what the authors of the other denoisers ran them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# Calibrated sizes at t = 1/20, 2/20 .. 20/20, by data set, network and its padding (facts read from the paper's
# released files).
PATCH_SIZES: dict[str, tuple[int, ...]] = {
    "cifar10-resnet-circular": (3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15, 15),
    "cifar10-resnet-zeros": (3, 3, 3, 3, 5, 5, 5, 7, 7, 7, 7, 9, 9, 11, 11, 13, 15, 17, 17, 17),
    "cifar10-unet-zeros": (3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 9, 9, 11, 13, 13, 15, 17, 25),
    "celeba-resnet-zeros": (3, 3, 3, 5, 5, 5, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 15, 19, 19),
    "celeba-unet-zeros": (3, 3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5, 7, 7, 9, 9, 9, 13, 19, 27),
    "fashion-mnist-resnet-zeros": (3, 3, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 13, 13, 13, 15, 15, 15, 17, 17),
    "fashion-mnist-unet-zeros": (3, 3, 5, 5, 7, 7, 7, 9, 11, 11, 11, 13, 15, 15, 21, 23, 25, 25, 25, 25),
    "mnist-resnet-circular": (3, 3, 5, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 11, 9, 9, 7, 7, 3, 3),
    "mnist-resnet-zeros": (3, 3, 5, 5, 5, 7, 7, 7, 9, 9, 11, 11, 11, 11, 13, 15, 15, 15, 15, 15),
    "mnist-unet-zeros": (3, 3, 3, 5, 5, 7, 7, 7, 9, 9, 9, 11, 13, 15, 17, 21, 23, 23, 25, 27),
}

# What the authors of the other denoisers gave these on their data, arguments by name (facts read from the papers and
# their released code). Of two thresholds in use for a data set the other is .02 (MNIST, Fashion-MNIST), .03 (CIFAR-10).
# They step through 10 levels of the linear schedule.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "PCALocality": {  # arXiv 2509.09672
        "mnist": {"threshold": 0.005},
        "fashion-mnist": {"threshold": 0.005},
        "cifar10": {"threshold": 0.05},
        "celeba": {"threshold": 0.02},
    },
    "SmoothedIS": {  # arXiv 2310.12395
        "mnist": {"std": 1.0, "draws": 10},
        "cifar10": {"std": 0.1, "draws": 10},
    },
}

# Of PSPC (arXiv 2411.19339) on CIFAR-10, at the 18 levels t = 17/17 .. 0/17 of schedule edm, noisiest first: the sides
# of its squares, where 32 is the whole image (`IS`), and the shares of a network's sensitivity that flexible windows
# hold.
PSPC_SIDES = (*(32,) * 7, 23, 15, 11, 7, 5, *(3,) * 6)
PSPC_MASSES = (*(1.0,) * 7, 0.7, 0.7, 0.5, *(0.4,) * 4, *(0.3,) * 4)


def settings(machine: str, data: str) -> dict[str, Any]:
    """Arguments of a machine, such as

        pyels.PCALocality(bank, **pyels.presets.settings("PCALocality", "cifar10"))

    Raises ValueError for names that are not in `SETTINGS`.
    """
    for name, known in (machine, SETTINGS), (data, SETTINGS.get(machine, {})):
        if name not in known:
            raise ValueError(f"published settings are of {', '.join(known)}, got {name!r}")
    return dict(SETTINGS[machine][data])


def patch_sizes(name: str, steps: int = 20) -> list[int]:
    """Calibrated sizes for `pyels.sample(..., steps=steps)`, the cleanest step first.

    For other than 20 steps, see `at_steps`.
    Raises ValueError for an unknown name; the names are the keys of `PATCH_SIZES`.
    """
    return at_steps(_sizes(name), steps)


def at_steps(values: Sequence[T], steps: int) -> list[T]:
    """Values that were calibrated for as many steps as they are, for another number: the value at t is that of the next
    calibrated time at or above t."""
    return [values[math.ceil(i * len(values) / steps) - 1] for i in range(1, steps + 1)]


def kamb2025(name: str, steps: int = 20) -> dict[str, Any]:
    """Arguments that make `pyels.sample` step as the paper's released code does, to reproduce published figures.

    That code starts its machine one step late, at t = (n-1)/n, from the same noise, and reads the size calibrated for
    t = (i+1)/n at t = i/n:

        pyels.sample(machine, noise, **pyels.presets.kamb2025("fashion-mnist-resnet-zeros"))
    """
    return shifted(patch_sizes(name, steps))


def shifted(sizes: Sequence[int]) -> dict[str, Any]:
    """`kamb2025` for sizes of your own, calibrated at t = 1/n .. n/n."""
    n = len(sizes)
    if n < 2:
        raise ValueError(f"stepping as the released code does needs at least 2 sizes, got {n}")
    return {"steps": [i / n for i in range(1, n)], "patch_sizes": list(sizes[1:]), "schedule": "cosine"}


def _sizes(name: str) -> tuple[int, ...]:
    if name not in PATCH_SIZES:
        raise ValueError(f"preset must be one of {', '.join(PATCH_SIZES)}, got {name!r}")
    return PATCH_SIZES[name]
