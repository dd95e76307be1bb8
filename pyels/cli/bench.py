"""`pyels bench`: pairs per second."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

import pyels
from pyels.bank import datasets
from pyels.cli.common import (
    check_precision,
    dataset_option,
    describe,
    engine_option,
    integers,
    json_option,
    out_option,
    precision_option,
    threads_option,
    work_in,
)
from pyels.engines import default_threads
from pyels.files import write_json
from pyels.machines import ELS
from pyels.studies import bench, plots, resumable


@click.command("bench")
@dataset_option
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
@engine_option
@precision_option
@threads_option
@out_option("pyels-bench")
@json_option
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
    precision: str,
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
    check_precision("els", engine, precision)
    resumable.check_seeds(seed, batch)
    settings = bench.Settings(
        sizes=sorted(set(integers("--sizes", sizes))),
        boundaries=list(dict.fromkeys(boundaries or ELS.boundaries)),
        time=noise_time,
        repeats=repeats,
        seconds=seconds,
        seed=seed,
        engine=engine,
        precision=precision,
        threads=default_threads() if threads is None else threads,
    )
    loaded = datasets.load(dataset, limit=images + batch, size=image_size)
    if len(loaded) < images + batch:
        raise ValueError(
            f"--images {images} and --batch {batch} take {images + batch} images, but {dataset} has {len(loaded)}"
        )
    bank, x0 = loaded[:images], loaded.read(slice(images, images + batch))
    bench.check(bank, settings)
    work_in(out)
    with tqdm(total=bench.steps(settings), desc="measuring", unit="step", file=sys.stderr) as bar:
        result = {
            "command": "bench",
            "version": pyels.__version__,
            "dataset": dataset if dataset in datasets.NAMES else str(Path(dataset).resolve()),
            "bank": describe(bank),
            "batch": batch,
            "settings": asdict(settings),
            **bench.run(bank, x0, settings, bar.update),
        }
        write_json(out / "bench.json", result)
        computer = result["computer"]
        channels, height, width = bank.shape
        plots.draw_rates(
            out / "bench.png",
            bench.curves(result, channels),
            f"{images} images of {channels}x{height}x{width}, batch {batch}; "
            + computer.get("gpu", f"{computer['cpu']}, threads: {computer['threads']}"),
        )
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for line in _rates_table(result["ratios"]):
        click.echo(line)
    for record in result["records"]:
        if record["ceiling_share"] is not None:
            share = f"{record['ceiling_share']:.0%} of the GPU's float32 ceiling"
            click.echo(f"k = {record['patch_size']}, {record['boundary']}: {share}")
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
