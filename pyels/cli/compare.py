"""`pyels compare`: machines against a network, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyels import presets
from pyels.bank import PatchBank
from pyels.cli.machines import MachinesOptions, SampledOptions, arguments_of, record_of_engine
from pyels.cli.options import AT_LEAST_1, check, command, integers, option
from pyels.cli.progress import StepBar
from pyels.cli.settings import (
    GuidanceOptions,
    JobOptions,
    LabelOptions,
    NetworkOptions,
    OutputOptions,
    PictureOptions,
    boundary_of,
    check_wiring,
    unit_of,
)
from pyels.denoiser import Denoiser
from pyels.files import write_json, write_tensors
from pyels.studies import comparison, plots, resumable
from pyels.studies.check import SAID, leaves, limit_of, outside

_MOST_PAIRS = 100  # in the picture
_FEWEST_SEEDS = 5  # of which resampling says anything

_RESULTS = ("report.json", "scatter.png", "pairs.png", "matrix.png", "steps.png", "comparison.safetensors", "run.json")


@dataclass(frozen=True, kw_only=True)
class Compare(
    NetworkOptions,
    GuidanceOptions,
    PictureOptions,
    LabelOptions,
    MachinesOptions,
    SampledOptions,
    JobOptions,
    OutputOptions,
):
    steps: str | None = option(
        None,
        "Steps of the machines; several numbers, as 20,10,50, for machines with so many each, which are told what the "
        "first are at the next time.  [default: 20, or as many as --patch-sizes]",
    )
    network_steps: str | None = option(
        None, "Steps of the network, or several numbers, of which the first counts.  [default: as many as the machines]"
    )
    per_step: bool = option(False, "Also compare the estimates at every step.", recorded=False)
    out: Path = option(Path("pyels-comparison"))


@command(Compare)
def compare_command(given: Compare) -> None:
    """Let machines and a network draw from the same noise, and measure how alike they are.

    Writes report.json (pearson_r, its square pearson_r2 and r2_score of every seed, their medians with quartiles and
    95% bootstrap intervals, how often each machine is closer to the network than IS, and pearson_r of all with all),
    scatter.png (as the paper's figure 10), pairs.png (the network's and the first machine's pictures, best to worst),
    matrix.png, comparison.safetensors and run.json; with --per-step also steps.png, what the machines estimate at every
    step, asked at the network's x and along their own trajectory. With engine sampled ELS draws the first ten seeds
    twice, with other dice, and the report says how much of the uncertainty of r comes from these. Of a bank of latents
    all measures are of latents, and the pictures are decoded. A run that was stopped goes on after its last finished
    seed when the command is repeated.
    """
    denoiser, bank, record, of_both = given.load()
    decode = given.decoder(bank)
    jobs, each = given.jobs_and_threads(given.num, bank)
    machines = given.machines_of(given.machines, bank, each, boundary_of(record))
    swept, of_network = _counts("steps", given.steps), _counts("network_steps", given.network_steps)
    told, steps = given.told(machines, swept[0] if swept else None)
    guided = given.guided(denoiser)
    machines = {spec: given.guided(machine) for spec, machine in machines.items()}
    contenders = _contenders(guided, machines, told, [steps, *swept[1:]], of_network or [steps])
    if given.per_step and {one.steps for one in contenders.values()} != {steps}:
        raise ValueError("--per-step compares step by step: give network and machines one number of steps, the same")
    classes = given.classes(guided, bank)
    settings = given.record(
        machines=list(machines),
        schedule=given.schedule,
        guidance=given.guidance,
        boundary=boundary_of(record),
        **arguments_of(told),
        steps=steps if len(swept) < 2 else [steps, *swept[1:]],
        network_steps=of_network[0] if len(of_network) == 1 else of_network or steps,
        seeds=given.seeds,
        labels=classes,
        **({"step_by_step": True} if given.per_step else {}),
        **of_both,
        **record_of_engine(bank, *machines.values()),
    )
    given.hold_folder(settings, *_RESULTS)
    doubts = check_wiring(denoiser, bank)
    images, report = run_comparison(contenders, bank, given.out, settings, jobs, given.schedule, doubts, given.per_step)
    write_tensors(given.out / "comparison.safetensors", images)
    pictures = _draw(given.out, images, report, decode, plots.title_of(settings))
    resumable.finished(given.out)
    given.show(
        report,
        [
            *table(report),
            f"steps: {steps} of the machines, {contenders[comparison.NETWORK].steps} of the network",
            f"pictures: {', '.join(map(str, pictures))}",
        ],
    )


def _counts(name: str, text: str | None) -> list[int]:
    """Numbers of steps."""
    counts = [] if text is None else integers(name, text)
    for count in counts:
        check(name, count, AT_LEAST_1)
    return list(dict.fromkeys(counts))


def _contenders(
    denoiser: Denoiser,
    machines: Mapping[str, Denoiser],
    told: Mapping[str, Sequence[Any]],
    steps: Sequence[int],
    of_network: Sequence[int],
) -> dict[str, comparison.Contender]:
    """By name; what takes other than the first number of steps is called NAME@STEPS."""

    def name(of: str, count: int, first: int) -> str:
        return of if count == first else f"{of}@{count}"

    network = {name(comparison.NETWORK, n, of_network[0]): comparison.Contender(denoiser, n) for n in of_network}
    return network | {
        name(spec, n, steps[0]): comparison.Contender(
            machine, n, {one: presets.at_steps(values, n) for one, values in told.items()}
        )
        for n in steps
        for spec, machine in machines.items()
    }


def _draw(
    out: Path, images: dict[str, Tensor], report: dict[str, Any], decode: Callable[[Tensor], Tensor], title: str
) -> list[Path]:
    """pairs.png, matrix.png, scatter.png where IS is one of several machines, steps.png where steps are compared."""
    of_seeds = {spec: row["pearson_r"] for spec, row in report["per_seed"].items() if not comparison.is_network(spec)}
    seeds, labels, first = report["seeds"], report["labels"], next(iter(of_seeds))
    order = sorted(range(len(seeds)), key=lambda i: -of_seeds[first][i])
    shown = [order[i] for i in torch.linspace(0, len(seeds) - 1, min(len(seeds), _MOST_PAIRS)).round().int().tolist()]
    classes = ["" if labels is None else f", class {labels[i]}" for i in shown]
    pictures = [out / "pairs.png"]
    plots.draw_pairs(
        pictures[0],
        decode(images[comparison.NETWORK][shown]),
        decode(images[first][shown]),
        [f"seed {seeds[i]}{c}\nr = {of_seeds[first][i]:.2f}" for i, c in zip(shown, classes, strict=True)],
        ("network", first.upper()),
        title,
    )
    if "is" in of_seeds and len(of_seeds) > 1:
        pictures.append(out / "scatter.png")
        ideal = of_seeds.pop("is")
        plots.draw_scatter(pictures[1], of_seeds, ideal, title)
    pictures.append(out / "matrix.png")
    plots.draw_matrix(pictures[-1], report["matrix"], title)
    if "per_step" in report:
        pictures.append(out / "steps.png")
        plots.draw_steps(pictures[-1], report["per_step"], title)
    return pictures


def run_comparison(
    contenders: dict[str, comparison.Contender],
    bank: PatchBank,
    out: Path,
    settings: dict[str, Any],
    jobs: int,
    schedule: str = "cosine",
    doubts: Sequence[str] = (),
    per_step: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Draw, measure, and write report.json and run.json to `out`; the images and the report.

    The seeds and labels are those of the settings; `doubts` are those of the network.
    """
    seeds, labels = settings["seeds"], settings["labels"]
    counts = [contender.steps for contender in contenders.values()]
    again = sum(contender.steps for contender in comparison.by_other_dice(contenders).values())
    steps, more = sum(counts) + per_step * sum(counts[1:]), again * min(len(seeds), comparison.DRAWN_AGAIN)
    with StepBar(len(seeds), steps, more=more) as bar:
        images = comparison.compare(contenders, bank, seeds, labels, schedule, out, settings, bar, jobs, per_step)
    report = comparison.report(images, [name for name in contenders if name != comparison.NETWORK], seeds)
    report |= {"labels": labels, "of": unit_of(bank)}
    limit = limit_of(bank)
    report["outside"] = {name: outside(images[name], limit) for name in contenders}
    report["doubts"] = [
        *doubts,
        *(
            leaves(f"{name} leaves", images[name], limit, name == comparison.NETWORK)
            for name, share in report["outside"].items()
            if share >= SAID
        ),
    ]
    if labels is not None:
        images["labels"] = torch.tensor(labels)
    write_json(out / "report.json", report)
    write_json(out / "run.json", settings)
    return images, report


def table(report: dict[str, Any]) -> list[str]:
    """The medians with their intervals, a line a machine."""
    enough = len(report["seeds"]) >= _FEWEST_SEEDS
    what = "[95% interval]" if enough else "(too few for an interval)"
    lines = [
        f"median over {len(report['seeds'])} seeds, {report['of']} of each machine against the network's {what}:",
        f"{'':12} {'pearson_r':>22} {'pearson_r2':>22} {'r2_score':>22}",
    ]
    for machine, medians in report["median"].items():
        figures = []
        for measure in comparison.MEASURES:
            low, high = report["interval_95"][machine][measure]
            figures.append(f"{medians[measure]:.3f}" + f" [{low:.3f}, {high:.3f}]" * enough)
        lines.append(f"{machine.upper():12} " + " ".join(f"{text:>22}" for text in figures))
    for machine, wins in report.get("beats_is", {}).items():
        low, high = wins["interval_95"]
        lines.append(
            f"{machine.upper()} closer to the network than IS: {wins['share']:.0%} of seeds [{low:.0%}, {high:.0%}]"
        )
    for machine, dice in report.get("dice", {}).items():
        lines.append(f"{machine.upper()}: {_of_dice(dice, enough)}")
    matrix = report["matrix"]
    for i, network in enumerate(matrix["names"]):
        if comparison.is_network(network) and network != comparison.NETWORK:
            others = [
                f"{name.upper()} {matrix['median'][i][j]:.3f}"
                for j, name in enumerate(matrix["names"])
                if not comparison.is_network(name)
            ]
            lines.append(f"pearson_r with {network}: {', '.join(others)}")
    return [*lines, *report["doubts"]]


def _of_dice(dice: Mapping[str, Any], enough: bool) -> str:
    low, high = dice["interval_95"]
    sd = f"{dice['sd']:.2g}" + f" [{low:.2g}, {high:.2g}]" * enough
    line, share = (
        f"other dice of its engine move r by {sd} ({dice['seeds']} seeds drawn twice)",
        dice["share_of_median"],
    )
    if enough and share is not None:
        part = f"{share:.0%}" if share > 0.01 else "under 1%"
        line += f", other seeds by {dice['sd_over_seeds']:.2g}; dice make {part} of the variance of the median"
        line += ", within its interval"
    return f"{line}; errors alike for all dice are not in this"
