"""`pyels compare`: machines against a network, from the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from pyels import presets
from pyels.bank import PatchBank
from pyels.cli.common import (
    StepBar,
    boundary_of,
    check_sizes,
    classes_of_seeds,
    engine_option,
    engine_settings,
    jobs_option,
    json_option,
    load_network_and_bank,
    make_machine,
    named_sizes,
    network_options,
    out_option,
    seeds_labels_option,
    split_threads,
    threads_option,
    work_in,
)
from pyels.files import write_json, write_tensors
from pyels.machines import ELS, LS, Machine
from pyels.schedules import SCHEDULES
from pyels.studies import comparison, plots, resumable

_MACHINES = ("is", "es", "ls", "els", *(f"els:{boundary}" for boundary in ELS.boundaries))
_MOST_PAIRS = 100  # in the picture
_FEWEST_SEEDS = 5  # of which resampling says anything


@click.command("compare")
@network_options
@click.option(
    "--machines",
    default="els,ls,is",
    show_default=True,
    help="Of is, es, ls, els; els:circular, els:interior and els:zeros name the boundary, els takes that of the "
    "network's padding (zeros where it is not known).",
)
@click.option(
    "--patch-sizes",
    help="Of els and ls: one size a step, cleanest first, as 3,3,5,..; a scales.json of pyels calibrate; or a preset's "
    "name.",
)
@click.option("--steps", type=int, help="Steps of the machines.  [default: 20, or as many as --patch-sizes]")
@click.option("--network-steps", type=int, help="Steps of the network.  [default: as many as the machines]")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine", show_default=True)
@click.option("--num", type=int, default=50, show_default=True, help="Number of seeds.")
@seeds_labels_option
@click.option("--seed", type=int, default=0, show_default=True, help="First seed.")
@engine_option
@threads_option
@jobs_option
@out_option("pyels-comparison")
@json_option
def compare_command(
    source: str,
    dataset: str | None,
    limit: int | None,
    size: int | None,
    memory_limit: str | None,
    machines: str,
    patch_sizes: str | None,
    steps: int | None,
    network_steps: int | None,
    schedule: str,
    num: int,
    labels: str | None,
    seed: int,
    engine: str,
    threads: int | None,
    jobs: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Let machines and a network draw from the same noise, and measure how alike they are.

    Writes report.json (pearson_r, its square pearson_r2 and r2_score of every seed, their medians with quartiles and
    95% bootstrap intervals, and how often each machine is closer to the network than IS), scatter.png (as the paper's
    figure 10), pairs.png (the network's and the first machine's pictures, best to worst), comparison.safetensors and
    run.json. A run that was stopped goes on after its last finished seed when the command is repeated.
    """
    resumable.check_seeds(seed, num)
    denoiser, bank, record, settings = load_network_and_bank(source, dataset, limit, size, memory_limit)
    jobs, each = split_threads(jobs, threads, num, bank)
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    built = _build(machines, bank, boundary_of(record), engine, each)
    used = _patch_sizes(built, patch_sizes, steps, schedule)
    n = len(used) if used is not None else 20 if steps is None else steps
    network_steps = n if network_steps is None else network_steps
    if network_steps < 1:
        raise ValueError(f"--network-steps must be at least 1, got {network_steps}")
    contenders = {comparison.NETWORK: comparison.Contender(denoiser, network_steps)}
    for spec, machine in built.items():
        contenders[spec] = comparison.Contender(machine, n, used if isinstance(machine, (ELS, LS)) else None)
    seeds = [seed + i for i in range(num)]
    classes = classes_of_seeds(labels, denoiser, bank, seeds)
    settings = {
        "command": "compare",
        **settings,
        "machines": list(built),
        "boundary": boundary_of(record),
        "patch_sizes": used,
        "steps": n,
        "network_steps": network_steps,
        "schedule": schedule,
        "seeds": seeds,
        "labels": classes,
        **engine_settings(next(iter(built.values()))),
    }
    work_in(out)
    resumable.check_finished(out, settings)
    images, report = run_comparison(contenders, bank, seeds, classes, schedule, out, settings, jobs)
    write_tensors(out / "comparison.safetensors", images)
    pictures = _draw(out, images, report)
    resumable.finished(out)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    print_report(report)
    click.echo(f"steps: {n} of the machines, {network_steps} of the network")
    click.echo(f"pictures: {', '.join(map(str, pictures))}")


def _build(specs: str, bank: PatchBank, boundary: str, engine: str, threads: int) -> dict[str, Machine]:
    """The machines of --machines, by the names given there."""
    built = {}
    for spec in dict.fromkeys(part.strip().lower() for part in specs.split(",")):
        if spec not in _MACHINES:
            raise ValueError(f"--machines must be of {', '.join(_MACHINES)}, got {spec!r}")
        kind, _, named_boundary = spec.partition(":")
        built[spec] = make_machine(kind, bank, named_boundary or boundary, engine, threads)
    return built


def _patch_sizes(
    built: dict[str, Machine], patch_sizes: str | None, steps: int | None, schedule: str
) -> list[int] | None:
    """One patch size a step; None where no machine has any."""
    local = [machine for machine in built.values() if isinstance(machine, (ELS, LS))]
    if not local and patch_sizes is not None:
        raise ValueError("machines is and es compare whole images: leave out --patch-sizes")
    if not local:
        return None
    if patch_sizes is None:
        raise ValueError(
            "--patch-sizes is needed: pyels calibrate finds them for this network; or give numbers, or one of "
            f"{', '.join(presets.PATCH_SIZES)}"
        )
    used = named_sizes(patch_sizes, steps, schedule)
    for machine in local:
        check_sizes(machine, used)
    return used


def _draw(out: Path, images: dict[str, Tensor], report: dict[str, Any]) -> list[Path]:
    """pairs.png and, where IS is one of several machines, scatter.png."""
    of_seeds = {spec: row["pearson_r"] for spec, row in report["per_seed"].items()}
    seeds, labels, first = report["seeds"], report["labels"], next(iter(of_seeds))
    order = sorted(range(len(seeds)), key=lambda i: -of_seeds[first][i])
    shown = [order[i] for i in torch.linspace(0, len(seeds) - 1, min(len(seeds), _MOST_PAIRS)).round().int().tolist()]
    classes = ["" if labels is None else f", class {labels[i]}" for i in shown]
    pictures = [out / "pairs.png"]
    plots.draw_pairs(
        pictures[0],
        images[comparison.NETWORK][shown],
        images[first][shown],
        [f"seed {seeds[i]}{c}\nr = {of_seeds[first][i]:.2f}" for i, c in zip(shown, classes, strict=True)],
        ("network", first.upper()),
    )
    if "is" in of_seeds and len(of_seeds) > 1:
        pictures.append(out / "scatter.png")
        ideal = of_seeds.pop("is")
        plots.draw_scatter(pictures[1], of_seeds, ideal)
    return pictures


def run_comparison(
    contenders: dict[str, comparison.Contender],
    bank: PatchBank,
    seeds: list[int],
    labels: list[int] | None,
    schedule: str,
    out: Path,
    settings: dict[str, Any],
    jobs: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Draw, measure, and write report.json and run.json to `out`; the images and the report."""
    with StepBar(len(seeds), sum(contender.steps for contender in contenders.values())) as bar:
        images = comparison.compare(contenders, bank, seeds, labels, schedule, out, settings, bar, jobs)
    report = comparison.report(images, [name for name in contenders if name != comparison.NETWORK], seeds)
    report["labels"] = labels
    if labels is not None:
        images["labels"] = torch.tensor(labels)
    write_json(out / "report.json", report)
    write_json(out / "run.json", settings)
    return images, report


def print_report(report: dict[str, Any]) -> None:
    """The medians with their intervals, a line a machine."""
    enough = len(report["seeds"]) >= _FEWEST_SEEDS
    what = "[95% interval]" if enough else "(too few for an interval)"
    click.echo(f"median over {len(report['seeds'])} seeds, each machine against the network {what}:")
    click.echo(f"{'':12} {'pearson_r':>22} {'pearson_r2':>22} {'r2_score':>22}")
    for machine, medians in report["median"].items():
        figures = []
        for measure in comparison.MEASURES:
            low, high = report["interval_95"][machine][measure]
            figures.append(f"{medians[measure]:.3f}" + f" [{low:.3f}, {high:.3f}]" * enough)
        click.echo(f"{machine.upper():12} " + " ".join(f"{text:>22}" for text in figures))
    for machine, wins in report.get("beats_is", {}).items():
        low, high = wins["interval_95"]
        click.echo(
            f"{machine.upper()} closer to the network than IS: {wins['share']:.0%} of seeds [{low:.0%}, {high:.0%}]"
        )
