"""`pyels sample`: draw with a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import pyels
from pyels import distributed, presets
from pyels.cli.options import AT_LEAST_1, command, option
from pyels.cli.progress import StepBar, join_processes
from pyels.cli.settings import (
    BOUNDARIES,
    DEFAULT_STEPS,
    DatasetOptions,
    MemoryOptions,
    OutputOptions,
    PrecisionOptions,
    SampledOptions,
    ThreadOptions,
    check_sizes,
    default_preset,
    integers,
    is_local,
    record_of_engine,
    refuse_sizes,
    sizes_of_steps,
)
from pyels.files import write_json, write_tensors
from pyels.machines import MACHINES, Machine
from pyels.sampling import SOLVERS, Step, noise_levels
from pyels.schedules import SCHEDULES, make_schedule
from pyels.studies import plots, resumable


@dataclass(frozen=True, kw_only=True)
class Sample(DatasetOptions, MemoryOptions, PrecisionOptions, SampledOptions, ThreadOptions, OutputOptions):
    machine: str = option("els", type=click.Choice(list(MACHINES)))
    boundary: str | None = option(None, "Of ELS.  [default: zeros]", type=click.Choice(BOUNDARIES))
    patch_size: int | None = option(None, "One window size for all steps, odd.", recorded=False)
    patch_sizes: str | None = option(
        None,
        "One size a step, cleanest first, as 3,3,5,..; a scales.json; a preset's name; or kamb2025[:NAME] to step as "
        "the paper's released code.  [default: the preset of the data set]",
    )
    steps: int | None = option(None, "Number of steps.  [default: 20, or as many as --patch-sizes]", must_be=AT_LEAST_1)
    schedule: str = option("cosine", type=click.Choice(SCHEDULES))
    solver: str = option("ddim", type=click.Choice(SOLVERS))
    num: int = option(4, "Number of samples.")
    labels: str | None = option(None, "Classes, as 0,1,7,9; repeated in turn over the samples.  [default: all images]")
    seed: int = option(0, "Sample i is drawn from the noise of seed + i.")
    shard: str | None = option(
        None,
        "How the processes that torchrun started share the work: all draw every sample together, each with its part "
        "of the bank, or each draws samples of its own, with the whole bank.",
        type=click.Choice(distributed.SHARDS),
        recorded=False,
    )
    out: Path = option(Path("pyels-samples"))


@command(Sample)
def sample_command(given: Sample) -> None:
    """Draw samples with a machine.

    Writes samples.png, samples.safetensors (noise, samples, labels) and run.json to the output folder. A run that was
    stopped goes on after its last finished sample when the command is repeated.
    """
    processes = distributed.launched()
    if given.shard is None and processes > 1:
        raise ValueError(
            f"torchrun started {processes} processes: let them share the bank of every sample with --shard bank, or "
            "draw different samples with --shard seeds"
        )
    join_processes()  # before the data is looked at: if that fails on one machine, the others notice
    resumable.check_seeds(given.seed, given.num)
    classes = None if given.labels is None else integers("labels", given.labels)
    bank = given.read(memory_limit=given.memory_limit)
    machine = given.machine_of(given.machine, bank, given.threads, given.boundary)
    stepping = _stepping(given, machine)
    per_sample = None if classes is None else [classes[i % len(classes)] for i in range(given.num)]
    for c in set(per_sample or []):
        bank.class_range(c)
    settings = given.record(
        **given.record_of_data(bank),
        boundary=getattr(machine, "boundary", None),
        labels=per_sample,
        **stepping,
        **record_of_engine(machine),
    )
    if given.shard == "bank":
        machine = distributed.Sharded(machine)
    levels = noise_levels(stepping["steps"], make_schedule(given.schedule), stepping["patch_sizes"])
    evaluations = levels + (levels[1:] if given.solver == "heun" else [])
    started = time.perf_counter()
    computed: list[int] = []  # numbers of the samples that were not found finished

    def label_of(i: int) -> torch.Tensor | None:
        return None if per_sample is None else torch.tensor([per_sample[i]])

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        noise = resumable.noise_of_seed(given.seed + i, bank.shape)
        options = {**stepping, "solver": given.solver, "callback": on_step}
        return {"noise": noise, "samples": pyels.sample(machine, noise[None], labels=label_of(i), **options)[0]}

    how = given.shard or "bank"
    distributed.agree({**settings, "shard": given.shard}, but=("dataset", "isa"))
    if distributed.rank() > 0:
        distributed.follow(one, how)
        return
    given.hold_folder(settings, "samples.png", "samples.safetensors", "run.json")
    with StepBar(given.num, len(levels)) as bar, distributed.lead(one, how) as compute:

        def counted(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
            item = compute(i, on_step)
            computed.append(i)
            return item

        jobs = processes if given.shard == "seeds" else 1
        images = resumable.resumable(given.out, settings, given.num, counted, bar, jobs)
    seconds = time.perf_counter() - started
    pairs = sum(machine.pairs(label_of(i), level.patch_size) for i in computed for level in evaluations)
    if per_sample is not None:
        images["labels"] = torch.tensor(per_sample)
    named = [f", class {bank.name_of(c)}" for c in per_sample or []] or [""] * given.num
    captions = [f"seed {given.seed + i}{name}" for i, name in enumerate(named)]
    # No settings: a run may go on with other numbers of them.
    shared = {"shard": given.shard, "processes": processes, "threads": given.all_threads}
    result = {**settings, **shared, "seconds": round(seconds, 3), "pairs": pairs}
    write_tensors(given.out / "samples.safetensors", images)
    write_json(given.out / "run.json", result)
    plots.draw_grid(given.out / "samples.png", images["samples"], captions)
    resumable.finished(given.out)
    rate = f"{pairs:.3g} pairs, {pairs / seconds:.3g} pairs/s"
    picture = given.out / "samples.png"
    given.show(result, [f"{given.num} samples in {seconds:.1f} s ({rate}); picture: {picture}"])


def _stepping(given: Sample, machine: Machine) -> dict[str, Any]:
    """steps, schedule and patch_sizes of `pyels.sample`."""
    n = given.steps or DEFAULT_STEPS
    stepping: dict[str, Any] = {"steps": n, "schedule": given.schedule, "patch_sizes": None}
    if not is_local(machine):
        refuse_sizes(patch_size=given.patch_size, patch_sizes=given.patch_sizes)
        return stepping
    if given.patch_size is not None and given.patch_sizes is not None:
        raise ValueError("give either --patch-size or --patch-sizes, not both")
    released, _, preset = (given.patch_sizes or "").partition(":")
    if given.patch_size is not None:
        stepping["patch_sizes"] = [given.patch_size] * n
    elif released == "kamb2025":
        if given.schedule != "cosine":
            raise ValueError(f"kamb2025 steps with the cosine schedule, but --schedule is {given.schedule}")
        stepping = presets.kamb2025(preset or default_preset(given.dataset, machine), n)
    else:
        text = default_preset(given.dataset, machine) if given.patch_sizes is None else given.patch_sizes
        sizes = sizes_of_steps(text, given.steps, given.schedule)
        stepping.update(steps=len(sizes), patch_sizes=sizes)
    check_sizes(machine, stepping["patch_sizes"])
    return stepping
