"""Training of the reference networks: as small as it can be and still train well, and safe to stop at any moment."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.files import TensorFile, write_tensors
from pyels.networks.network import Network
from pyels.networks.prediction import target
from pyels.records import parse_record, short
from pyels.schedules import make_schedule

CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_SECONDS = 60
_METADATA = "pyels-checkpoint"
_COUNT = range(1 << 62)
_PROGRESS = {"step": _COUNT, "losses": [float], "recent": [float], "seconds": float, "threads": _COUNT}
_RECORD = {"run": {}, "progress": _PROGRESS}
_WARM_UP = 500
_LOSSES = 200  # points of the loss curve
Optimizer = Literal["adam", "adamw"]
Anneal = Literal["exponential", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's (batch 128, Adam, 1e-4 with 0.999965 a step), with an average of the
    weights.

    Attributes
    ----------
    steps          optimiser steps
    batch_size     images a step
    optimizer      "adam", or "adamw" with weight decay 1e-4
    learning_rate  its start ("exponential") or its peak ("cosine")
    anneal         "exponential": the learning rate is multiplied by `decay` after every step;
                   "cosine": a warm-up of up to 500 steps, then half a cosine down to zero, better for short runs
    decay          see `anneal`
    ema            decay a step of the exponential moving average of the weights; 0: no average
    schedule       noise schedule by name; noise levels are uniform in t
    seed           of initial weights, images, noise and noise levels
    label_dropout  share of the images that are shown without their class, for guidance: see `pyels.Guided`
    bfloat16       run the network under bfloat16 autocast; weights, optimiser and loss stay float32
    """

    steps: int
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-4
    anneal: Anneal = "exponential"
    decay: float = 0.999965
    ema: float = 0.999
    schedule: str = "cosine"
    seed: int = 0
    label_dropout: float = 0.0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        for name, count in (("steps", self.steps), ("batch_size", self.batch_size)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, value, allowed in (("optimizer", self.optimizer, Optimizer), ("anneal", self.anneal, Anneal)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(allowed)))}, got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")
        for name, share in (("ema", self.ema), ("label_dropout", self.label_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share}")
        make_schedule(self.schedule)

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0 .. steps - 1."""
        if self.anneal == "exponential":
            return self.learning_rate * self.decay**step
        warm_up = max(1, min(_WARM_UP, self.steps // 10))
        shape = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(1.0, (step + 1) / warm_up) * shape


@dataclass
class Log:
    """What a training has done so far.

    Attributes
    ----------
    step     steps done
    losses   mean loss of each two-hundredth of the run, or of each step of a run of fewer
    recent   losses since
    seconds  time it took, over all its parts
    threads  torch's threads: with another number, the bits of a resumed training differ
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    seconds: float = 0.0
    threads: int = 0


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def train(
    network: Network,
    bank: PatchBank,
    recipe: Recipe,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    on_step: Callable[[int, Network], None] | None = None,
) -> tuple[Network, Log]:
    """Train `network` on the bank's images.

    Minimises E ||y_hat - y||^2, y what the network predicts, over images, noise and t uniform in (0, 1].

    Every minute, and when it is interrupted, a checkpoint is written to `folder`. A checkpoint found there is
    continued: on the same machine, with the same number of threads, the weights come out the same to the last bit as
    from a run that was never stopped.

    Parameters
    ----------
    network   changed in place; class-conditional if it was built with num_classes, and then the bank needs labels
    folder    where the checkpoint is kept, made if need be; None: no checkpoints
    device    where the network is trained; it comes back to the CPU
    on_step   called after every step with the number of steps done, and the network as it is then, averaged

    Returns
    -------
    the averaged network in evaluation mode (the network itself with `ema=0`), and the record of the training

    Raises
    ------
    ValueError  a class-conditional network and a bank without labels or with more classes; a damaged checkpoint, or
                one of another run; a loss that is not finite
    """
    _check_classes(network, bank, recipe)
    device = torch.device(device)
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(network)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    weight_decay = 1e-4 if recipe.optimizer == "adamw" else 0.0
    optimizer = kind(network.parameters(), recipe.learning_rate, weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    done = Log()
    state = _State(network, average, optimizer, generator, done)
    path = None if folder is None else Path(folder) / CHECKPOINT
    run = {"network": [type(network).__name__, network.config], "bank": bank.fingerprint(), **asdict(recipe)}
    run = json.loads(json.dumps(run))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            state.read(path, run)
    if done.threads not in (0, torch.get_num_threads()):
        warnings.warn(
            f"the training began with {done.threads} threads and goes on with {torch.get_num_threads()}: "
            "its result will differ in the last bits from one that was not stopped",
            stacklevel=2,
        )
    done.threads = torch.get_num_threads()

    saved = begun = time.monotonic()
    before = done.seconds
    bar = tqdm(total=recipe.steps, initial=done.step, desc="training", unit="step", disable=not progress)
    points = min(recipe.steps, _LOSSES)
    # Without these, cuDNN may choose another algorithm, and other bits, after every start.
    reproducible = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    with bar, reproducible, _interrupts_between_steps() as interrupted:
        for loss in _steps(network, average, optimizer, generator, bank, recipe, device, done.step):
            done.step += 1
            done.recent.append(loss)
            done.seconds = before + time.monotonic() - begun
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} after step {done.step}; use a smaller learning rate")
            if done.step * points // recipe.steps > len(done.losses):
                done.losses.append(sum(done.recent) / len(done.recent))
                done.recent.clear()
                bar.set_postfix(loss=f"{done.losses[-1]:.4f}", refresh=False)
            if on_step is not None:
                on_step(done.step, average if recipe.ema else network)
            bar.update()
            if path is not None and (interrupted() or time.monotonic() - saved > _CHECKPOINT_SECONDS):
                state.write(path, run)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    network.to("cpu")
    return (average.to("cpu") if recipe.ema else network).eval(), done


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step: half a step would be lost, or done twice."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: False
        return
    before = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _steps(
    network: Network,
    average: Network,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    bank: PatchBank,
    recipe: Recipe,
    device: torch.device,
    start: int,
) -> Iterator[float]:
    """Step `start` and those after it; yields the loss of each, when the step is complete."""
    schedule = make_schedule(recipe.schedule)
    batch = recipe.batch_size
    conditional = network.config["num_classes"] is not None
    for step in range(start, recipe.steps):
        chosen = torch.randint(len(bank), (batch,), generator=generator)
        x0 = bank.read(chosen)
        noise = torch.randn(x0.shape, generator=generator)
        times = (1 - torch.rand(batch, generator=generator, dtype=torch.float64)).tolist()
        alpha = torch.tensor([schedule.alpha(t) for t in times])[:, None, None, None]
        sigma = torch.tensor([schedule.sigma(t) for t in times])[:, None, None, None]
        scale = torch.hypot(alpha, sigma)
        alpha, sigma = alpha / scale, sigma / scale
        x = (alpha * x0 + sigma * noise).to(device, memory_format=torch.channels_last)
        truth = target(network.predicts, x0, noise, alpha, sigma).to(device)
        angle = torch.atan2(sigma, alpha).flatten().to(device)
        labels = bank.labels[chosen] if conditional and bank.labels is not None else None
        if labels is not None and recipe.label_dropout and network.null_label is not None:
            labels[torch.rand(batch, generator=generator) < recipe.label_dropout] = network.null_label
        labels = None if labels is None else labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            y = network(x, angle, labels)
        loss = (y.float() - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        if recipe.ema:
            # Early on a plain mean, so that the average does not remember the initial weights.
            rate = max(1 - recipe.ema, 1 / (step + 1))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                    slow.lerp_(fast, rate)
        yield float(loss.detach())


def _check_classes(network: Network, bank: PatchBank, recipe: Recipe) -> None:
    channels, classes = network.config["channels"], network.config["num_classes"]
    if channels != bank.shape[0]:
        raise ValueError(f"the network takes {channels} channels, but the bank's images have {bank.shape[0]}")
    if recipe.label_dropout and network.null_label is None:
        raise ValueError("label_dropout is of networks that have a label for no class; make it with null_label=True")
    if classes is None:
        return
    if bank.labels is None:
        raise ValueError("the network is class-conditional, but the bank has no labels")
    if not 0 <= bank.classes[0] <= bank.classes[-1] < classes:
        raise ValueError(f"the network has classes 0..{classes - 1}, but the bank has {bank.classes}")


@dataclass(frozen=True)
class _State:
    """All that a training's future depends on."""

    network: Network
    average: Network
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    progress: Log

    def write(self, path: Path, run: dict[str, Any]) -> None:
        tensors = {"generator": self.generator.get_state()}
        for part, weights in (("network", self.network), ("average", self.average)):
            tensors.update({f"{part}.{name}": value for name, value in weights.state_dict().items()})
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{name}": value for name, value in moments.items()})
        metadata = json.dumps({"run": run, "progress": asdict(self.progress)})
        write_tensors(path, {name: value.cpu() for name, value in tensors.items()}, {_METADATA: metadata})

    def read(self, path: Path, run: dict[str, Any]) -> None:
        try:
            file = TensorFile.read(path)
            if not file.has_checksum or _METADATA not in file.metadata:
                raise ValueError("it has no checksum, or no record")
            header = parse_record(file.metadata[_METADATA], _RECORD)
        except ValueError as error:
            raise ValueError(f"{path}: not a checkpoint of pyels train, or damaged ({error}); delete it") from error
        before = header["run"]
        for key in {**before, **run}:
            if before.get(key) != run.get(key):
                raise ValueError(
                    f"{path} is of a training with {key} = {short(before.get(key))}, now {short(run.get(key))}; repeat "
                    "it as it was to go on, choose another folder, or delete it"
                )
        try:
            self._restore(file.tensors)
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: not the checkpoint of this network ({short(error)}); delete it") from error
        vars(self.progress).update(header["progress"])

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

        self.network.load_state_dict(part("network."))
        self.average.load_state_dict(part("average."))
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.network.parameters())
        for key, value in part("optimizer.").items():
            i, name = key.split(".")
            if value.dim() > 0:  # laid out in memory as the weights are: the fused optimisers take that for granted
                value = torch.empty_like(parameters[int(i)], requires_grad=False).copy_(value)
            moments.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
