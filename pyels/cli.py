"""The command line: `pyels demo | sample | bench | info`."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

import pyels
from pyels import _core, bench, comparison, datasets, plots, presets, runs
from pyels.engines import AVAILABLE, ENGINES, default_threads
from pyels.files import write_json, write_tensors
from pyels.machines import ELS, ES, IS, LS, Machine
from pyels.sampling import SOLVERS, Step, noise_levels
from pyels.schedules import SCHEDULES, make_schedule

INTERRUPTED = 130

_engine_option = click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
_threads_option = click.option("--threads", type=int, help="Number of threads [default: all CPUs this process may use]")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program: bad input ends it with status 2 and one line on standard error."""
    try:
        sys.exit(program.main(args=arguments, prog_name="pyels", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _fail(str(error) or type(error).__name__)
    except (click.Abort, KeyboardInterrupt):
        click.echo("pyels: interrupted; sample and demo go on after the last finished sample when repeated", err=True)
        sys.exit(INTERRUPTED)


def _fail(message: str) -> None:
    click.echo("pyels: error: " + " ".join(message.split()), err=True)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pyels.__version__, prog_name="pyels")
def program() -> None:
    """What a convolutional diffusion model draws, in closed form."""


# ---- demo ----------------------------------------------------------------------------------------------------------


@program.command()
@click.option("--num", type=int, default=10, show_default=True, help="Number of seeds, classes 0, 1, 2 .. in turn.")
@click.option("--seed", type=int, default=0, show_default=True, help="First seed.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("pyels-demo"), show_default=True)
@_engine_option
@_threads_option
@_json_option
def demo(num: int, seed: int, out: Path, engine: str, threads: int | None, as_json: bool) -> None:
    """A trained network and the machines draw from the same noise.

    Uses the Fashion-MNIST images and the small ResNet that come with the package; needs no network and no training.
    Writes demo.png, report.json, demo.safetensors and run.json to the output folder.
    """
    runs.check_seeds(seed, num)
    bank = datasets.load(datasets.EMBEDDED)
    network, record = comparison.load_demo_network()
    sizes = record["calibration"]["patch_sizes"]
    els = ELS(bank, engine=engine, threads=threads)
    contenders = {
        "network": comparison.Contender(network),
        "els": comparison.Contender(els, sizes),
        "ls": comparison.Contender(LS(bank, engine=engine, threads=threads), sizes),
        "is": comparison.Contender(IS(bank, engine=engine, threads=threads)),
    }
    seeds = [seed + i for i in range(num)]
    labels = [i % 10 for i in range(num)]
    settings = {
        "command": "demo",
        "version": pyels.__version__,
        "network": record["crc32"],
        "bank": _describe(bank),
        "seeds": seeds,
        "labels": labels,
        "patch_sizes": sizes,
        **_engine_settings(els),
    }
    with StepBar(num, len(sizes) * len(contenders)) as bar:
        images = comparison.compare(contenders, bank, seeds, labels, len(sizes), out, settings, bar)
    machines = ["els", "ls", "is"]
    report = comparison.report(images, "network", machines, seeds)
    report["labels"] = labels

    write_tensors(out / "demo.safetensors", {**images, "labels": torch.tensor(labels)})
    write_json(out / "report.json", report)
    write_json(out / "run.json", settings)
    r = {machine: [f"r = {v:.2f}" for v in report["per_seed"][machine]["pearson_r"]] for machine in machines}
    plots.draw_rows(
        out / "demo.png",
        [
            plots.Row("noise", images["noise"] / 2),
            plots.Row("trained\nnetwork", images["network"]),
            plots.Row("ELS machine", images["els"], r["els"]),
            plots.Row("LS machine", images["ls"], r["ls"]),
            plots.Row("IS machine", images["is"], r["is"]),
            plots.Row("nearest\ntraining image", images["nearest"]),
        ],
        [f"seed {s}" for s in seeds],
    )
    runs.finished(out)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"median over {num} seeds, each machine against the trained network:")
    click.echo(f"{'':4} {'pearson_r':>10} {'pearson_r2':>11} {'r2_score':>9}")
    for machine in machines:
        m = report["median"][machine]
        click.echo(f"{machine.upper():4} {m['pearson_r']:10.3f} {m['pearson_r2']:11.3f} {m['r2_score']:9.3f}")
    click.echo(f"ELS closer to the network than IS: {report['els_beats_is']:.0%} of seeds")
    click.echo(f"picture: {out / 'demo.png'}")


# ---- sample --------------------------------------------------------------------------------------------------------


@program.command("sample")
@click.option("--dataset", default=datasets.EMBEDDED, show_default=True, help="A name (see `pyels info`) or a path.")
@click.option("--machine", "kind", type=click.Choice(["is", "es", "ls", "els"]), default="els", show_default=True)
@click.option("--boundary", type=click.Choice(ELS.boundaries), help="Of ELS.  [default: zeros]")
@click.option("--patch-size", type=int, help="One window size for all steps, odd.")
@click.option(
    "--patch-sizes",
    help="One size a step, cleanest first, as 3,3,5,..; a preset's name; or kamb2025[:NAME] to step as the paper's "
    "released code.  [default: the preset of the data set]",
)
@click.option("--steps", type=int, help="Number of steps.  [default: 20, or as many as --patch-sizes]")
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine", show_default=True)
@click.option("--solver", type=click.Choice(SOLVERS), default="ddim", show_default=True)
@click.option("--num", type=int, default=4, show_default=True, help="Number of samples.")
@click.option("--labels", help="Classes, as 0,1,7,9; repeated in turn over the samples.  [default: all images]")
@click.option("--seed", type=int, default=0, show_default=True, help="Sample i is drawn from the noise of seed + i.")
@click.option("--limit", type=int, help="Use only the first so many images.")
@_engine_option
@_threads_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("pyels-samples"), show_default=True)
@_json_option
def sample_command(
    dataset: str,
    kind: str,
    boundary: str | None,
    patch_size: int | None,
    patch_sizes: str | None,
    steps: int | None,
    schedule: str,
    solver: str,
    num: int,
    labels: str | None,
    seed: int,
    limit: int | None,
    engine: str,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Draw samples with a machine.

    Writes samples.png, samples.safetensors (noise, samples, labels) and run.json to the output folder. A run that was
    stopped goes on after its last finished sample when the command is repeated.
    """
    runs.check_seeds(seed, num)
    classes = None if labels is None else _integers("--labels", labels)
    if kind != "els" and boundary is not None:
        raise ValueError(f"--boundary {boundary} was given, but only machine els has one")
    bank = datasets.load(dataset, limit=limit)
    machine = _machine(kind, bank, boundary or "zeros", engine, threads)
    stepping = _stepping(machine, dataset, boundary or "zeros", patch_size, patch_sizes, steps, schedule)
    per_sample = None if classes is None else [classes[i % len(classes)] for i in range(num)]
    for c in set(per_sample or []):
        bank.class_range(c)
    settings: dict[str, Any] = {
        "command": "sample",
        "version": pyels.__version__,
        "dataset": dataset if dataset in datasets.NAMES else str(Path(dataset).resolve()),
        "limit": limit,
        "bank": _describe(bank),
        "machine": kind,
        "boundary": (boundary or "zeros") if kind == "els" else None,
        **stepping,
        "solver": solver,
        "num": num,
        "labels": per_sample,
        "seed": seed,
        **_engine_settings(machine),
    }
    levels = noise_levels(stepping["steps"], make_schedule(schedule), stepping["patch_sizes"])
    evaluations = levels + (levels[1:] if solver == "heun" else [])
    started, pairs = time.perf_counter(), 0

    def one(i: int) -> dict[str, torch.Tensor]:
        nonlocal pairs
        bar.reach(i)
        label = None if per_sample is None else torch.tensor([per_sample[i]])
        noise = runs.noise_of_seed(seed + i, bank.shape)
        drawn = pyels.sample(machine, noise[None], labels=label, solver=solver, callback=bar.step, **stepping)
        pairs += sum(machine.pairs(label, level.patch_size) for level in evaluations)
        return {"noise": noise, "samples": drawn[0]}

    with StepBar(num, len(levels)) as bar:
        images = runs.resumable(out, settings, num, one)
    seconds = time.perf_counter() - started
    if per_sample is not None:
        images["labels"] = torch.tensor(per_sample)
    captions = [f"seed {seed + i}" + (f", class {per_sample[i]}" if per_sample else "") for i in range(num)]
    result = {**settings, "threads": machine.threads, "seconds": round(seconds, 3), "pairs": pairs}
    write_tensors(out / "samples.safetensors", images)
    write_json(out / "run.json", result)
    plots.draw_grid(out / "samples.png", images["samples"], captions)
    runs.finished(out)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        rate = f"{pairs:.3g} pairs, {pairs / seconds:.3g} pairs/s"
        click.echo(f"{num} samples in {seconds:.1f} s ({rate}); picture: {out / 'samples.png'}")


def _machine(kind: str, bank: pyels.PatchBank, boundary: str, engine: str, threads: int | None) -> Machine:
    if kind == "els":
        return ELS(bank, boundary=boundary, engine=engine, threads=threads)
    if kind == "ls":
        return LS(bank, engine=engine, threads=threads)
    return (IS if kind == "is" else ES)(bank, engine=engine, threads=threads)


def _stepping(
    machine: Machine,
    dataset: str,
    boundary: str,
    patch_size: int | None,
    patch_sizes: str | None,
    steps: int | None,
    schedule: str,
) -> dict[str, Any]:
    """steps, schedule and patch_sizes of `pyels.sample`."""
    n = 20 if steps is None else steps
    if n < 1:
        raise ValueError(f"--steps must be at least 1, got {n}")
    if isinstance(machine, (IS, ES)):
        if patch_size is not None or patch_sizes is not None:
            raise ValueError("machines is and es compare whole images: leave out --patch-size and --patch-sizes")
        return {"steps": n, "schedule": schedule, "patch_sizes": None}
    if patch_size is not None and patch_sizes is not None:
        raise ValueError("give either --patch-size or --patch-sizes, not both")
    if patch_size is not None:
        sizes = [patch_size] * n
    elif patch_sizes is not None and re.search(r"^[-+\d]|,", patch_sizes):
        sizes = _integers("--patch-sizes", patch_sizes)
        if steps is not None and steps != len(sizes):
            raise ValueError(f"--patch-sizes has {len(sizes)} entries for {steps} steps; give one for each")
    else:
        released = patch_sizes is not None and patch_sizes.split(":")[0] == "kamb2025"
        name = patch_sizes
        if name is None or name == "kamb2025":
            name = _default_preset(dataset, boundary)
        elif released:
            name = name.removeprefix("kamb2025:")
        sizes = presets.patch_sizes(name, n)
        if released:
            if schedule != "cosine":
                raise ValueError(f"kamb2025 steps with the cosine schedule, but --schedule is {schedule}")
            stepping = presets.kamb2025(name, n)
            _check_sizes(machine, stepping["patch_sizes"])
            return stepping
    _check_sizes(machine, sizes)
    return {"steps": len(sizes), "schedule": schedule, "patch_sizes": sizes}


def _default_preset(dataset: str, boundary: str) -> str:
    base = "fashion-mnist" if dataset == datasets.EMBEDDED else dataset
    padding = "circular" if boundary in ("circular", "interior") else "zeros"
    for name in (f"{base}-resnet-{padding}", f"{base}-resnet-zeros"):
        if name in presets.PATCH_SIZES:
            return name
    raise ValueError(
        f"--patch-size or --patch-sizes is needed for data set {dataset}: give numbers, or one of "
        f"{', '.join(presets.PATCH_SIZES)}"
    )


def _check_sizes(machine: Machine, sizes: Sequence[int]) -> None:
    """Fail on a bad size before anything is written."""
    for k in sizes:
        machine.check_size(k)


# ---- bench ---------------------------------------------------------------------------------------------------------


@program.command("bench")
@click.option("--dataset", default=datasets.EMBEDDED, show_default=True, help="A name (see `pyels info`) or a path.")
@click.option("--images", type=int, default=512, show_default=True, help="Images in the bank.")
@click.option("--image-size", type=int, default=32, show_default=True, help="Images are resized to so many pixels.")
@click.option("--sizes", default="3,5,7,9,11,13,15,17", show_default=True, help="Patch sizes.")
@click.option(
    "--boundary",
    "boundaries",
    type=click.Choice(ELS.boundaries),
    multiple=True,
    help="May be repeated.  [default: all]",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Queries in one call.")
@click.option(
    "--time", "noise_time", type=float, help="Noise level t of the queries.  [default: where the paper uses the size]"
)
@click.option("--repeats", type=int, default=5, show_default=True, help="Timings of each method; the median counts.")
@click.option(
    "--seconds",
    type=float,
    default=1.0,
    show_default=True,
    help="About how long one timing may take; slow methods run on fewer images.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Query i gets the noise of seed + i.")
@_engine_option
@_threads_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("pyels-bench"), show_default=True)
@_json_option
def bench_command(
    dataset: str,
    images: int,
    image_size: int,
    sizes: str,
    boundaries: tuple[str, ...],
    batch: int,
    noise_time: float | None,
    repeats: int,
    seconds: float,
    seed: int,
    engine: str,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Pairs per second of ELS, beside what one would otherwise run.

    That is scaled dot product attention and chunked matrix products in torch, the released code's way (convolution
    with the patches as filters), and KeOps where it is installed. A pair is one query window against one bank patch.
    Every method is compared with the float64 oracle before it is timed. Writes bench.json and bench.png to the output
    folder.
    """
    for option, number in (
        ("--images", images),
        ("--image-size", image_size),
        ("--batch", batch),
        ("--repeats", repeats),
    ):
        if number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    if noise_time is not None and not 0 < noise_time <= 1:
        raise ValueError(f"--time must be above 0 and at most 1, got {noise_time}")
    if not 0 < seconds <= 3600:
        raise ValueError(f"--seconds must be above 0 and at most 3600, got {seconds}")
    runs.check_seeds(seed, batch)
    settings = bench.Settings(
        sizes=sorted(set(_integers("--sizes", sizes))),
        boundaries=list(dict.fromkeys(boundaries or ELS.boundaries)),
        time=noise_time,
        repeats=repeats,
        seconds=seconds,
        seed=seed,
        engine=engine,
        threads=default_threads() if threads is None else threads,
    )
    loaded = datasets.load(dataset, limit=images + batch, size=image_size)
    if len(loaded) < images + batch:
        raise ValueError(
            f"--images {images} and --batch {batch} take {images + batch} images, but {dataset} has {len(loaded)}"
        )
    bank, x0 = loaded[:images], loaded.read(slice(images, images + batch))
    bench.check(bank, settings)
    with (
        runs.result_folder(out),
        tqdm(total=bench.steps(settings), desc="measuring", unit="step", file=sys.stderr) as bar,
    ):
        result = {
            "command": "bench",
            "version": pyels.__version__,
            "dataset": dataset if dataset in datasets.NAMES else str(Path(dataset).resolve()),
            "bank": _describe(bank),
            "batch": batch,
            "settings": asdict(settings),
            **bench.run(bank, x0, settings, bar.update),
        }
        write_json(out / "bench.json", result)
        machine = result["machine"]
        channels, height, width = bank.shape
        plots.draw_rates(
            out / "bench.png",
            bench.curves(result, channels),
            f"{images} images of {channels}x{height}x{width}, batch {batch}; "
            f"{machine['cpu']}, threads: {machine['threads']}",
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for line in _rates_table(result["ratios"]):
        click.echo(line)
    top = result["ceilings"]
    click.echo(
        f"ceilings: {top['multiply_adds_per_second']:.2g} multiply-adds/s, {top['exponentials_per_second']:.2g} "
        f"exponentials/s, {top['copied_bytes_per_second']:.2g} bytes copied/s"
    )
    click.echo(f"picture: {out / 'bench.png'}")


def _rates_table(ratios: dict[str, Any]) -> list[str]:
    boundaries = ratios["boundaries"]
    heads = ("pairs/s", "x best", "x released")
    inexact = False
    lines = [
        f"{'':8} {'best alternative':>17} {'released':>9}" + "".join(f"  |{b:^28}" for b in boundaries),
        f"{'k':>2} {'t':>5} {'method':>8} {'pairs/s':>8} {'pairs/s':>9}"
        + "  |{:>8} {:>8} {:>10}".format(*heads) * len(boundaries),
    ]
    for row in ratios["by_size"]:
        far = not row["best_alternative_error"] <= bench.ALTERNATIVES_WITHIN
        inexact |= far
        line = f"{row['patch_size']:2} {row['time']:5.3f} {row['best_alternative'] + '*' * far:>8}"
        line += f" {row['best_alternative_pairs_per_second']:8.1e} {row['released_way_pairs_per_second']:9.1e}"
        for ours in row["boundaries"].values():
            line += f"  |{ours['pairs_per_second']:8.1e} {ours['over_best_alternative']:8.2f}"
            line += f" {ours['over_released_way']:10.1f}"
        lines.append(line)
    for name, key in (("geometric mean", "geometric_mean"), ("worst", "worst")):
        lines.append(
            f"{name:36}"
            + "".join(
                f"  |{'':8} {b['over_best_alternative'][key]:8.2f} {b['over_released_way'][key]:10.1f}"
                for b in boundaries.values()
            )
        )
    if inexact:
        lines.append(f"* further than {bench.ALTERNATIVES_WITHIN:g} from the float64 oracle")
    return lines


# ---- info ----------------------------------------------------------------------------------------------------------


@program.command()
@click.option("--dataset", help="Describe this data set, by name or path.")
@_json_option
def info(dataset: str | None, as_json: bool) -> None:
    """What this installation can do, or what a data set holds."""
    if dataset is not None:
        bank = datasets.load(dataset)
        counts = {str(c): bank.class_range(c)[1] - bank.class_range(c)[0] for c in bank.classes}
        result: dict[str, Any] = {
            "dataset": dataset,
            "images": len(bank),
            "shape": list(bank.shape),
            "dtype": str(bank.images.dtype).removeprefix("torch."),
            "megabytes": round(bank.images.numel() * bank.images.element_size() / 1e6, 1),
            "images_per_class": counts,
        }
    else:
        result = {
            "pyels": pyels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "engines": list(AVAILABLE),
            "isa": _core.isa_in_use(),
            "isas": _core.available_isas(),
            "threads": default_threads(),
            "datasets": {name: _where(name) for name in datasets.NAMES},
            "presets": list(presets.PATCH_SIZES),
        }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        click.echo(f"{key:17} {value}")


def _where(name: str) -> str:
    if name == datasets.EMBEDDED:
        return "with the package"
    return str(datasets.where(name) or "not here; downloaded when first used")


# ---- helpers -------------------------------------------------------------------------------------------------------


def _describe(bank: pyels.PatchBank) -> dict[str, Any]:
    return {"images": len(bank), "shape": list(bank.shape), "crc32": bank.fingerprint()}


def _engine_settings(machine: Machine) -> dict[str, str]:
    """What the bits of a result depend on, beside its inputs."""
    return {"engine": machine.engine, "isa": _core.isa_in_use()}


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, such as 3,3,5, got {text!r}") from None


class StepBar:
    """Progress in steps of denoisers over `items` samples."""

    def __init__(self, items: int, steps: int) -> None:
        self._bar = tqdm(total=items * steps, desc="sampling", unit="step", file=sys.stderr)
        self._steps = steps

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def reach(self, item: int) -> None:
        """Item number `item` begins; those before it are done, be it in an earlier run."""
        self._bar.update(item * self._steps - self._bar.n)

    def step(self, step: Step) -> None:
        self._bar.update()


if __name__ == "__main__":
    main()
