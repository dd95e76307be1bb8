"""`pyels calibrate`: the patch sizes, or thresholds or widths, at which a machine agrees best with a network, or that
a rule finds without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from pyels.cli.machines import (
    BOUNDARIES,
    CALIBRATED,
    DEFAULT_STEPS,
    WINDOWS,
    EngineOptions,
    record_of_engine,
    told_in_file,
)
from pyels.cli.options import AT_LEAST_1, command, option, values_of
from pyels.cli.progress import StepBar
from pyels.cli.settings import BankOptions, JobOptions, LabelOptions, OutputOptions, boundary_of, check_wiring
from pyels.denoiser import Denoiser
from pyels.engines.sampled import Sampled
from pyels.files import path_of, write_json, write_tensors
from pyels.machines import Machine
from pyels.networks import KINDS, NETWORKS, Network
from pyels.records import read_record
from pyels.sampling import Step, noise_levels
from pyels.schedules import SCHEDULES, make_schedule
from pyels.studies import plots, resumable
from pyels.studies.calibration import TRIED, Calibration, calibrate, fitting
from pyels.studies.comparison import NETWORK
from pyels.studies.rules import RULES, SHARE, Scores, scores

_FURTHER = [
    f"for a {kind.__name__} 3,5,..,{kind.LARGEST_SIZE}, "
    for kind in NETWORKS.values()
    if kind.LARGEST_SIZE != Network.LARGEST_SIZE
]

IMAGES = 2000  # by default; what more would change: docs/networks.md

_RESULTS = ("scales.json", "calibration.png", "receptive_field.png", "calibration.safetensors", "run.json")


@dataclass(frozen=True, kw_only=True)
class Calibrate(BankOptions, LabelOptions, EngineOptions, JobOptions, OutputOptions):
    network: str | None = option(None, "As compare takes it; needed by --rule network.")
    rule: str = option(
        NETWORK,
        "What a size has to do: agree best with a network; or, without one, bring the posterior's entropy down to a "
        "--share of its largest, or have the least error on images of the data set that are left out of the bank in "
        "turn, or the least estimate of it (SURE).",
        type=click.Choice([NETWORK, *RULES]),
    )
    share: float = option(SHARE, "Of --rule entropy.", must_be=("in (0, 1]", lambda share: 0 < share <= 1))
    machine: str = option("els", type=click.Choice(CALIBRATED))
    boundary: str | None = option(None, "Of ELS.  [default: as the network's padding]", type=click.Choice(BOUNDARIES))
    window: str | None = option(None, "Of ELS and LS.  [default: square]", type=click.Choice(WINDOWS))
    sizes: str | None = option(
        None,
        "Patch sizes to try, of pca and golden thresholds, of Gaussian windows widths.  "
        f"[default: 3,5,..,{Network.LARGEST_SIZE}, {''.join(_FURTHER)}as far as they fit; "
        f"{','.join(map(str, TRIED['threshold']))}; {','.join(map(str, TRIED['width']))}]",
    )
    steps: int = option(DEFAULT_STEPS, "Steps of the trajectories.", must_be=AT_LEAST_1)
    schedule: str = option("cosine", type=click.Choice(SCHEDULES))
    num: int = option(30, "Number of trajectories, or of images.")
    images: int | None = option(
        None,
        "Look at so many, at random of those that a trajectory draws on; 0: at all.  "
        f"[default: {IMAGES} of ELS with an exact engine, which takes longest, else 0]",
        must_be=("at least 0", lambda images: images >= 0),
    )
    seed: int = option(1_000_000, "First seed; none that is compared later, please.")
    beside: tuple[str, ...] = option(
        (),
        "An earlier calibration, its folder or scales.json, whose best sizes are drawn beside these; may be repeated.",
        type=str,
        recorded=False,
    )
    out: Path = option(Path("pyels-calibration"))


@command(Calibrate)
def calibrate_command(given: Calibrate) -> None:
    """Find the patch size of every step for a network, or the threshold or width, where a machine has that.

    Follows the network's own trajectories from noise to image, and compares its estimates at each step with those of
    the machine at every patch size (the paper's section 4). Writes scales.json (the sizes with the largest median
    cosine similarity, and every size's scores at every step; --patch-sizes of sample and compare takes it),
    calibration.png (as the paper's figure 4b), receptive_field.png (figure 4a: the gradient of the network's centre
    pixel, and the calibrated size), calibration.safetensors (each sample's scores and gradients) and run.json. A run
    that was stopped goes on after its last finished trajectory when the command is repeated.

    The other rules need no network; one that is given says what the bank is, and which boundary, alone.
    """
    if given.network is None and given.rule == NETWORK:
        raise ValueError(f"--network is needed, or one of --rule {', '.join(RULES)}")
    if given.rule != "entropy" and given.share != SHARE:
        raise ValueError(f"--share {given.share:g} is for --rule entropy")
    denoiser, record = given.use_if_any(given.network)
    bank, data = given.read_bank(record)
    of_both = {"data": data}
    if denoiser is not None:
        of_both["network"] = given.fit(denoiser, record, bank)
    jobs, each = given.jobs_and_threads(given.num, bank)
    machine = given.machine_of(given.machine, bank, each, given.boundary, boundary_of(record), given.window)
    sizes = _sizes(given.sizes, machine, record)
    images = _images(given, machine)
    beside = _beside(given, str(machine.parameter))
    classes = given.classes(denoiser if given.rule == NETWORK else None, bank)
    settings = given.record(
        boundary=getattr(machine, "boundary", None),
        sizes=sizes,
        images=images,
        seeds=given.seeds,
        labels=classes,
        **of_both,
        **record_of_engine(bank, machine),
    )

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        label = None if classes is None else torch.tensor([classes[i]])
        if given.rule != NETWORK:
            assert isinstance(machine, Machine)
            of_rule = machine, given.seeds[i], label, sizes, given.steps, given.schedule, on_step, given.share
            return {"scores": scores(given.rule, *of_rule)}
        assert denoiser is not None
        noise = resumable.noise_of_seed(given.seeds[i], bank.shape)[None]
        along = sizes, given.steps, given.schedule, on_step, images or None, given.seeds[i]
        found = calibrate(denoiser, machine, noise, label, *along)
        tensors = {"cosines": found.cosines[0], "mses": found.mses[0]}
        if found.gradients is not None:
            tensors["gradients"] = found.gradients[0]
        return tensors

    if given.rule != NETWORK and not isinstance(machine, Machine):
        raise ValueError(f"--rule {given.rule} is of machines that have a posterior; {given.machine} has none")
    if given.rule == "sure" and isinstance(machine, Machine) and machine.definition.fold is not None:
        raise ValueError(f"--rule sure needs the variance of what answers, which the fold of {given.machine} mixes")
    given.hold_folder(settings, *_RESULTS)
    doubts = [] if denoiser is None or given.rule != NETWORK else check_wiring(denoiser, bank)
    with StepBar(given.num, given.steps, "calibrating") as bar:
        samples = resumable.resumable(given.out, settings, given.num, one, bar, jobs)
    write_tensors(given.out / "calibration.safetensors", samples)
    times = [level.t for level in reversed(noise_levels(given.steps, make_schedule(given.schedule)))]
    found: Calibration | Scores
    if given.rule == NETWORK:
        found = Calibration(times, sizes, **samples, parameter=str(machine.parameter))
    else:
        found = Scores(given.rule, times, sizes, samples["scores"], str(machine.parameter), given.share)
    there = int(bank.select(classes).counts.max())
    drawn = {"images": images, "of": there} if images and images < there else None
    result = {**settings, **found.record(), "drawn": drawn, "doubts": doubts}
    write_json(given.out / "run.json", settings)
    write_json(given.out / "scales.json", result)
    pictures = _draw(given, found, beside, plots.title_of(settings))
    resumable.finished(given.out)
    lines = _table(found)
    if drawn:
        lines.append(f"by {images} images at random, of up to {there} that a trajectory draws on; --images 0: by all")
    given.show(result, [*lines, f"sizes: {given.out / 'scales.json'}; pictures: {pictures}"])


def _sizes(text: str | None, machine: Denoiser, record: Mapping[str, Any]) -> list[Any]:
    """Those to try, ascending."""
    parameter = str(machine.parameter)
    if text is not None:
        return [machine.check_wish(parameter, size) for size in sorted(set(values_of("sizes", text, parameter)))]
    if parameter != "patch_size":
        return fitting(machine, TRIED[parameter])
    largest = KINDS.get(str(record.get("kind")), Network).LARGEST_SIZE
    return fitting(machine, range(3, largest + 1, 2))


def _images(given: Calibrate, machine: Denoiser) -> int | None:
    """How many decide; 0: all, None: of rules, which know no share."""
    by_index = isinstance(getattr(machine, "engine", None), Sampled)
    if given.images and (given.rule != NETWORK or by_index):
        raise ValueError(
            f"--images {given.images} is for --rule network and exact engines: what others say depends on all images"
        )
    if given.rule != NETWORK:
        return None
    if given.images is not None:
        return given.images
    return 0 if by_index or getattr(machine, "boundary", None) is None else IMAGES


def _beside(given: Calibrate, parameter: str) -> dict[str, list[Any]]:
    """The best values of other calibrations, by what they were found by and where they are."""
    values = {}
    for text in given.beside:
        path = path_of(text)
        path = path if path.suffix == ".json" else path / "scales.json"
        name, values_there = told_in_file(path, given.schedule)
        if (name, len(values_there)) != (parameter, given.steps):
            raise ValueError(
                f"--beside {text} has a {name} for each of {len(values_there)} steps, but here are a {parameter} and "
                f"{given.steps} steps"
            )
        rule = read_record(path, {"rule?": str}, "a scales.json").get("rule", NETWORK)
        values[f"{rule} ({text})"] = values_there
    return values


def _draw(given: Calibrate, found: Calibration | Scores, beside: Mapping[str, list[Any]], title: str) -> str:
    """The names of the pictures."""
    pictures, schedule = [given.out / "calibration.png"], make_schedule(given.schedule)
    plots.draw_calibration(pictures[0], found, schedule, title, beside)
    if isinstance(found, Scores):
        return str(pictures[0])
    if found.gradients is not None:
        pictures.append(given.out / "receptive_field.png")
        gradient = found.gradients.mean(dim=0)
        squares = found.best if found.parameter == "patch_size" else None
        plots.draw_receptive_field(pictures[1], gradient, found.times, squares, schedule, title)
    else:
        click.echo("no receptive_field.png: torch cannot differentiate this network", err=True)
    return ", ".join(map(str, pictures))


def _table(found: Calibration | Scores) -> list[str]:
    name, largest = found.parameter.replace("_", " "), found.sizes[-1]
    if isinstance(found, Scores):
        lines = [f"{'t':>6} {name:>10} {found.rule:>10}"]
        for i, (t, best) in enumerate(zip(found.times, found.best, strict=True)):
            lines.append(f"{t:6.3f} {best:10} {float(found.score[i, found.sizes.index(best)]):10.4g}")
    else:
        lines = [
            f"{name} by the median cosine of machine's and network's noise estimates, and by their squared error:",
            f"{'t':>6} {name:>10} {'cosine':>8} {'by squared error':>17}",
        ]
        for i, t in enumerate(found.times):
            best = float(found.cosine[i].max())
            lines.append(f"{t:6.3f} {found.best[i]:10} {best:8.4f} {found.best_by_mse[i]:17}")
    if largest in found.best[:-1]:
        lines.append(f"the largest size tried, {largest}, was the best one at some steps: larger --sizes may do better")
    return lines
