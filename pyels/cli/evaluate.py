"""`pyels evaluate`: how well machines and a network denoise images that they have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyels import datasets
from pyels.bank import PatchBank
from pyels.cli.machines import MachinesOptions, record_of_engine
from pyels.cli.options import AT_LEAST_1, command, option
from pyels.cli.progress import StepBar
from pyels.cli.settings import (
    BankOptions,
    JobOptions,
    OutputOptions,
    SeedOptions,
    boundary_of,
    check_space,
    record_of_data,
    unit_of,
)
from pyels.denoiser import Denoiser
from pyels.files import write_json, write_tensors
from pyels.machines import Wiener
from pyels.sampling import Level, noise_levels
from pyels.schedules import make_schedule
from pyels.studies import comparison, evaluation, plots, resumable
from pyels.studies.evaluation import WIENER

_RESULTS = ("report.json", "evaluation.png", "evaluation.safetensors", "run.json")
_TOO_MANY = 20  # numbers in a line


@dataclass(frozen=True, kw_only=True)
class Evaluate(BankOptions, SeedOptions, MachinesOptions, JobOptions, OutputOptions):
    network: str | None = option(None, "A network beside the machines; see `pyels compare`.")
    held_out: str | None = option(
        None, "The images that are denoised, a name or a path.  [default: the test split of the data set]"
    )
    levels: int = option(8, "Noise levels, evenly among the steps.", must_be=AT_LEAST_1)
    steps: int | None = option(None, "Of a trajectory.  [default: 20, or as many as --patch-sizes]", must_be=AT_LEAST_1)
    num: int = option(100, "Number of images.")
    out: Path = option(Path("pyels-evaluation"))


@command(Evaluate)
def evaluate_command(given: Evaluate) -> None:
    """Measure how well machines denoise images that their bank does not hold, and a network beside them.

    Prints each one's squared error at every noise level as a multiple of that of Wiener's filter of the same bank, with
    95% intervals over the images, and says which of the images the bank holds. A network that is told classes is told
    those of the images; machines draw on the whole bank. Writes report.json, evaluation.png, evaluation.safetensors
    (the error of every image) and run.json. A run that was stopped goes on when the command is repeated. To predict
    what a network draws is another thing: that is pyels compare.
    """
    denoiser, record = given.use_if_any(given.network)
    bank, data = given.read_bank(record)
    images, held_out = _held_out(given, data)
    check_space(bank.latents, images.latents, "the bank holds", "the held-out images are")
    jobs, each = given.jobs_and_threads(len(images), bank)
    machines = given.machines_of(given.machines, bank, each, boundary_of(record))
    machines.setdefault(WIENER, Wiener(bank))
    told, steps = given.told(machines, given.steps)
    everybody = machines if denoiser is None else {comparison.NETWORK: denoiser, **machines}
    labels = _labels(denoiser, images, bank)
    levels = _levels(given, steps, everybody, told)
    shown, seeds = next(iter(levels.values())), given.seeds[: len(images)]
    settings = given.record(
        machines=list(machines),
        schedule=given.schedule,
        boundary=boundary_of(record),
        per_step=told,
        steps=steps,
        times=[level.t for level in shown],
        seeds=seeds,
        held_out=held_out,
        labels=labels,
        network=None if denoiser is None else given.fit(denoiser, record, bank),
        data=data,
        **record_of_engine(bank, *machines.values()),
    )
    given.hold_folder(settings, *_RESULTS)
    contenders = {name: (one, levels[name]) for name, one in everybody.items()}
    with StepBar(len(images), sum(map(len, levels.values())), "evaluating") as bar:
        errors = evaluation.evaluate(contenders, images, labels, seeds, given.out, settings, bar, jobs)
    held = evaluation.held_by(bank, images)
    result: dict[str, Any] = {"command": "evaluate", "images": len(images), "of": unit_of(bank), "held_by_bank": held}
    result["levels"] = evaluation.report(errors, list(everybody), shown)
    write_tensors(given.out / "evaluation.safetensors", {"errors": errors})
    write_json(given.out / "report.json", result)
    write_json(given.out / "run.json", settings)
    plots.draw_evaluation(given.out / "evaluation.png", result["levels"], plots.title_of(settings))
    resumable.finished(given.out)
    given.show(result, _table(result, given.out))


def _held_out(given: Evaluate, data: Mapping[str, Any]) -> tuple[PatchBank, dict[str, Any]]:
    """The images that are denoised, and what is enough to load them again."""
    dataset = given.held_out or str(data["dataset"])
    reading = {
        name: data[name] for name in ("root", "size", "crop", "mode", "skip_unreadable") if data.get(name) is not None
    }
    if given.held_out is None:
        if data.get("split") == "test":
            raise ValueError("--held-out is needed where the bank is a test split itself")
        reading["split"] = "test"
    reading["limit"] = given.num
    try:
        images = datasets.load(dataset, **reading)
    except (ValueError, FileNotFoundError) as error:
        if given.held_out is not None:
            raise
        raise ValueError(f"--held-out is needed, images that the bank does not hold: {error}") from error
    return images, record_of_data(dataset, reading, images)


def _labels(denoiser: Denoiser | None, images: PatchBank, bank: PatchBank) -> list[int] | None:
    """The classes of the images, where there is a network that is told them."""
    if not getattr(denoiser, "conditional", False):
        return None
    if images.labels is None:
        if getattr(denoiser, "null_label", None) is not None:
            return None
        raise ValueError("the network is class-conditional, but the held-out images have no labels")
    for label in images.classes:
        bank.class_range(label)
    labels: list[int] = images.labels.tolist()
    return labels


def _levels(
    given: Evaluate, steps: int, denoisers: Mapping[str, Denoiser], told: Mapping[str, Sequence[Any]]
) -> dict[str, list[Level]]:
    """Of each denoiser, evenly among its steps, the noisiest first."""
    schedule = make_schedule(given.schedule)
    chosen = torch.linspace(0, steps - 1, min(steps, given.levels)).round().int().tolist()
    levels = {}
    for name, one in denoisers.items():
        own = {parameter: values for parameter, values in told.items() if parameter == one.parameter}
        of_steps = noise_levels(steps, schedule, per_step=own)
        levels[name] = [of_steps[i] for i in chosen]
    return levels


def _table(result: Mapping[str, Any], out: Path) -> list[str]:
    rows = result["levels"]
    names = list(rows[0]["ratio"])
    lines = [
        f"squared error over Wiener's, {result['of']} of {result['images']} images [95% interval]:",
        f"{'sigma/alpha':>11} {'Wiener':>9} " + " ".join(f"{name.upper():>21}" for name in names if name != WIENER),
    ]
    for row in rows:
        figures = []
        for name in names:
            if name == WIENER:
                continue
            if row["ratio"][name] is None:
                figures.append("not reached")
                continue
            low, high = row["interval_95"][name]
            figures.append(f"{row['ratio'][name]:.3f} [{low:.3f}, {high:.3f}]")
        level = format(row["sigma"] / row["alpha"], ".3g") if row["alpha"] else "inf"
        lines.append(f"{level:>11} {row['error'][WIENER]:9.3g} " + " ".join(f"{text:>21}" for text in figures))
    for name in names:
        worse = sum(row["ratio"][name] is not None and row["interval_95"][name][0] > 1 for row in rows)
        if worse:
            lines.append(f"{name.upper()} is worse than the linear filter at {worse} of {len(rows)} noise levels")
    if held := result["held_by_bank"]:
        which = ", ".join(map(str, held[:_TOO_MANY])) + ", .." * (len(held) > _TOO_MANY)
        lines.append(f"the bank holds {len(held)} of the {result['images']} images, which are no test: {which}")
    return [*lines, f"picture: {out / 'evaluation.png'}"]
