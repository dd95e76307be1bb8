"""`pyels calibrate`: the patch sizes, or thresholds or widths, at which a machine agrees best with a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from pyels.cli.options import AT_LEAST_1, command, option
from pyels.cli.progress import StepBar
from pyels.cli.settings import (
    BOUNDARIES,
    CALIBRATED,
    DEFAULT_STEPS,
    WINDOWS,
    EngineOptions,
    JobOptions,
    LabelOptions,
    NetworkOptions,
    OutputOptions,
    boundary_of,
    check_wiring,
    record_of_engine,
    values_of,
)
from pyels.denoiser import Denoiser
from pyels.files import write_json, write_tensors
from pyels.networks import KINDS, NETWORKS, Network
from pyels.sampling import Step
from pyels.schedules import SCHEDULES, make_schedule
from pyels.studies import plots, resumable
from pyels.studies.calibration import TRIED, Calibration, calibrate, fitting

_FURTHER = [
    f"for a {kind.__name__} 3,5,..,{kind.LARGEST_SIZE}, "
    for kind in NETWORKS.values()
    if kind.LARGEST_SIZE != Network.LARGEST_SIZE
]

_RESULTS = ("scales.json", "calibration.png", "receptive_field.png", "calibration.safetensors", "run.json")


@dataclass(frozen=True, kw_only=True)
class Calibrate(NetworkOptions, LabelOptions, EngineOptions, JobOptions, OutputOptions):
    machine: str = option("els", type=click.Choice(CALIBRATED))
    boundary: str | None = option(None, "Of ELS.  [default: as the network's padding]", type=click.Choice(BOUNDARIES))
    window: str | None = option(None, "Of ELS and LS.  [default: square]", type=click.Choice(WINDOWS))
    sizes: str | None = option(
        None,
        "Patch sizes to try, of pca and golden thresholds, of Gaussian windows widths.  "
        f"[default: 3,5,..,{Network.LARGEST_SIZE}, {''.join(_FURTHER)}as far as they fit; "
        f"{','.join(map(str, TRIED['threshold']))}; {','.join(map(str, TRIED['width']))}]",
    )
    steps: int = option(DEFAULT_STEPS, "Steps of the network's trajectories.", must_be=AT_LEAST_1)
    schedule: str = option("cosine", type=click.Choice(SCHEDULES))
    num: int = option(30, "Number of trajectories.")
    seed: int = option(1_000_000, "First seed; none that is compared later, please.")
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
    """
    denoiser, bank, record, of_both = given.load()
    jobs, each = given.share(given.num, bank)
    machine = given.machine_of(given.machine, bank, each, given.boundary, boundary_of(record), given.window)
    sizes = _sizes(given.sizes, machine, record)
    classes = given.classes(denoiser, bank)
    settings = given.record(
        boundary=getattr(machine, "boundary", None),
        sizes=sizes,
        seeds=given.seeds,
        labels=classes,
        **of_both,
        **record_of_engine(bank, machine),
    )

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        noise = resumable.noise_of_seed(given.seeds[i], bank.shape)[None]
        label = None if classes is None else torch.tensor([classes[i]])
        found = calibrate(denoiser, machine, noise, label, sizes, given.steps, given.schedule, on_step)
        tensors = {"times": torch.tensor(found.times, dtype=torch.float64), "cosines": found.cosines[0]}
        tensors["mses"] = found.mses[0]
        if found.gradients is not None:
            tensors["gradients"] = found.gradients[0]
        return tensors

    given.hold_folder(settings, *_RESULTS)
    doubts = check_wiring(denoiser, bank)
    with StepBar(given.num, given.steps, "calibrating") as bar:
        samples = resumable.resumable(given.out, settings, given.num, one, bar, jobs)
    write_tensors(given.out / "calibration.safetensors", samples)
    times = samples.pop("times")[0].tolist()
    calibration = Calibration(times, sizes, **samples, parameter=str(machine.parameter))
    result = {**settings, **calibration.record(), "doubts": doubts}
    write_json(given.out / "run.json", settings)
    write_json(given.out / "scales.json", result)
    pictures = _draw(given, calibration, plots.title_of(settings))
    resumable.finished(given.out)
    given.show(result, [*_table(calibration), f"sizes: {given.out / 'scales.json'}; pictures: {pictures}"])


def _sizes(text: str | None, machine: Denoiser, record: Mapping[str, Any]) -> list[Any]:
    """Those to try, ascending."""
    parameter = str(machine.parameter)
    if text is not None:
        return [machine.check_wish(parameter, size) for size in sorted(set(values_of("sizes", text, parameter)))]
    if parameter != "patch_size":
        return fitting(machine, TRIED[parameter])
    largest = KINDS.get(str(record.get("kind")), Network).LARGEST_SIZE
    return fitting(machine, range(3, largest + 1, 2))


def _draw(given: Calibrate, calibration: Calibration, title: str) -> str:
    """The names of the pictures."""
    pictures, schedule = [given.out / "calibration.png"], make_schedule(given.schedule)
    plots.draw_calibration(pictures[0], calibration, schedule, title)
    if calibration.gradients is not None:
        pictures.append(given.out / "receptive_field.png")
        gradient = calibration.gradients.mean(dim=0)
        squares = calibration.best if calibration.parameter == "patch_size" else None
        plots.draw_receptive_field(pictures[1], gradient, calibration.times, squares, schedule, title)
    else:
        click.echo("no receptive_field.png: torch cannot differentiate this network", err=True)
    return ", ".join(map(str, pictures))


def _table(calibration: Calibration) -> list[str]:
    lines = [f"{'t':>6} {calibration.parameter.replace('_', ' '):>10} {'cosine':>8} {'by squared error':>17}"]
    for i, t in enumerate(calibration.times):
        best = float(calibration.cosine[i].max())
        lines.append(f"{t:6.3f} {calibration.best[i]:10} {best:8.4f} {calibration.best_by_mse[i]:17}")
    largest = calibration.sizes[-1]
    if largest in calibration.best[:-1]:
        lines.append(f"the largest size tried, {largest}, was the best one at some steps: larger --sizes may do better")
    return lines
