"""`pyels scaling`: cost, memory and error against the size of the bank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pyels.bank import PatchBank
from pyels.bank.file_images import parse_bytes
from pyels.cli.machines import check_told, default_preset, told_at_steps
from pyels.cli.options import command, integers, option
from pyels.cli.progress import StepBar
from pyels.cli.settings import DatasetOptions, OutputOptions, SeedOptions, ThreadOptions
from pyels.files import write_json, write_tensors
from pyels.machines import ELS
from pyels.sampling import noise_levels
from pyels.schedules import make_schedule
from pyels.studies import plots, resumable, scaling
from pyels.studies.rivals import Method

_SCHEDULE = "cosine"
_IMAGES = (1000, 3000, 10_000, 30_000)  # and all
_MOST_METHODS_OF_A_KIND = 4  # that the picture tells apart

_RESULTS = ("report.json", "cost.png", "error.png", "scaling.safetensors", "run.json")


@dataclass(frozen=True, kw_only=True)
class Scaling(DatasetOptions, SeedOptions, ThreadOptions, OutputOptions):
    images: str | None = option(
        None,
        "Sizes of the bank; beyond the data set's it is filled up with synthetic images made of its own.  [default: "
        f"{','.join(map(str, _IMAGES))} as far as the data set goes, and all of it]",
    )
    tolerance: str = option("0.03,0.06,0.12", "Of engine sampled; or none.", recorded=False)
    subset: str = option("0.1,0.01", "Shares of the images; or none.", recorded=False)
    top: str = option("100", "Numbers of nearest windows; or none.", recorded=False)
    boundary: str = option("zeros", type=click.Choice(ELS.boundaries))
    patch_sizes: str | None = option(
        None,
        "One size a step, cleanest first, as 3,3,5,..; a scales.json of pyels calibrate; or a preset's name.  "
        "[default: the paper's for the data set]",
    )
    steps: int | None = option(None, "Steps of a sample.  [default: 20, or as many as --patch-sizes]", recorded=False)
    num: int = option(3, "Number of samples at every size.")
    memory_limit: str | None = option(
        None,
        "Memory that images and the building of an index may take, as 500MB or 2GB; methods that take more are left "
        "out.  [default: three quarters of this machine's]",
    )
    out: Path = option(Path("pyels-scaling"))


@command(Scaling)
def scaling_command(given: Scaling) -> None:
    """Time, memory and error of a sample by ELS against the size of the bank.

    The exact machine draws samples at every size. At each of their steps engine sampled, the exact engine on a random
    share of the images, and a search for the nearest windows (IVF over principal directions in 8 bits) alone are given
    the same noisy image, timed, and compared with the exact mean.

    Writes report.json (time per sample and step, memory, index, errors of every step, and how cost grows with the
    bank: exponents with their standard errors), cost.png, error.png, scaling.safetensors (every measurement) and
    run.json. A run that was stopped goes on after its last finished step when the command is repeated.
    """
    loaded = given.read()
    threads = given.all_threads
    machine = ELS(loaded, boundary=given.boundary, threads=threads)
    preset = default_preset(given.dataset, machine.boundary) if given.patch_sizes is None else given.patch_sizes
    told, _ = told_at_steps([preset], given.steps, _SCHEDULE)
    check_told(told, {"els": machine})
    sizes = told["patch_size"]
    plan = _plan(given, loaded, sizes)
    computer = scaling.this_computer(threads)
    settings = given.record(
        computer=computer,
        data=given.record_of_data(loaded),
        images=plan.images,
        methods=[method.name for method in plan.methods],
        patch_sizes=sizes,
        schedule=_SCHEDULE,
        seeds=plan.seeds,
        memory_limit=plan.memory_limit,
    )
    given.hold_folder(settings, *_RESULTS)
    bank = scaling.grown(loaded, plan.images[-1], given.seed)
    with StepBar(len(plan.images) * len(sizes), len(plan.methods), "measuring") as bar:
        measured = scaling.measure(bank, plan, given.out, settings, bar)
    result = {**settings, **scaling.report(plan, bank, len(loaded), measured)}
    write_tensors(given.out / "scaling.safetensors", measured)
    write_json(given.out / "run.json", settings)
    write_json(given.out / "report.json", result)
    channels, height, width = bank.shape
    title = f"{Path(given.dataset).name} {channels}x{height}x{width}, ELS {given.boundary}, {len(sizes)} steps"
    title += f"; {computer['cpu']}, threads: {threads}" + "; top: inner pixels alone" * _leaves_out_the_border(result)
    pictures = given.out / "cost.png", given.out / "error.png"
    plots.draw_costs(pictures[0], result, title)
    plots.draw_errors(pictures[1], result, title)
    resumable.finished(given.out)
    given.show(result, [*_table(result), f"pictures: {', '.join(map(str, pictures))}"])


def _plan(given: Scaling, loaded: PatchBank, sizes: list[int]) -> scaling.Plan:
    """What to measure. Raises ValueError where the images alone take more than the memory allowed."""
    plan = given.passed_to(
        scaling.Plan,
        images=_images(given.images, len(loaded)),
        methods=[
            Method("exact"),
            *_methods("sampled", "--tolerance", given.tolerance),
            *_methods("subset", "--subset", given.subset),
            *_methods("top", "--top", given.top),
        ],
        levels=noise_levels(len(sizes), make_schedule(_SCHEDULE), sizes),
        threads=given.all_threads,
        memory_limit=_memory() * 3 // 4 if given.memory_limit is None else parse_bytes(given.memory_limit),
    )
    largest = plan.images[-1] * loaded.nbytes // len(loaded)
    if largest > plan.memory_limit:
        raise ValueError(f"--images {plan.images[-1]} takes {largest} bytes, more than the {plan.memory_limit} allowed")
    return plan


def _images(images: str | None, all_images: int) -> list[int]:
    """Ascending, without repetition."""
    sizes = [n for n in _IMAGES if n < all_images] + [all_images]
    if images is not None:
        sizes = sorted(set(integers("images", images)))
    if sizes[0] < 1:
        raise ValueError(f"--images must be at least 1, got {sizes[0]}")
    return sizes


def _methods(kind: str, option: str, text: str) -> list[Method]:
    """One for each of the numbers, or none."""
    if text == "none":
        return []
    try:
        values = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} must be none or numbers separated by commas, got {text!r}") from None
    for value in values:
        if kind == "sampled" and not 0 < value < float("inf"):
            raise ValueError(f"--tolerance must be positive and finite, got {value:g}")
        if kind == "subset" and not 0 < value < 1:
            raise ValueError(f"--subset must be above 0 and below 1, got {value:g}")
        if kind == "top" and not (value >= 1 and value.is_integer()):
            raise ValueError(f"--top must be whole numbers from 1 on, got {value:g}")
    if len(values) > _MOST_METHODS_OF_A_KIND:
        raise ValueError(f"{option} takes up to {_MOST_METHODS_OF_A_KIND} numbers, got {len(values)}")
    return [Method(kind, value) for value in values]


def _leaves_out_the_border(result: dict[str, Any]) -> bool:
    return result["boundary"] == "zeros" and any(name.startswith("top") for name in result["methods"])


def _memory() -> int:
    """Of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':8} {'':12} {'s/step':>9} {'s/sample':>9} {'x faster':>9} {'rms error':>9} {'worst step':>10} "
        f"{'missed':>7} {'memory MB':>9} {'index MB':>9} {'built in s':>10}"
    ]
    exact = 0.0
    for record in result["records"]:
        head = f"{record['images']:8} {record['method']:12}"
        if "left_out" in record:
            lines.append(f"{head} left out: {record['left_out']}")
            continue
        seconds = record["seconds_per_sample"]["median"]
        line = f"{head} {record['seconds_per_step']['median']:9.3g} {seconds:9.3g}"
        if record["method"] == "exact":
            exact = seconds
            line += f" {'1':>9} {'':>9} {'':>10} {'':>7}"
        else:
            missed = record["stated_error_missed"]
            line += f" {exact / seconds:9.3g} {record['rms_error']['median']:9.2g}"
            line += f" {record['worst_rms_error']['median']:10.2g} {'' if missed is None else f'{missed:.1%}':>7}"
        memory = record["bank_megabytes"] + record["index_megabytes"] + (record["working_megabytes"] or 0)
        line += f" {memory:9.0f}"
        if record["index_megabytes"]:
            line += f" {record['index_megabytes_of_all']:9.0f} {record['index_seconds_of_all']:10.0f}"
        lines.append(line.rstrip())
    for method, fits in result["exponents"].items():
        if not fits:
            sizes = f"{scaling.LEAST_SIZES} sizes of at least {scaling.LEAST_IMAGES} images"
            lines.append(f"no exponent of {method}: it takes {sizes}")
        for of, power in fits.items():
            lines.append(
                f"seconds of {method} ~ images^({power['exponent']:.3f} ± {power['standard_error']:.3f}), "
                f"{power['images'][0]} to {power['images'][-1]} images" + ", some synthetic" * (of == "all")
            )
    if _leaves_out_the_border(result):
        lines.append("top is timed for pixels whose windows lie wholly inside; the others count as right")
    lines.append("medians over the samples; memory: images, largest index, and what a step takes at its peak")
    return lines
