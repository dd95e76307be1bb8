"""`pyels train`: one of the reference networks, on any data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
import torch

import pyels
from pyels.bank import datasets
from pyels.cli.common import (
    data_settings,
    dataset_option,
    json_option,
    limit_option,
    out_option,
    size_option,
    threads_option,
    work_in,
)
from pyels.engines import default_threads
from pyels.files import write_json
from pyels.networks import NETWORKS
from pyels.networks.convolutional import Padding
from pyels.networks.training import CHECKPOINT, Recipe, bfloat16_is_faster, train
from pyels.schedules import SCHEDULES
from pyels.studies import plots, resumable


@click.command("train")
@dataset_option
@limit_option
@size_option
@click.option("--net", "kind", type=click.Choice(list(NETWORKS)), default="resnet", show_default=True)
@click.option("--width", type=int, default=64, show_default=True, help="Channels (256 in the paper's ResNet).")
@click.option(
    "--depth",
    type=int,
    help="; ".join(f"{net.__name__}: {net.DEPTH_COUNTS}, {net.DEPTH} by default" for net in NETWORKS.values()) + ".",
)
@click.option("--padding", type=click.Choice(get_args(Padding)), default="zeros", show_default=True)
@click.option("--unconditional", is_flag=True, help="Do not tell the network the classes, where there are some.")
@click.option("--steps", type=int, help="Optimiser steps.  [default: 10000]")
@click.option("--epochs", type=float, help="Passes over the data, instead of --steps (300 in the paper).")
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--optimizer", type=click.Choice(["adam", "adamw"]), default="adam", show_default=True)
@click.option("--learning-rate", type=float, default=1e-4, show_default=True)
@click.option(
    "--anneal",
    type=click.Choice(["exponential", "cosine"]),
    default="exponential",
    show_default=True,
    help="How the learning rate falls: by --decay a step, as in the paper; or, better for short runs, after a warm-up "
    "along half a cosine to zero.",
)
@click.option("--decay", type=float, default=0.999965, show_default=True, help="Of the learning rate, a step.")
@click.option("--ema", type=float, default=0.999, show_default=True, help="Averaging of the weights, a step; 0: none.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine", show_default=True, help="Noise schedule.")
@click.option(
    "--arithmetic",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the network's layers in training (weights, optimiser and loss stay float32); auto: bfloat16 where the "
    "processor has instructions for it.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1 ..  [default: cuda where there is one]")
@threads_option
@click.option("--half", is_flag=True, help="Store the weights in float16.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output folder, if there is one.")
@out_option("pyels-network")
@json_option
def train_command(
    dataset: str,
    limit: int | None,
    size: int | None,
    kind: str,
    width: int,
    depth: int | None,
    padding: Any,
    unconditional: bool,
    steps: int | None,
    epochs: float | None,
    batch_size: int,
    optimizer: Any,
    learning_rate: float,
    anneal: Any,
    decay: float,
    ema: float,
    schedule: str,
    arithmetic: str,
    seed: int,
    device: str | None,
    threads: int | None,
    half: bool,
    resume: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Train a ResNet or a UNet to denoise.

    Writes network.safetensors, run.json (how it was trained, and its losses) and loss.png to the output folder. A
    checkpoint is written there every minute and at Ctrl-C; --resume goes on from it, and on the same machine and number
    of threads gives the same weights, to the last bit, as a training that was not stopped. The defaults of optimiser,
    learning rate and batch are the paper's; for an hour on a CPU rather take --optimizer adamw --learning-rate 1e-3
    --anneal cosine --batch-size 32.
    """
    resumable.check_seeds(seed, 1)
    if steps is not None and epochs is not None:
        raise ValueError("give either --steps or --epochs, not both")
    if epochs is not None and not 0 < epochs < 1e9:
        raise ValueError(f"--epochs must be positive, got {epochs}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads or default_threads())
    where = _device(device)
    bank = datasets.load(dataset, limit=limit, size=size)
    if steps is None:
        steps = 10_000 if epochs is None else max(1, round(epochs * len(bank) / batch_size))
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        anneal=anneal,
        decay=decay,
        ema=ema,
        schedule=schedule,
        seed=seed,
        bfloat16=arithmetic == "bfloat16" or (arithmetic == "auto" and bfloat16_is_faster(where)),
    )
    classes = None if unconditional or bank.labels is None else bank.classes[-1] + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETWORKS[kind]
        network = net(bank.shape[0], width, net.DEPTH if depth is None else depth, classes, padding=padding)
    work_in(out)
    resumable.check_command(out, "train")
    checkpoint, finished = out / CHECKPOINT, out / "network.safetensors"
    if checkpoint.exists() and not resume:
        raise ValueError(f"{out} holds a training that was stopped: add --resume to go on, or choose another folder")
    if finished.exists() and not checkpoint.exists():
        raise ValueError(f"{finished} is a finished network: choose another folder, or delete it to train anew")
    data = data_settings(dataset, limit, size, bank)
    trained, log = train(network, bank, recipe, out, where)
    training = {
        "version": pyels.__version__,
        "torch": torch.__version__,
        "data": data,
        "recipe": asdict(recipe),
        "epochs": round(steps * batch_size / len(bank), 3),
        "seconds": round(log.seconds, 1),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    trained.save(finished, {"training": training}, half)
    weights = sum(p.numel() for p in trained.parameters())
    config = {"net": kind, **trained.config, "weights": weights}
    result = {"command": "train", "network": config, **training, "losses": [round(v, 6) for v in log.losses]}
    write_json(out / "run.json", result)
    plots.draw_losses(out / "loss.png", log.losses, steps)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(
            f"{weights} weights, {steps} steps of {batch_size} ({training['epochs']:.3g} epochs of {len(bank)} images) "
            f"in {log.seconds:.0f} s, loss {log.losses[-1]:.4f}; network: {finished}"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name} was given, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device
