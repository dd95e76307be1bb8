"""`pyels bench`: pairs per second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from tqdm import tqdm

import pyels
from pyels.bank import PatchBank
from pyels.cli.machines import PrecisionOptions, record_of_engine
from pyels.cli.options import AT_LEAST_1, command, integers, option
from pyels.cli.settings import DatasetOptions, OutputOptions, ThreadOptions
from pyels.files import write_json
from pyels.machines import ELS, MACHINES
from pyels.studies import bench, costs, plots, resumable

SIZES = "3,5,7,9,11,13,15,17"


@dataclass(frozen=True, kw_only=True)
class Bench(DatasetOptions, PrecisionOptions, ThreadOptions, OutputOptions):
    images: int = option(512, "Images in the bank.", must_be=AT_LEAST_1)
    size: int | None = option(32, "Images are resized to so many pixels.", must_be=AT_LEAST_1, also="--image-size")
    sizes: str = option(SIZES, "Patch sizes.")
    boundary: tuple[str, ...] = option((), "May be repeated.  [default: all]", type=click.Choice(ELS.boundaries))
    batch: int = option(1, "Queries in one call.", must_be=AT_LEAST_1)
    time: float | None = option(
        None,
        "Noise level t of the queries.  [default: where the paper uses the size]",
        must_be=("above 0 and at most 1", lambda time: 0 < time <= 1),
    )
    repeats: int = option(5, "Timings of each method; the median counts.", must_be=AT_LEAST_1)
    seconds: float = option(
        1.0,
        "About how long one timing may take; slow methods run on fewer images.",
        must_be=("above 0 and at most 3600", lambda seconds: 0 < seconds <= 3600),
    )
    machines: str | None = option(
        None,
        f"Instead of all this: seconds of a call of these, of {', '.join(MACHINES)}, at t = "
        f"{', '.join(map(str, costs.TIMES))}, or --time.",
    )
    seed: int = option(0, "Query i gets the noise of seed + i.")
    out: Path = option(Path("pyels-bench"))


@command(Bench)
def bench_command(given: Bench) -> None:
    """Pairs per second of ELS, beside what one would otherwise run.

    That is scaled dot product attention and chunked matrix products in torch, the released code's way (convolution
    with the patches as filters), and KeOps where it is installed. A pair is one query window against one bank patch.
    Every method is compared with the float64 oracle before it is timed. Writes bench.json, bench.png and run.json to
    the output folder. With --machines, what one call of each machine takes, and the first one, which may find what is
    kept for the others; bench.json and run.json.
    """
    given.check_engine("els")
    resumable.check_seeds(given.seed, given.batch)
    count = given.images + given.batch
    loaded = given.read(limit=min(count, given.limit or count), size=given.size)
    if len(loaded) < count:
        raise ValueError(
            f"--images {given.images} and --batch {given.batch} take {count} images, but {given.dataset} has "
            f"{len(loaded)}"
        )
    bank, x0 = loaded[: given.images], loaded.read(slice(given.images, count))
    if given.machines is not None:
        _machines(given, bank, x0)
        return
    settings = given.passed_to(
        bench.Settings,
        sizes=sorted(set(integers("sizes", given.sizes))),
        boundaries=list(dict.fromkeys(given.boundary or ELS.boundaries)),
        threads=given.all_threads,
    )
    bench.check(bank, settings)
    about = {
        "command": "bench",
        "version": pyels.__version__,
        **given.record_of_data(bank),
        "batch": given.batch,
        "settings": asdict(settings),
    }
    given.hold_folder(about, "bench.json", "bench.png", "run.json")
    with tqdm(total=bench.steps(settings), desc="measuring", unit="step", file=sys.stderr) as bar:
        result = {**about, **bench.run(bank, x0, settings, bar.update)}
        write_json(given.out / "run.json", about)
        write_json(given.out / "bench.json", result)
        computer = result["computer"]
        channels, height, width = bank.shape
        plots.draw_rates(
            given.out / "bench.png",
            bench.curves(result, channels),
            f"{given.images} images of {channels}x{height}x{width}, batch {given.batch}; "
            + computer.get("gpu", f"{computer['cpu']}, threads: {computer['threads']}"),
        )
    given.show(result, [*_lines(result), f"picture: {given.out / 'bench.png'}"])


def _machines(given: Bench, bank: PatchBank, x0: Tensor) -> None:
    """Seconds of the machines of --machines."""
    machines = given.machines_of(str(given.machines), bank, given.all_threads)
    if given.boundary or given.sizes != SIZES:
        raise ValueError("--machines names boundaries and has sizes by noise level: leave out --sizes and --boundary")
    times = costs.TIMES if given.time is None else (given.time,)
    about = given.record(**given.record_of_data(bank), times=times, **record_of_engine(bank, *machines.values()))
    given.hold_folder(about, "bench.json", "run.json")
    calls = costs.calls(machines, times, given.repeats)
    with tqdm(total=calls, desc="measuring", unit="call", file=sys.stderr) as bar:
        measured = costs.run(machines, x0, times, given.repeats, given.seed, given.all_threads, bar.update)
    write_json(given.out / "run.json", about)
    write_json(given.out / "bench.json", {**about, **measured})
    given.show({**about, **measured}, costs.table(measured))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield from _rates_table(result["ratios"])
    for record in result["records"]:
        if record["ceiling_share"] is not None:
            share = f"{record['ceiling_share']:.0%} of the GPU's float32 ceiling"
            yield f"k = {record['patch_size']}, {record['boundary']}: {share}"
    top = result["ceilings"]
    yield (
        f"ceilings: {top['multiply_adds_per_second']:.2g} multiply-adds/s, {top['exponentials_per_second']:.2g} "
        f"exponentials/s, {top['copied_bytes_per_second']:.2g} bytes copied/s"
    )


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
