"""`pyels sample`: draw with a machine or a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch

import pyels
from pyels import distributed, presets
from pyels.bank import PatchBank
from pyels.cli.machines import (
    BOUNDARIES,
    BOUNDED,
    COMPILED,
    DEFAULT_STEPS,
    WINDOWS,
    PrecisionOptions,
    SampledOptions,
    arguments_of,
    check_told,
    default_preset,
    record_of_engine,
    refuse_sizes,
    told_at_steps,
)
from pyels.cli.options import AT_LEAST_1, command, flag, integers, option
from pyels.cli.progress import StepBar, join_processes
from pyels.cli.settings import (
    DatasetOptions,
    GuidanceOptions,
    MemoryOptions,
    OutputOptions,
    PictureOptions,
    ThreadOptions,
    UseOptions,
)
from pyels.denoiser import Denoiser
from pyels.files import write_json, write_tensors
from pyels.machines import MACHINES, Machine
from pyels.sampling import SOLVERS, Step, noise_levels
from pyels.schedules import SCHEDULES, make_schedule
from pyels.studies import plots, resumable
from pyels.studies.check import SAID, leaves, limit_of, outside


@dataclass(frozen=True, kw_only=True)
class Sample(
    DatasetOptions,
    MemoryOptions,
    UseOptions,
    GuidanceOptions,
    PictureOptions,
    PrecisionOptions,
    SampledOptions,
    ThreadOptions,
    OutputOptions,
):
    machine: str = option("els", type=click.Choice(list(MACHINES)))
    network: str | None = option(
        None, "Draw with a network instead (see `pyels compare`), images as --dataset's.", recorded=False
    )
    boundary: str | None = option(None, "Of ELS.  [default: zeros]", type=click.Choice(BOUNDARIES))
    window: str | None = option(None, "Of ELS and LS.  [default: square]", type=click.Choice(WINDOWS))
    patch_size: int | None = option(None, "One window size for all steps, odd.", recorded=False)
    patch_sizes: str | None = option(
        None,
        "One size a step, cleanest first, as 3,3,5,..; a scales.json; a preset's name; or kamb2025[:NAME] to step as "
        "the paper's released code. Of pca and golden thresholds, of Gaussian windows widths.  "
        "[default: the preset of the data set]",
        also="--scales",
    )
    steps: int | None = option(None, "Number of steps.  [default: 20, or as many as --patch-sizes]", must_be=AT_LEAST_1)
    schedule: str = option("cosine", type=click.Choice(SCHEDULES))
    solver: str = option("ddim", type=click.Choice(SOLVERS))
    num: int = option(4, "Number of samples.")
    labels: str | None = option(
        None,
        "Classes, as 0,1,7,9; repeated in turn over the samples.  [default: all images; of a network "
        "that is told classes: all]",
    )
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
    """Draw samples with a machine, or with a network.

    Writes samples.png, samples.safetensors (noise, samples, labels) and run.json to the output folder; of a bank of
    latents samples are latents, and the autoencoder makes pictures of them. A run that was stopped goes on after its
    last finished sample when the command is repeated.
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
    decode = given.decoder(bank)
    denoiser, of_it = _denoiser(given, bank)
    if classes is not None and given.network is not None and not getattr(denoiser, "conditional", False):
        raise ValueError("--labels was given, but the network is told no classes: leave it out")
    stepping, denoiser = _stepping(given, denoiser), given.guided(denoiser)
    if classes is None and getattr(denoiser, "conditional", False) and getattr(denoiser, "null_label", None) is None:
        classes = list(bank.classes)
    per_sample = None if not classes else [classes[i % len(classes)] for i in range(given.num)]
    for c in set(per_sample or []) if given.network is None else ():
        bank.class_range(c)
    settings = given.record(
        **given.record_of_data(bank),
        guidance=given.guidance,
        labels=per_sample,
        **stepping,
        **of_it,
    )
    if given.shard == "bank":
        if not isinstance(denoiser, Machine):
            raise ValueError("--shard bank is for machines of one definition; others draw with --shard seeds")
        denoiser = distributed.Sharded(denoiser)
    told = stepping["patch_sizes"], stepping.get("per_step")
    levels = noise_levels(stepping["steps"], make_schedule(given.schedule), *told)
    evaluations = levels + (levels[1:] if given.solver == "heun" else [])
    started = time.perf_counter()
    computed: list[int] = []  # numbers of the samples that were not found finished

    def label_of(i: int) -> torch.Tensor | None:
        return None if per_sample is None else torch.tensor([per_sample[i]])

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        noise = resumable.noise_of_seed(given.seed + i, bank.shape)
        options = {**stepping, "solver": given.solver, "callback": on_step}
        return {"noise": noise, "samples": pyels.sample(denoiser, noise[None], labels=label_of(i), **options)[0]}

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
    counts = denoiser.pairs if isinstance(denoiser, Machine) else lambda label, **told: 0
    pairs = sum(counts(label_of(i), **level.told) for i in computed for level in evaluations)
    if bank.latents is not None:
        images["pictures"] = decode(images["samples"])
    if per_sample is not None:
        images["labels"] = torch.tensor(per_sample)
    named = [f", class {bank.name_of(c)}" for c in per_sample or []] or [""] * given.num
    captions = [f"seed {given.seed + i}{name}" for i, name in enumerate(named)]
    # No settings: a run may go on with other numbers of them.
    shared = {"shard": given.shard, "processes": processes, "threads": given.all_threads}
    result = {**settings, **shared, "seconds": round(seconds, 3), "pairs": pairs}
    write_tensors(given.out / "samples.safetensors", images)
    write_json(given.out / "run.json", result)
    plots.draw_grid(
        given.out / "samples.png", images.get("pictures", images["samples"]), captions, plots.title_of(settings)
    )
    resumable.finished(given.out)
    rate = f" ({pairs:.3g} pairs, {pairs / seconds:.3g} pairs/s)" if isinstance(denoiser, Machine) else ""
    lines = [f"{given.num} samples in {seconds:.1f} s{rate}; picture: {given.out / 'samples.png'}"]
    if outside(images["samples"], limit_of(bank)) >= SAID:
        lines.append(leaves("samples leave", images["samples"], limit_of(bank), given.network is not None))
    given.show(result, lines)


def _denoiser(given: Sample, bank: PatchBank) -> tuple[Denoiser, dict[str, Any]]:
    """What draws, and what of it belongs into the record."""
    if given.network is None:
        if given.clip or given.device is not None:
            raise ValueError("--clip and --device are for --network; machines need neither")
        machine = given.machine_of(given.machine, bank, given.threads, given.boundary, window=given.window)
        if given.engine != "auto" and given.machine not in COMPILED:
            raise ValueError(f"--engine {given.engine} was given, but machine {given.machine} needs none: leave it out")
        own = given.boundary or "zeros" if given.machine in BOUNDED else None
        return machine, {"boundary": own, **record_of_engine(bank, machine)}
    for name in ("machine", "boundary", "window", "engine", "tolerance", "index", "precision"):
        (default,) = (one.default for one in fields(given) if one.name == name)
        if getattr(given, name) != default:
            raise ValueError(f"{flag(name)} is for machines: leave it out, or --network")
    given.tell_torch()
    denoiser, record = given.use(given.network)
    return denoiser, {"machine": None, "network": given.fit(denoiser, record, bank)}


def _stepping(given: Sample, machine: Denoiser) -> dict[str, Any]:
    """steps, schedule and patch_sizes of `pyels.sample`, and per_step where there are others."""
    n = given.steps or DEFAULT_STEPS
    stepping: dict[str, Any] = {"steps": n, "schedule": given.schedule, "patch_sizes": None}
    if given.network is not None:
        if given.patch_size is not None or given.patch_sizes is not None:
            raise ValueError("networks have no windows: leave out --patch-size and --patch-sizes")
        return stepping
    if machine.parameter is None:
        refuse_sizes(patch_size=given.patch_size, patch_sizes=given.patch_sizes)
        return stepping
    if given.patch_size is not None and given.patch_sizes is not None:
        raise ValueError("give either --patch-size or --patch-sizes, not both")
    released, _, preset = (given.patch_sizes or "").partition(":")
    if released == "kamb2025":
        if given.schedule != "cosine":
            raise ValueError(f"kamb2025 steps with the cosine schedule, but --schedule is {given.schedule}")
        stepping = presets.kamb2025(preset or default_preset(given.dataset, given.boundary), n)
        told = {"patch_size": stepping["patch_sizes"]}
    else:
        text = given.patch_sizes if given.patch_size is None else f"patch_size={given.patch_size}"
        if text is None and machine.parameter == "patch_size":
            text = default_preset(given.dataset, given.boundary)
        texts = [] if text is None else [text]
        told, stepping["steps"] = told_at_steps(texts, given.steps, given.schedule, machine.parameter)
    check_told(told, {given.machine: machine})
    return {**stepping, **arguments_of(told)}
