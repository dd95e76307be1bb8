"""What one call of every machine costs, at several noise levels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyels import presets
from pyels.denoiser import Denoiser
from pyels.schedules import make_schedule
from pyels.studies import resumable
from pyels.studies.bench import PRESET
from pyels.studies.hardware import seconds_of, this_computer, torch_threads

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def run(
    machines: Mapping[str, Denoiser],
    x0: Tensor,
    times: Sequence[float],
    repeats: int,
    seed: int,
    threads: int,
    progress: Callable[[], object],
) -> dict[str, Any]:
    """Seconds of `denoise`, ready for JSON.

    Parameters
    ----------
    machines  by name; windows that have a size get the one that the paper uses at the noise level
    x0        (B, C, H, W) float32 clean images of the queries
    times     noise levels t of the cosine schedule
    repeats   calls of each machine at each level after the first, in turn
    seed      query i gets the noise of seed + i
    threads   of torch
    progress  called `calls(..)` times

    Returns
    -------
    computer  what timings depend on
    records   for each machine and level: first_seconds, in which a machine finds what it keeps of the bank and the
              level; seconds_median, seconds_min and seconds_max of the others
    """
    schedule = make_schedule("cosine")
    channels, height, width = x0.shape[1:]
    sizes = presets.patch_sizes(PRESET)
    noise = torch.stack([resumable.noise_of_seed(seed + i, (channels, height, width)) for i in range(len(x0))])
    records = []
    with torch_threads(threads):
        for t in times:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x, k = alpha * x0 + sigma * noise, sizes[max(0, round(t * len(sizes)) - 1)]
            k = min(k, (min(height, width) - 1) | 1)  # as boundaries that wrap allow
            sized = {name: k if machine.parameter == "patch_size" else None for name, machine in machines.items()}
            calls = {
                name: partial(machine.denoise, x, alpha, sigma, patch_size=sized[name])
                for name, machine in machines.items()
            }
            seconds: dict[str, list[float]] = {name: [] for name in machines}
            for _ in range(1 + repeats):  # in turn, so that a computer whose speed drifts treats all alike
                for name, call in calls.items():
                    seconds[name].append(seconds_of(call))
                    progress()
            for name, (first, *others) in seconds.items():
                summary = {"median": statistics.median(others), "min": min(others), "max": max(others)}
                summary = {f"seconds_{of}": value for of, value in summary.items()}
                about = {"machine": name, "time": t, "patch_size": sized[name]}
                records.append({**about, "first_seconds": first, **summary})
    return {"computer": this_computer(threads), "records": records}


def calls(machines: Mapping[str, Denoiser], times: Sequence[float], repeats: int) -> int:
    """How often `run` reports progress."""
    return len(machines) * len(times) * (1 + repeats)


def table(result: Mapping[str, Any]) -> list[str]:
    """Seconds of a call, and of the first one, a line a machine."""
    records = result["records"]
    times = list(dict.fromkeys(one["time"] for one in records))
    lines = ["seconds of a call (of the first one)", f"{'t':12}" + "".join(f"{t:>20g}" for t in times)]
    for name in dict.fromkeys(one["machine"] for one in records):
        own = [one for one in records if one["machine"] == name]
        cells = [f"{one['seconds_median']:.2g} ({one['first_seconds']:.2g})" for one in own]
        lines.append(f"{name:12}" + "".join(f"{cell:>20}" for cell in cells))
    return lines
