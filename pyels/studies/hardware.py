"""The computer: what timings depend on, how they are taken, and what it can do at best."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyels._core import isa_in_use
from pyels.checks import CPU


class Ceilings:
    """Float32 multiply-adds/s (matrix product), exponentials/s (in cache) and bytes copied/s (in memory), with torch.

    They bound pairs/s: a product of matrices takes k * k * C multiply-adds a pair, and who skips none takes one
    exponential. On a GPU, torch's exponentials are bound by its cache. `rates` holds the best seen in all calls of
    `measure`.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        on_gpu = device.type == "cuda"
        n, calls = (8192, 20) if on_gpu else (2048, 2000)
        a, product = torch.rand(n, n, device=device), torch.empty(n, n, device=device)
        cached = torch.rand(1 << 21 if on_gpu else (1 << 16) * torch.get_num_threads(), device=device)
        exponentials = torch.empty_like(cached)
        memory = torch.zeros(1 << (28 if on_gpu else 25), device=device)
        copy = torch.zeros_like(memory)

        def exp() -> None:
            for _ in range(calls):
                torch.exp(cached, out=exponentials)

        self._device = device
        self.rates: dict[str, float] = {}
        self._work: dict[str, tuple[int, Callable[[], object]]] = {
            "multiply_adds_per_second": (n**3, lambda: torch.mm(a, a, out=product)),
            "exponentials_per_second": (calls * len(cached), exp),
            "copied_bytes_per_second": (4 * len(memory), lambda: copy.copy_(memory)),
        }

    def measure(self) -> None:
        for name, (amount, work) in self._work.items():
            self.rates[name] = max(self.rates.get(name, 0.0), amount / seconds_of(work, device=self._device))


def this_computer(threads: int, device: torch.device = CPU) -> dict[str, Any]:
    """What timings depend on, beside what is timed."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"cpu": _cpu_model(), "isa": isa_in_use(), "threads": threads, "torch": torch.__version__, **gpu}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds_of(evaluation: Callable[[], object], calls: int = 1, device: torch.device = CPU) -> float:
    """Seconds of one call."""
    if device.type == "cuda":  # by the device's own clock
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(torch.cuda.current_stream(device))
        for _ in range(calls):
            evaluation()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / calls
    start = time.perf_counter()
    for _ in range(calls):
        evaluation()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads for torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
