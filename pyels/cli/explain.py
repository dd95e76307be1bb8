"""`pyels explain`: which patches of which training images a picture is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pyels import explorer, metrics, provenance
from pyels.bank import PatchBank
from pyels.bank.pictures import Look, as_pixels
from pyels.bank.selection import as_numbers
from pyels.cli.machines import SPECS, StepsOptions, arguments_of, record_of_engine
from pyels.cli.options import AT_LEAST_1, command, option
from pyels.cli.progress import StepBar
from pyels.cli.settings import BankOptions, OutputOptions, ThreadOptions, boundary_of, check_wiring
from pyels.denoiser import Denoiser
from pyels.files import path_of, write_json
from pyels.machines import Machine
from pyels.provenance import Attribution, Trace
from pyels.schedules import make_schedule
from pyels.studies import plots, resumable

_RESULTS = ("explorer.html", "trace.safetensors", "report.json", "explained.png", "run.json")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TIME = 0.3


@dataclass(frozen=True, kw_only=True)
class Explain(BankOptions, StepsOptions, ThreadOptions, OutputOptions):
    network: str | None = option(None, "What draws, as compare takes it.  [default: the machine]")
    machine: str = option("els", f"What explains it: of {', '.join(SPECS)} one whose weights are of patches.")
    steps: int | None = option(None, "Number of steps.  [default: 20, or as many as --patch-sizes]", must_be=AT_LEAST_1)
    seed: int = option(0, "Of the noise: the sample is that of sample and compare.")
    label: int | None = option(
        None,
        "Class of the sample, whose images alone then count.  [default: of a network that is told classes, that of the "
        "seed, as compare has it; else all images count]",
    )
    picture: str | None = option(
        None, "A picture of your own in place of a sample: what it is made of under the noise of --time."
    )
    time: float | None = option(
        None,
        f"Of --picture: its noise level, from 0, none, to 1.  [default: {_TIME:g}]",
        must_be=("in (0, 1]", lambda time: 0 < time <= 1),
    )
    top: int = option(8, "How many of the heaviest patches of each pixel are kept.", must_be=AT_LEAST_1)
    out: Path = option(Path("pyels-explained"))


@command(Explain)
def explain_command(given: Explain) -> None:
    """Why this pixel: of which training patches a sample, or a picture of your own, is made.

    Follows a network from noise to image, or a machine, and keeps at every step what the machine's posterior says of
    every pixel. Writes explorer.html, a page to look into it (one file, without a server), explained.png, a still
    picture of it, report.json, with the images that the sample owes most to and how near the nearest is,
    trace.safetensors, for `pyels.provenance`, and run.json.
    """
    resumable.check_seeds(given.seed, 1)
    if given.time is not None and given.picture is None:
        raise ValueError("--time is for --picture")
    denoiser, record = given.use_if_any(given.network)
    bank, data = given.read_bank(record)
    of_network = {} if denoiser is None else {"network": given.fit(denoiser, record, bank)}
    given.tell_torch()
    machine = _machine(given, bank, boundary_of(record))
    told, steps = given.told({given.machine: machine}, given.steps)
    label = _label(given, denoiser, bank)
    x, times = resumable.noise_of_seed(given.seed, bank.shape)[None], list[float]()
    if given.picture is not None:
        if given.steps is not None:
            raise ValueError("--steps is for samples; a --picture is looked at under one noise, that of --time")
        time = _TIME if given.time is None else given.time
        schedule = make_schedule(given.schedule)
        x = schedule.alpha(time) * _picture(given.picture, bank) + schedule.sigma(time) * x
        x, times = x / max(1.0, schedule.sigma(time)), [time]  # as much less as the noise of samples is at first
        told = {name: [values[math.ceil(time * steps) - 1]] for name, values in told.items()}
    settings = given.record(label=label, **arguments_of(told), steps=times or steps, data=data, **of_network)
    settings |= record_of_engine(bank, machine)
    given.hold_folder(settings, *_RESULTS)
    doubts = [] if denoiser is None else check_wiring(denoiser, bank)
    labels = None if label is None else torch.tensor([label])
    with StepBar(1, len(next(iter(told.values()), range(steps))), "explaining") as bar:
        trace = provenance.trace(
            machine, x, times or steps, given.schedule, None, labels, bar.step, told, network=denoiser, top=given.top
        )
    owed = provenance.attribute(trace)
    report = {"command": "explain", "label": label, **_report(trace, owed, bank), "doubts": doubts}
    title = plots.title_of({**settings, "seeds": [given.seed]}) + ("" if label is None else f", {bank.name_of(label)}")
    trace.save(given.out / "trace.safetensors")
    explorer.write_page(given.out / "explorer.html", trace, machine, title=title)
    write_json(given.out / "report.json", report)
    write_json(given.out / "run.json", settings)
    plots.draw_explained(given.out / "explained.png", trace, owed, bank, title)
    given.show(report, [*_table(report), f"page: {given.out / 'explorer.html'}", f"picture: {given.out / _RESULTS[3]}"])


def _machine(given: Explain, bank: PatchBank, boundary: str) -> Machine:
    machines = given.machines_of(given.machine, bank, given.threads, boundary)
    (machine,) = machines.values() if len(machines) == 1 else (None,)
    if not isinstance(machine, Machine):
        raise ValueError(f"--machine must be one whose answers are weighted means of patches, got {given.machine}")
    return machine


def _label(given: Explain, denoiser: Denoiser | None, bank: PatchBank) -> int | None:
    if given.label is not None:
        bank.class_range(given.label)
    elif getattr(denoiser, "conditional", False):
        if bank.labels is not None:
            return int(bank.classes[given.seed % len(bank.classes)])
        if getattr(denoiser, "null_label", None) is None:
            raise ValueError("the network is class-conditional, but the data set has no labels")
    return given.label


def _picture(name: str, bank: PatchBank) -> Tensor:
    """A picture as an image of the bank, (1, C, H, W)."""
    path = path_of(name)
    if bank.latents is not None or bank.shape[0] not in _MODES:
        raise ValueError(f"--picture is of pixels in grey or colour, but the bank holds images of shape {bank.shape}")
    try:
        with Image.open(path) as image:
            pixels = torch.from_numpy(as_pixels(str(path), image, Look(mode=_MODES[bank.shape[0]])).copy())
    except OSError as error:
        raise ValueError(f"--picture {path}: not a readable picture ({error})") from error
    if tuple(pixels.shape) != tuple(bank.shape):
        ours, theirs = ("x".join(map(str, shape[1:])) for shape in (pixels.shape, bank.shape))
        raise ValueError(f"--picture {path} has {ours} pixels, but the bank's images have {theirs}: resize it first")
    return PatchBank(pixels[None]).read(slice(0, 1))


def _report(trace: Trace, owed: Attribution, bank: PatchBank) -> dict[str, Any]:
    nearest = metrics.nearest_image(trace.sample, bank)
    classes = None if bank.labels is None else bank.labels[as_numbers(owed.image[0])].tolist()
    pairs = zip(owed.image[0].tolist(), owed.share[0].tolist(), strict=True)
    steps = []
    for i, level in enumerate(trace.levels):
        row = {
            "t": level.t,
            "alpha": level.alpha,
            "sigma": level.sigma,
            **level.told,
            "counts": float(owed.steps[i, 0]),
        }
        row |= {"entropy": float(trace.entropy[i].mean()), "log_evidence": float(trace.log_evidence[i].mean())}
        if trace.network_x0 is not None:
            row["mse_of_machine_and_network"] = float(metrics.mse(trace.network_x0[i], trace.x0[i]))
        steps.append(row)
    return {
        "owed_to": [
            {"image": image, "share": share, **({} if classes is None else {"class": classes[j]})}
            for j, (image, share) in enumerate(pairs)
        ],
        "nearest": {"image": int(nearest.image), "mse": float(nearest.mse)},
        "steps": steps,
    }


def _table(report: dict[str, Any]) -> list[str]:
    lines = ["the sample owes most to (share of all weight, over all steps):"]
    for one in report["owed_to"]:
        lines.append(
            f"image {one['image']:>8}  {one['share']:.3%}" + (f"  class {one['class']}" if "class" in one else "")
        )
    nearest = report["nearest"]
    return [
        *lines,
        f"nearest image: {nearest['image']}, mean squared difference {nearest['mse']:.4g}",
        *report["doubts"],
    ]
