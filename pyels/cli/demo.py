"""`pyels demo`: the comparison that needs nothing but the package."""

from __future__ import annotations

import json
from pathlib import Path

import click

import pyels
from pyels.bank import datasets
from pyels.cli.common import (
    describe,
    engine_option,
    engine_settings,
    jobs_option,
    json_option,
    make_machine,
    out_option,
    split_threads,
    threads_option,
    work_in,
)
from pyels.cli.compare import print_report, run_comparison
from pyels.files import write_tensors
from pyels.studies import comparison, plots, resumable


@click.command("demo")
@click.option("--num", type=int, default=10, show_default=True, help="Number of seeds; seed s draws class s % 10.")
@click.option("--seed", type=int, default=0, show_default=True, help="First seed.")
@out_option("pyels-demo")
@engine_option
@threads_option
@jobs_option
@json_option
def demo_command(
    num: int, seed: int, out: Path, engine: str, threads: int | None, jobs: int | None, as_json: bool
) -> None:
    """A trained network and the machines draw from the same noise.

    Uses the Fashion-MNIST images and the small ResNet that come with the package; needs no network and no training.
    Writes demo.png, report.json, demo.safetensors and run.json to the output folder.
    """
    resumable.check_seeds(seed, num)
    bank = datasets.load(datasets.EMBEDDED)
    network, record = comparison.load_demo_network()
    sizes = record["calibration"]["patch_sizes"]
    jobs, each = split_threads(jobs, threads, num, bank)
    machines = {kind: make_machine(kind, bank, "zeros", engine, each) for kind in ("els", "ls", "is")}
    contenders = {comparison.NETWORK: comparison.Contender(network, len(sizes))}
    for kind, machine in machines.items():
        contenders[kind] = comparison.Contender(machine, len(sizes), None if kind == "is" else sizes)
    seeds = [seed + i for i in range(num)]
    labels = [s % 10 for s in seeds]
    settings = {
        "command": "demo",
        "version": pyels.__version__,
        "network": record["crc32"],
        "bank": describe(bank),
        "seeds": seeds,
        "labels": labels,
        "patch_sizes": sizes,
        **engine_settings(machines["els"]),
    }
    work_in(out)
    images, report = run_comparison(contenders, bank, seeds, labels, "cosine", out, settings, jobs)
    images["nearest"] = comparison.nearest_images(bank, images[comparison.NETWORK])
    write_tensors(out / "demo.safetensors", images)
    r = {m: [f"r = {v:.2f}" for v in report["per_seed"][m]["pearson_r"]] for m in machines}
    plots.draw_rows(
        out / "demo.png",
        [
            plots.Row("noise", images["noise"] / 2),
            plots.Row("trained\nnetwork", images[comparison.NETWORK]),
            plots.Row("ELS machine", images["els"], r["els"]),
            plots.Row("LS machine", images["ls"], r["ls"]),
            plots.Row("IS machine", images["is"], r["is"]),
            plots.Row("nearest\ntraining image", images["nearest"]),
        ],
        [f"seed {s}" for s in seeds],
    )
    resumable.finished(out)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    print_report(report)
    click.echo(f"picture: {out / 'demo.png'}")
