"""`pyels calibrate`: the patch sizes at which a machine agrees best with a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import torch

from pyels.cli.common import (
    StepBar,
    boundary_of,
    check_sizes,
    classes_of_seeds,
    engine_option,
    engine_settings,
    integers,
    jobs_option,
    json_option,
    load_network_and_bank,
    make_machine,
    network_options,
    out_option,
    seeds_labels_option,
    split_threads,
    threads_option,
    work_in,
)
from pyels.files import write_json, write_tensors
from pyels.machines import ELS
from pyels.sampling import Step
from pyels.schedules import SCHEDULES
from pyels.studies import plots, resumable
from pyels.studies.calibration import Calibration, calibrate


@click.command("calibrate")
@network_options
@click.option("--machine", "kind", type=click.Choice(["els", "ls"]), default="els", show_default=True)
@click.option("--boundary", type=click.Choice(ELS.boundaries), help="Of ELS.  [default: as the network's padding]")
@click.option("--sizes", help="Patch sizes to try.  [default: 3,5,..,17, for a UNet 3,5,..,27, as far as they fit]")
@click.option("--steps", type=int, default=20, show_default=True, help="Steps of the network's trajectories.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine", show_default=True)
@click.option("--num", type=int, default=30, show_default=True, help="Number of trajectories.")
@seeds_labels_option
@click.option(
    "--seed", type=int, default=1_000_000, show_default=True, help="First seed; none that is compared later, please."
)
@engine_option
@threads_option
@jobs_option
@out_option("pyels-calibration")
@json_option
def calibrate_command(
    source: str,
    dataset: str | None,
    limit: int | None,
    size: int | None,
    memory_limit: str | None,
    kind: str,
    boundary: str | None,
    sizes: str | None,
    steps: int,
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
    """Find the patch size of every step for a network.

    Follows the network's own trajectories from noise to image, and compares its estimates at each step with those of
    the machine at every patch size (the paper's section 4). Writes scales.json (the sizes with the largest median
    cosine similarity, and every size's scores at every step; --patch-sizes of sample and compare takes it),
    calibration.png (as the paper's figure 4b), receptive_field.png (figure 4a: the gradient of the network's centre
    pixel, and the calibrated size), calibration.safetensors (each sample's scores and gradients) and run.json. A run
    that was stopped goes on after its last finished trajectory when the command is repeated.
    """
    resumable.check_seeds(seed, num)
    if kind != "els" and boundary is not None:
        raise ValueError(f"--boundary {boundary} was given, but only machine els has one")
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    denoiser, bank, record, settings = load_network_and_bank(source, dataset, limit, size, memory_limit)
    boundary = boundary or boundary_of(record)
    jobs, each = split_threads(jobs, threads, num, bank)
    machine = make_machine(kind, bank, boundary, engine, each)
    if sizes is None:
        largest = 27 if record.get("kind") == "UNet" else 17
        tried = list(range(3, 1 + (min(largest, *bank.shape[1:]) if machine.definition.wraps else largest), 2))
    else:
        tried = sorted(set(integers("--sizes", sizes)))
    check_sizes(machine, tried)
    seeds = [seed + i for i in range(num)]
    classes = classes_of_seeds(labels, denoiser, bank, seeds)
    settings = {
        "command": "calibrate",
        **settings,
        "machine": kind,
        "boundary": boundary if kind == "els" else None,
        "sizes": tried,
        "steps": steps,
        "schedule": schedule,
        "seeds": seeds,
        "labels": classes,
        **engine_settings(machine),
    }

    def one(i: int, on_step: Callable[[Step], None]) -> dict[str, torch.Tensor]:
        noise = resumable.noise_of_seed(seeds[i], bank.shape)[None]
        label = None if classes is None else torch.tensor([classes[i]])
        found = calibrate(denoiser, machine, noise, label, tried, steps, schedule, on_step)
        tensors = {"times": torch.tensor(found.times, dtype=torch.float64), "cosines": found.cosines[0]}
        tensors["mses"] = found.mses[0]
        if found.gradients is not None:
            tensors["gradients"] = found.gradients[0]
        return tensors

    work_in(out)
    resumable.check_finished(out, settings)
    with StepBar(num, steps, "calibrating") as bar:
        samples = resumable.resumable(out, settings, num, one, bar, jobs)
    write_tensors(out / "calibration.safetensors", samples)
    times = samples.pop("times")[0].tolist()
    calibration = Calibration(times, tried, **samples)
    result = {**settings, **calibration.record()}
    write_json(out / "run.json", settings)
    write_json(out / "scales.json", result)
    plots.draw_calibration(out / "calibration.png", calibration)
    pictures = [out / "calibration.png"]
    if calibration.gradients is not None:
        pictures.append(out / "receptive_field.png")
        plots.draw_receptive_field(pictures[-1], calibration.gradients.mean(dim=0), times, calibration.patch_sizes)
    else:
        click.echo("no receptive_field.png: torch cannot differentiate this network", err=True)
    resumable.finished(out)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{'t':>6} {'patch size':>10} {'cosine':>8} {'by squared error':>17}")
    for i, t in enumerate(calibration.times):
        best = float(calibration.cosine[i].max())
        click.echo(f"{t:6.3f} {calibration.patch_sizes[i]:10} {best:8.4f} {calibration.patch_sizes_by_mse[i]:17}")
    if tried[-1] in calibration.patch_sizes[:-1]:
        click.echo(f"the largest size tried, {tried[-1]}, was the best one at some steps: larger --sizes may do better")
    click.echo(f"sizes: {out / 'scales.json'}; pictures: {', '.join(map(str, pictures))}")
