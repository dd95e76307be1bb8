"""Several processes, on one machine or more, that work on one run by torch.distributed.

`torchrun` starts them, each with the same command. They share the work in one of two ways, and what comes out is, to
rounding, what one process would have computed:

bank   all of them work on every query, each on its share of the bank's images: `Sharded`
seeds  each draws samples of its own with the whole bank: `lead` and `follow`

Process 0 alone writes, so that the machines need no folder in common.
"""

from __future__ import annotations

import atexit
import functools
import json
import queue
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.checks import CPU, from_environment
from pyels.definition import Definition, Gaussian
from pyels.denoiser import Query
from pyels.engines import Engine
from pyels.machines import Machine
from pyels.posterior import PartialPosterior, Want
from pyels.sampling import Step
from pyels.second import Answers, Asked

if dist.is_available():
    # Imported now, before there is a group: the group that there is then becomes the default argument of its functions,
    # and torch would import it at the first call of an engine. The group would so outlive `_leave`, and its threads,
    # which may only get to let go of the last call's tensors once Python has ended, would abort the process.
    import torch.distributed.nn.functional

SHARDS = ("bank", "seeds")
# A process that ends is noticed at once, by its closed connections. The timeout is for machines that vanish without a
# word, and must be longer than a step may take on the slowest of them.
TIMEOUT = timedelta(hours=1)
_IDLE = timedelta(days=365)  # process 0 may have no work for another one for as long as the last sample takes
_DONE = -1

Compute = Callable[[int, Callable[[Step], None]], dict[str, Tensor]]


class Lost(ConnectionError):
    """Another process of the run ended, or cannot be reached."""

    def __init__(self) -> None:
        super().__init__("another process of this run ended, or cannot be reached")


def launched() -> int:
    """The number of processes that torchrun started together with this one, itself included; 1 without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 1
    return from_environment("WORLD_SIZE", otherwise=1, least=1)


def size() -> int:
    """The number of processes in the group that this one has joined; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in its group, 0 .. size() - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def join() -> None:
    """Make the processes that torchrun started a group, until they end; without torchrun it does nothing.

    Raises `Lost` when they do not find each other. A script of one's own may as well call
    `torch.distributed.init_process_group` itself.
    """
    if launched() == 1:
        return
    if torch.cuda.is_available():  # to each process of a machine its GPU
        torch.cuda.set_device(from_environment("LOCAL_RANK") % torch.cuda.device_count())
    with _lost():
        dist.init_process_group(
            _backend(), store=_store(), rank=from_environment("RANK"), world_size=launched(), timeout=TIMEOUT
        )
    # Not before: the others notice, and only after this process reported why it ended may they say that it did.
    atexit.register(_leave)


def first_to_report() -> bool:
    """True once in a run: for the process that reports why it ended, of all those that come to know."""
    if launched() == 1:
        return True
    try:
        return int(_store().add("pyels/reported", 1)) == 1
    except RuntimeError:  # the store ended with process 0 or with its machine: twice is better than not at all
        return True


def agree(settings: Mapping[str, Any], but: tuple[str, ...] = ()) -> None:
    """Raise ValueError, in every process alike, unless all have the same settings, apart from the keys in `but`."""
    if size() == 1:
        return
    everyones: list[Any] = [None] * size()
    with _lost():
        dist.all_gather_object(everyones, json.loads(json.dumps(settings)))
    for other, theirs in enumerate(everyones):
        for key, value in everyones[0].items():
            if key not in but and theirs.get(key) != value:
                raise ValueError(
                    f"process {other} has {key} = {theirs.get(key)}, but process 0 {value}; start all of them with the "
                    "same command, data and version of pyels"
                )


@dataclass(eq=False)
class _Together(Engine):
    """An engine of all processes: each has its share of every query's images evaluated, by an engine of its own."""

    own: Engine

    def __post_init__(self) -> None:
        self.name, self.dtype, self.device = self.own.name, self.own.dtype, self.own.device  # type: ignore[misc]

    def cannot(self, definition: Definition, bank: PatchBank) -> str | None:
        return self.own.cannot(definition, bank)

    def lacks_for(self, query: Query) -> str | None:
        return self.own.lacks_for(query)

    def settings(self) -> dict[str, Any]:
        return self.own.settings()

    def evaluate(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, want: Want
    ) -> PartialPosterior:
        mine = self.own.evaluate(definition, bank, selection.share(rank(), size()), query, want)
        merged: PartialPosterior = self._merged(mine, _digest(query, selection, definition))
        return merged

    def answer(
        self, definition: Definition, bank: PatchBank, selection: Selection, query: Query, asked: Asked
    ) -> Answers:
        mine = self.own.answer(definition, bank, selection.share(rank(), size()), query, asked)
        merged: Answers = self._merged(mine, _digest(query, selection, definition))
        return merged

    def _merged(self, mine: Any, digest: tuple[Tensor, Tensor]) -> Any:
        """Every process's part and its own, merged."""
        if size() == 1:
            return mine
        names = [field.name for field in fields(mine) if getattr(mine, field.name) is not None]
        told = *digest, *(getattr(mine, name) for name in names)
        # One message for a batch: image numbers are exact in float64. All processes get all parts and merge them in the
        # order of the bank, by the one merge there is, rather than reduce them on the way: torch.distributed has no
        # reductions of one's own, and like this all get the same bits.
        packed = torch.cat([tensor.double().flatten() for tensor in told])
        everyones = [torch.empty_like(packed) for _ in range(size())]
        with _lost():
            dist.all_gather(everyones, packed)
        parts = []
        for received in everyones:
            pieces = torch.split(received, [tensor.numel() for tensor in told])
            rounded, exact, *values = (
                piece.reshape(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, told, strict=True)
            )
            if not (torch.allclose(rounded, told[0], rtol=1e-3, atol=1e-3) and torch.equal(exact, told[1])):
                raise ValueError(
                    "the processes passed different queries; give all of them the same x, levels, labels and size"
                )
            parts.append(type(mine)(**dict(zip(names, values, strict=True))))
        return functools.reduce(type(mine).merge, parts)


class Sharded(Machine):
    """A machine whose work is shared by all processes of the group: each goes through its part of the bank.

    It has the interface of the machine it is made of. Every process must make the same calls with the same arguments,
    and gets the same results. Of the images that a query draws on, in the bank's order or in its order by class,
    process r of n takes the r-th n-th. So a class is shared evenly too wherever it lies in the bank, image numbers
    count through the whole bank, and bad arguments are refused everywhere; yet of a bank that is mapped or streamed
    from its file (`PatchBank.load`) calls read little more than the process's part, whether the bank is sorted by class
    or shuffled. (Engine "sampled" reads it once as a whole, to know it by its checksum.) Every process must be able to
    open the whole file; a memory_limit is that of each process.

    With engine "sampled" each process has an index of its part, which it builds beside the others, and searches until
    the error of its own part's mean is below the tolerance. The error that is stated is that of the merged mean. It is
    mostly smaller, as a merged mean is a weighted one of the parts' means; where these are far apart and it is not well
    known how much each weighs, it may be larger than the tolerance.

    Parameters
    ----------
    machine  the machine, over the whole bank; in each process the same

    Raises
    ------
    ValueError  calls: as the machine, and when the processes passed different queries. That a file is truncated or
                damaged may be found by one process alone, which has to end for the others to notice
    Lost        calls: when another process ended
    """

    def __init__(self, machine: Machine) -> None:
        if not isinstance(machine, Machine):
            raise TypeError(f"machine must be a pyels.Machine, got {type(machine).__name__}")
        if type(machine).partial is not Machine.partial:
            raise TypeError(
                f"a {type(machine).__name__} is not shared image by image; let processes share seeds instead"
            )
        own = machine.engine.own if isinstance(machine.engine, _Together) else machine.engine
        super().__init__(machine.bank, machine.definition, _Together(own))
        self.machine = machine

    def __repr__(self) -> str:
        return f"Sharded({self.machine!r}, process {rank()} of {size()})"


@contextmanager
def lead(compute: Compute, shard: str) -> Iterator[Compute]:
    """For process 0: `compute` as `resumable` takes it, worked off with the processes that `follow`.

    Parameters
    ----------
    compute  compute(i, on_step) gives the tensors of item i, and calls on_step after every step
    shard    "bank": every item is computed by all processes together, with a `Sharded` machine; "seeds": by any one of
             them, and as many at the same time as there are processes
    """
    others = range(1, size())
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in range(size()):
        free.put(process)

    def by_all(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        for process in others:
            _tell(process, i)
        return compute(i, on_step)

    def by_one(i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
        process = free.get()
        try:
            return compute(i, on_step) if process == 0 else _asked(process, i, on_step)
        finally:
            free.put(process)

    yield by_all if shard == "bank" else by_one
    for process in others:
        _tell(process, _DONE)


def follow(compute: Compute, shard: str) -> None:
    """For the other processes: compute what process 0 asks for, until it needs no more; arguments as of `lead`."""
    while (i := _told()) != _DONE:
        if shard == "bank":
            compute(i, lambda step: None)  # process 0 has the same result
        else:
            _send(compute(i, _send))


def _backend() -> str:
    """gloo for tensors in CPU memory, and nccl for those on GPUs, where there are any."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _store() -> Any:
    """What torchrun keeps for all processes; it outlives any one of them."""
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    return store


@contextmanager
def _lost() -> Iterator[None]:
    """What torch.distributed raises when a process is gone, in our words."""
    try:
        yield
    except RuntimeError as error:
        raise Lost from error


def _digest(query: Query, selection: Selection, definition: Definition) -> tuple[Tensor, Tensor]:
    """What tells queries apart: to rounding, as CPUs of different kinds round differently; and exactly."""
    pixels = query.x.double().flatten(1)
    levels = torch.cat([query.alpha, query.sigma]).to(pixels.device)
    sets = zlib.crc32("\n".join(selection.names).encode())  # below 2^53, as all that is sent
    window = definition.window
    value = window.width if isinstance(window, Gaussian) else getattr(window, "setting", None) or 0.0
    of_window = torch.tensor([definition.size, sets, value], dtype=torch.float64, device=CPU)
    exact = torch.cat([selection.begin.double(), selection.end.double(), of_window])
    return torch.cat([pixels.sum(1), pixels.square().sum(1), levels]), exact.to(pixels.device)


def _tell(process: int, i: int) -> None:
    with _lost():
        dist.send(torch.tensor([i], device=CPU), process)


def _told() -> int:
    i = torch.empty(1, dtype=torch.int64, device=CPU)
    with _lost():
        work = dist.irecv(i, 0)
        assert work is not None
        work.wait(_IDLE)
    return int(i)


def _asked(process: int, i: int, on_step: Callable[[Step], None]) -> dict[str, Tensor]:
    """Item i from another process, which sends its steps and then the item."""
    _tell(process, i)
    while True:
        received: list[Any] = [None]
        with _lost():
            dist.recv_object_list(received, process)
        if not isinstance(received[0], Step):
            item: dict[str, Tensor] = received[0]
            return item
        on_step(received[0])


def _send(value: Step | dict[str, Tensor]) -> None:
    with _lost():
        dist.send_object_list([value], 0)
