"""`pyels train`: one of the reference networks, on any data set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

import pyels
from pyels.checks import check_device
from pyels.cli.options import command, option, values_of
from pyels.cli.settings import DatasetOptions, OutputOptions, ThreadOptions
from pyels.files import write_json
from pyels.networks import NETWORKS
from pyels.networks.convolutional import Padding
from pyels.networks.network import Network, Predicts
from pyels.networks.training import CHECKPOINT, Anneal, Optimizer, Recipe, bfloat16_is_faster, train
from pyels.schedules import SCHEDULES
from pyels.studies import plots, resumable

_STEPS = 10_000
_MOST_ROWS = 1000  # of weights, one a class, where most of them may be of no class


@dataclass(frozen=True, kw_only=True)
class Train(DatasetOptions, ThreadOptions, OutputOptions):
    net: str = option("resnet", type=click.Choice(list(NETWORKS)))
    width: int = option(64, "Channels (256 in the paper's ResNet).")
    depth: int | None = option(
        None,
        "; ".join(f"{net.__name__}: {net.DEPTH_COUNTS}, {net.DEPTH} by default" for net in NETWORKS.values()) + ".",
    )
    padding: Padding | None = option(None, "Of convolutions.  [default: zeros]")
    predicts: Predicts = option("v")
    unconditional: bool = option(False, "Do not tell the network the classes, where there are some.")
    steps: int | None = option(None, f"Optimiser steps.  [default: {_STEPS}]")
    epochs: float | None = option(
        None,
        "Passes over the data, instead of --steps (300 in the paper).",
        must_be=("positive", lambda epochs: 0 < epochs < 1e9),
    )
    keep: str | None = option(
        None, "Epochs after which the network is kept as it is then, as 1,2,5: epoch-1.safetensors .."
    )
    batch_size: int = option(Recipe.batch_size)
    optimizer: Optimizer = option(Recipe.optimizer)
    learning_rate: float = option(Recipe.learning_rate)
    anneal: Anneal = option(
        Recipe.anneal,
        "How the learning rate falls: by --decay a step, as in the paper; or, better for short runs, after a warm-up "
        "along half a cosine to zero.",
    )
    decay: float = option(Recipe.decay, "Of the learning rate, a step.")
    ema: float = option(Recipe.ema, "Averaging of the weights, a step; 0: none.")
    label_dropout: float = option(
        Recipe.label_dropout, "Share of the images that are shown without their class, for guidance (often .1)."
    )
    schedule: str = option(Recipe.schedule, "Noise schedule.", type=click.Choice(SCHEDULES))
    arithmetic: str = option(
        "auto",
        "Of the network's layers in training (weights, optimiser and loss stay float32); auto: bfloat16 where the "
        "processor has instructions for it.",
        type=click.Choice(["auto", "float32", "bfloat16"]),
    )
    seed: int = option(Recipe.seed)
    device: str | None = option(None, "cpu, cuda, cuda:1 ..  [default: cuda where there is one]")
    half: bool = option(False, "Store the weights in float16.")
    resume: bool = option(False, "Go on from the checkpoint in the output folder, if there is one.")
    out: Path = option(Path("pyels-network"))


@command(Train)
def train_command(given: Train) -> None:
    """Train a ResNet, a UNet, or a transformer to denoise.

    Writes network.safetensors, run.json (how it was trained, and its losses) and loss.png to the output folder. A
    checkpoint is written there every minute and at Ctrl-C; --resume goes on from it, and on the same machine and number
    of threads gives the same weights, to the last bit, as a training that was not stopped. The defaults of optimiser,
    learning rate and batch are the paper's; for an hour on a CPU rather take --optimizer adamw --learning-rate 1e-3
    --anneal cosine --batch-size 32.
    """
    resumable.check_seeds(given.seed, 1)
    if given.steps is not None and given.epochs is not None:
        raise ValueError("give either --steps or --epochs, not both")
    given.tell_torch()
    device = check_device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bank = given.read()
    steps = given.steps
    if steps is None:
        steps = _STEPS if given.epochs is None else max(1, round(given.epochs * len(bank) / given.batch_size))
    bfloat16 = given.arithmetic == "bfloat16" or (given.arithmetic == "auto" and bfloat16_is_faster(device))
    recipe = given.passed_to(Recipe, steps=steps, bfloat16=bfloat16)
    kept = _kept(given.keep, steps, len(bank) / given.batch_size)
    classes = None if given.unconditional or bank.labels is None else _rows(bank.classes)
    net = NETWORKS[given.net]
    if given.padding is not None and not net.PADDED:
        raise ValueError(f"--padding is of networks that convolve, got --net {given.net}")
    if given.label_dropout and classes is None:
        raise ValueError("--label-dropout is of networks that are told classes; this one is told none")
    with torch.random.fork_rng():
        torch.manual_seed(given.seed)
        depth = net.DEPTH if given.depth is None else given.depth
        how: dict[str, Any] = {"predicts": given.predicts, "null_label": given.label_dropout > 0}
        if given.padding is not None:
            how["padding"] = given.padding
        network = net(bank.shape[0], given.width, depth, classes, **how)
    finished, checkpoint = given.out / "network.safetensors", given.out / CHECKPOINT
    given.hold_folder({"command": "train"}, *() if checkpoint.exists() else ("loss.png", "run.json"))
    if checkpoint.exists() and not given.resume:
        raise ValueError(
            f"{given.out} holds a training that was stopped: add --resume to go on, or choose another folder"
        )
    if finished.exists() and not checkpoint.exists():
        raise ValueError(f"{finished} is a finished network: choose another folder, or delete it to train anew")
    data = given.record_of_data(bank)
    training = {
        "version": pyels.__version__,
        "torch": torch.__version__,
        "data": data,
        "recipe": asdict(recipe),
        "epochs": round(steps * given.batch_size / len(bank), 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }

    def keep(step: int, now: Network) -> None:
        for epochs in kept.get(step, []):
            so_far = {"steps": step, "epochs": round(step * given.batch_size / len(bank), 3)}
            path = given.out / f"epoch-{epochs:g}.safetensors"
            copy.deepcopy(now).to("cpu").save(path, {"training": {**training, "kept_after": so_far}}, given.half)

    trained, log = train(network, bank, recipe, given.out, device, on_step=keep)
    training["seconds"] = round(log.seconds, 1)
    weights = sum(p.numel() for p in trained.parameters())
    config = {"net": given.net, **trained.config, "weights": weights}
    result = {"command": "train", "network": config, **training, "losses": [round(v, 6) for v in log.losses]}
    write_json(given.out / "run.json", result)
    title = plots.title_of({"network": given.net, "data": data})
    plots.draw_losses(given.out / "loss.png", log.losses, steps, given.predicts, title)
    trained.save(finished, {"training": training}, given.half)  # last: where it is, the training has ended
    checkpoint.unlink(missing_ok=True)
    line = f"{weights} weights, {steps} steps of {given.batch_size} ({training['epochs']:.3g} epochs of {len(bank)} "
    line += f"images) in {log.seconds:.0f} s, loss {log.losses[-1]:.4f}; network: {finished}"
    given.show(result, [line])


def _kept(text: str | None, steps: int, steps_an_epoch: float) -> dict[int, list[float]]:
    """The epochs of --keep, by the step after which they are over."""
    kept: dict[int, list[float]] = {}
    for epochs in [] if text is None else values_of("keep", text, "epochs"):
        step = round(epochs * steps_an_epoch) if 0 < epochs < 1e9 else 0
        if not 1 <= step <= steps:
            raise ValueError(
                f"--keep {epochs:g}: the network takes {steps} steps, which are {steps / steps_an_epoch:.3g} epochs"
            )
        kept.setdefault(step, []).append(epochs)
    return kept


def _rows(classes: Sequence[int]) -> int:
    """How many classes the network is told apart, 0 up to the largest."""
    rows = classes[-1] + 1
    if classes[0] < 0 or rows > max(_MOST_ROWS, 10 * len(classes)):
        raise ValueError(
            f"the labels of {len(classes)} classes reach from {classes[0]} to {classes[-1]}, and the network would "
            f"have weights for every number up to there: number the classes 0 to {len(classes) - 1}, as by "
            "numpy.unique(labels, return_inverse=True), or give --unconditional"
        )
    return rows
