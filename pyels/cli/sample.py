"""`pyels sample`: draw with a machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import pyels
from pyels import distributed, presets
from pyels.bank import datasets
from pyels.cli.common import (
    StepBar,
    check_sizes,
    dataset_option,
    default_preset,
    describe,
    engine_option,
    engine_settings,
    index_option,
    integers,
    join_processes,
    json_option,
    limit_option,
    make_machine,
    memory_limit_option,
    named_sizes,
    out_option,
    precision_option,
    threads_option,
    tolerance_option,
    work_in,
)
from pyels.engines import default_threads
from pyels.files import write_json, write_tensors
from pyels.machines import ELS, ES, IS, Machine
from pyels.sampling import SOLVERS, Step, noise_levels
from pyels.schedules import SCHEDULES, make_schedule
from pyels.studies import plots, resumable


@click.command("sample")
@dataset_option
@click.option("--machine", "kind", type=click.Choice(["is", "es", "ls", "els"]), default="els", show_default=True)
@click.option("--boundary", type=click.Choice(ELS.boundaries), help="Of ELS.  [default: zeros]")
@click.option("--patch-size", type=int, help="One window size for all steps, odd.")
@click.option(
    "--patch-sizes",
    help="One size a step, cleanest first, as 3,3,5,..; a scales.json; a preset's name; or kamb2025[:NAME] to step as "
    "the paper's released code.  [default: the preset of the data set]",
)
@click.option("--steps", type=int, help="Number of steps.  [default: 20, or as many as --patch-sizes]")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine", show_default=True)
@click.option("--solver", type=click.Choice(SOLVERS), default="ddim", show_default=True)
@click.option("--num", type=int, default=4, show_default=True, help="Number of samples.")
@click.option("--labels", help="Classes, as 0,1,7,9; repeated in turn over the samples.  [default: all images]")
@click.option("--seed", type=int, default=0, show_default=True, help="Sample i is drawn from the noise of seed + i.")
@click.option(
    "--shard",
    type=click.Choice(distributed.SHARDS),
    help="How the processes that torchrun started share the work: all draw every sample together, each with its part "
    "of the bank, or each draws samples of its own, with the whole bank.",
)
@limit_option
@memory_limit_option
@engine_option
@precision_option
@tolerance_option
@index_option
@threads_option
@out_option("pyels-samples")
@json_option
def sample_command(
    dataset: str,
    kind: str,
    boundary: str | None,
    patch_size: int | None,
    patch_sizes: str | None,
    steps: int | None,
    schedule: str,
    solver: str,
    num: int,
    labels: str | None,
    seed: int,
    shard: str | None,
    limit: int | None,
    memory_limit: str | None,
    engine: str,
    precision: str,
    tolerance: float | None,
    index: Path | None,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Draw samples with a machine.

    Writes samples.png, samples.safetensors (noise, samples, labels) and run.json to the output folder. A run that was
    stopped goes on after its last finished sample when the command is repeated.
    """
    processes = distributed.launched()
    if shard is None and processes > 1:
        raise ValueError(
            f"torchrun started {processes} processes: let them share the bank of every sample with --shard bank, or "
            "draw different samples with --shard seeds"
        )
    join_processes()  # before the data is looked at: if that fails on one machine, the others notice
    resumable.check_seeds(seed, num)
    classes = None if labels is None else integers("--labels", labels)
    if kind != "els" and boundary is not None:
        raise ValueError(f"--boundary {boundary} was given, but only machine els has one")
    bank = datasets.load(dataset, limit=limit, memory_limit=memory_limit)
    machine = make_machine(kind, bank, boundary or "zeros", engine, threads, tolerance, index, precision)
    stepping = _stepping(machine, dataset, boundary or "zeros", patch_size, patch_sizes, steps, schedule)
    per_sample = None if classes is None else [classes[i % len(classes)] for i in range(num)]
    for c in set(per_sample or []):
        bank.class_range(c)
    if shard == "bank":
        machine = distributed.Sharded(machine)
    settings: dict[str, Any] = {
        "command": "sample",
        "version": pyels.__version__,
        "dataset": dataset if dataset in datasets.NAMES else str(Path(dataset).resolve()),
        "limit": limit,
        "bank": describe(bank),
        "machine": kind,
        "boundary": (boundary or "zeros") if kind == "els" else None,
        **stepping,
        "solver": solver,
        "num": num,
        "labels": per_sample,
        "seed": seed,
        **engine_settings(machine),
    }
    levels = noise_levels(stepping["steps"], make_schedule(schedule), stepping["patch_sizes"])
    evaluations = levels + (levels[1:] if solver == "heun" else [])
    started = time.perf_counter()
    computed: list[int] = []  # numbers of the samples that were not found finished

    def label_of(i: int) -> torch.Tensor | None:
        return None if per_sample is None else torch.tensor([per_sample[i]])

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        noise = resumable.noise_of_seed(seed + i, bank.shape)
        drawn = pyels.sample(machine, noise[None], labels=label_of(i), solver=solver, callback=on_step, **stepping)
        return {"noise": noise, "samples": drawn[0]}

    distributed.agree({**settings, "shard": shard}, but=("dataset", "isa"))
    if distributed.rank() > 0:
        distributed.follow(one, shard or "bank")
        return
    work_in(out)
    with StepBar(num, len(levels)) as bar, distributed.lead(one, shard or "bank") as compute:

        def counted(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
            item = compute(i, on_step)
            computed.append(i)
            return item

        images = resumable.resumable(out, settings, num, counted, bar, jobs=processes if shard == "seeds" else 1)
    seconds = time.perf_counter() - started
    pairs = sum(machine.pairs(label_of(i), level.patch_size) for i in computed for level in evaluations)
    if per_sample is not None:
        images["labels"] = torch.tensor(per_sample)
    captions = [f"seed {seed + i}" + (f", class {per_sample[i]}" if per_sample else "") for i in range(num)]
    shared: dict[str, Any] = {
        "shard": shard,
        "processes": processes,
    }  # no settings: a run may go on with other numbers of them
    shared["threads"] = default_threads() if threads is None else threads
    result = {**settings, **shared, "seconds": round(seconds, 3), "pairs": pairs}
    write_tensors(out / "samples.safetensors", images)
    write_json(out / "run.json", result)
    plots.draw_grid(out / "samples.png", images["samples"], captions)
    resumable.finished(out)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        rate = f"{pairs:.3g} pairs, {pairs / seconds:.3g} pairs/s"
        click.echo(f"{num} samples in {seconds:.1f} s ({rate}); picture: {out / 'samples.png'}")


def _stepping(
    machine: Machine,
    dataset: str,
    boundary: str,
    patch_size: int | None,
    patch_sizes: str | None,
    steps: int | None,
    schedule: str,
) -> dict[str, Any]:
    """steps, schedule and patch_sizes of `pyels.sample`."""
    n = 20 if steps is None else steps
    if n < 1:
        raise ValueError(f"--steps must be at least 1, got {n}")
    if isinstance(machine, (IS, ES)):
        if patch_size is not None or patch_sizes is not None:
            raise ValueError("machines is and es compare whole images: leave out --patch-size and --patch-sizes")
        return {"steps": n, "schedule": schedule, "patch_sizes": None}
    if patch_size is not None and patch_sizes is not None:
        raise ValueError("give either --patch-size or --patch-sizes, not both")
    if patch_size is not None:
        sizes = [patch_size] * n
    elif patch_sizes is not None and patch_sizes.split(":")[0] == "kamb2025":
        if schedule != "cosine":
            raise ValueError(f"kamb2025 steps with the cosine schedule, but --schedule is {schedule}")
        _, _, name = patch_sizes.partition(":")
        stepping = presets.kamb2025(name or default_preset(dataset, boundary), n)
        check_sizes(machine, stepping["patch_sizes"])
        return stepping
    else:
        sizes = named_sizes(default_preset(dataset, boundary) if patch_sizes is None else patch_sizes, steps, schedule)
    check_sizes(machine, sizes)
    return {"steps": len(sizes), "schedule": schedule, "patch_sizes": sizes}
