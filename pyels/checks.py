"""What arguments may be. Each check says what was given, what is allowed, and what to do."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Beyond these, squared distances of float32 pixels leave no digits for the weights.
LARGEST_PIXEL = 1e6
LARGEST_ALPHA = 1e6
SMALLEST_SIGMA = 1e-9
MOST_THREADS = 4096
CPU = torch.device("cpu")
forked = False  # whether this process is a fork of one that had imported this
# One noise level for all images, or one for each: a number, or (B,) as a list, an array or a tensor.
Levels = float | Tensor | Sequence[float] | np.ndarray[Any, Any]


def _after_fork() -> None:
    """OpenMP's threads stay in the process that was forked, and would be waited for."""
    global forked
    forked = True
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def checked(default: Any, check: Callable[[Any], Any]) -> Any:
    """A field of a dataclass that a caller may set; `check` gives a value its type, or says what is wrong with it."""
    return field(default=default, metadata={"check": check})


def checks_of(kind: Any) -> dict[str, Callable[[Any], Any]]:
    """The checks of these fields, by name."""
    return {one.name: one.metadata["check"] for one in fields(kind) if "check" in one.metadata}


def check_images(
    x: Tensor,
    shape: tuple[int, int, int] | None = None,
    channels: int | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """x as a contiguous (B, C, H, W) float32 tensor, in CPU memory or on `device`, where the denoiser works."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.from_numpy for arrays")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}; convert it with x.float()")
    if x.device.type != "cpu" and (x.device.type != device.type or device.index not in (None, x.device.index)):
        where = "in CPU memory" if device == CPU else f"in CPU memory or on {device}"
        raise ValueError(f"x must be {where}, got device {x.device}; use x.cpu()")
    x = x.detach()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    if shape is not None and tuple(x.shape[1:]) != shape:
        raise ValueError(f"x has images of shape {tuple(x.shape[1:])}, but the bank's are {shape}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, but the network takes {channels}")
    if is_captured(x):  # to look at the pixels would be to wait for them
        return x.contiguous()
    most = max(map(abs, torch.stack(x.aminmax()).tolist())) if x.numel() else 0.0  # NaN where there is one
    if not math.isfinite(most):
        raise ValueError("x holds NaN or infinite pixels")
    if most > LARGEST_PIXEL:
        raise ValueError(
            f"x reaches {most:.3g}; allowed is up to {LARGEST_PIXEL:g} "
            "(images lie in [-1, 1], noise a few sigma beyond)"
        )
    return x.contiguous()


def is_captured(x: Tensor) -> bool:
    """Whether what is done with x is being recorded in a CUDA graph, not done."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def beside(x: Tensor, numbers: Tensor) -> Tensor:
    """A few numbers (B,) as float64 where x is."""
    if not is_captured(x):
        return numbers.double().to(x.device)
    # A copy from CPU memory would have to be waited for.
    return torch.stack([torch.full((), float(n), dtype=torch.float64, device=x.device) for n in numbers])


def numbers_of(value: Any) -> Tensor:
    """Numbers in any form, as one, a list, an array or a tensor, in CPU memory: int64 where they are integers, else
    float64. Raises TypeError, ValueError or RuntimeError for what is none."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError
        # A copy: torch warns of arrays that are read-only, and knows but one order of bytes.
        numbers = torch.from_numpy(np.array(array, np.float64 if array.dtype.kind == "f" else np.int64, order="C"))
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError
    return numbers.to(torch.float64 if numbers.is_floating_point() else torch.int64)


def check_level(name: str, value: Levels, batch: int) -> Tensor:
    """alpha or sigma as a (B,) float64 tensor."""
    try:
        levels = numbers_of(value).double()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a number or a tensor, list or array of shape (B,), got {type(value).__name__}"
        ) from None
    if levels.dim() == 0:
        levels = levels.expand(batch)
    if levels.shape != (batch,):
        raise ValueError(f"{name} must be a number or have shape ({batch},), got {tuple(levels.shape)}")
    numbers = levels.tolist()
    least, most = min(numbers, default=1.0), max(numbers, default=1.0)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be finite, got {value}")
    if name == "sigma" and least <= 0:
        raise ValueError(f"sigma must be positive, got {least:g}")
    if name == "sigma" and least < SMALLEST_SIGMA:
        raise ValueError(f"sigma must be at least {SMALLEST_SIGMA:g}, got {least:g}")
    if name == "alpha" and least < 0:
        raise ValueError(f"alpha must not be negative, got {least:g}")
    if name == "alpha" and most > LARGEST_ALPHA:
        raise ValueError(f"alpha must be at most {LARGEST_ALPHA:g}, got {most:g}")
    return levels.contiguous()


def check_labels(labels: Any, batch: int) -> Tensor | None:
    """labels as a (B,) int64 tensor."""
    if labels is None:
        return None
    try:
        classes = numbers_of(labels)
        if classes.is_floating_point() and classes.numel():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        given = getattr(labels, "dtype", repr(labels))
        raise TypeError(f"labels must be integers of shape (B,), got {given}") from None
    if classes.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), one for each image of x, got {tuple(classes.shape)}")
    return classes.to(torch.int64).contiguous()


def check_patch_size(k: int | None, height: int = 1, width: int = 1, wraps: bool = False) -> int:
    """k as an odd positive int that the boundary allows."""
    if k is None:
        raise ValueError("patch_size is missing: give it to the machine or to the call (an odd number of pixels)")
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"patch_size must be an int, got {type(k).__name__}")
    k = k.__index__()
    if k < 1 or k % 2 == 0:
        raise ValueError(f"patch_size must be odd and positive, got {k}")
    if wraps and k > min(height, width):
        raise ValueError(
            f"patch_size {k} is larger than the {height}x{width} image, which boundaries 'circular' and 'interior' "
            f"do not allow; use at most {min(height, width)}, or boundary 'zeros'"
        )
    if k > 2**31 - 1:
        raise ValueError(f"patch_size must be at most {2**31 - 1}, got {k}")
    return k


def check_number(name: str, value: Any) -> float:
    """One number, in whatever form, as a float."""
    try:
        return numbers_of(value).item()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def check_share(name: str, value: Any) -> float:
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(number)


def check_width(width: Any) -> float:
    number = check_number("width", width)
    if not 0 < number < float("inf"):
        raise ValueError(f"width of a Gaussian window must be positive and finite, got {width}")
    return float(number)


def check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value.__index__() < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value.__index__())


def check_pixels(pixels: Any, height: int, width: int) -> Tensor:
    """Pixels (P, 2) as row * width + column, (P,) int64; None: all."""
    if pixels is None:
        return torch.arange(height * width, device=CPU)
    try:
        places = numbers_of(pixels)
        if places.is_floating_point() or places.dim() != 2 or places.shape[1] != 2:
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"pixels must be rows and columns (P, 2), integers, got {pixels!r}") from None
    if (places < 0).any() or (places >= torch.tensor([height, width], device=CPU)).any():
        raise ValueError(f"pixels must lie in the {height}x{width} image, got {pixels!r}")
    return places[:, 0] * width + places[:, 1]


def check_tolerance(tolerance: Any) -> float:
    number = check_number("tolerance", tolerance)
    if not 0 < number < float("inf"):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    return float(number)


def check_dice(dice: Any) -> int:
    if isinstance(dice, bool) or not hasattr(dice, "__index__"):
        raise TypeError(f"dice must be an int, got {type(dice).__name__}")
    if not 0 <= dice.__index__() < 2**32:
        raise ValueError(f"dice must be from 0 to {2**32 - 1}, got {dice}")
    return int(dice.__index__())


def check_precision(precision: Any) -> Tensor:
    """How precisely each value of a query is known, as float32 with four dimensions or fewer."""
    if not isinstance(precision, Tensor) or precision.is_complex() or precision.dim() > 4:
        given = f"shape {tuple(precision.shape)}" if isinstance(precision, Tensor) else type(precision).__name__
        raise TypeError(f"precision must be a real tensor that expands to (B, C, H, W), got {given}")
    factors = precision.detach().to(torch.float32)
    if not torch.isfinite(factors).all() or (factors < 0).any():
        raise ValueError("precision must be finite and not negative: 0 where nothing is known, 1 as sigma says")
    return factors


def check_threads(threads: Any) -> int | None:
    if threads is None:
        return None
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"threads must be an int, got {type(threads).__name__}")
    count = int(threads)
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads must be between 1 and {MOST_THREADS}, got {threads}")
    return count


def warn(message: str) -> None:
    """Warn whoever called pyels, from however deep in it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in ("pyels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there: the CPU, or one of torch's."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device).cpu()  # as those that hold no values, "meta", cannot be
    except (RuntimeError, AssertionError) as error:
        built = f"sees {torch.cuda.device_count()} CUDA devices" if torch.version.cuda else "is built without CUDA"
        raise ValueError(f"device must be cpu or cuda (cuda:1 ..), got {str(device)!r}; torch {built} here") from error
    return device


def check_clip(clip: float | None) -> float | None:
    limit = None if clip is None else check_number("clip", clip)
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"clip must be positive, the largest |x0|, or None, got {clip}")
    return limit


def from_environment(name: str, otherwise: int | None = None, least: int = 0) -> int:
    """A number that torchrun sets in the environment; `otherwise`, if there is one, where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text and otherwise is not None:
        return otherwise
    if not text.isdecimal() or int(text) < least:
        given = repr(os.environ[name]) if name in os.environ else "nothing"
        raise ValueError(f"the environment variable {name} must be a whole number from {least} on, got {given}")
    return int(text)
