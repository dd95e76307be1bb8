"""`pyels demo`: the comparison that needs nothing but the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyels import datasets
from pyels.cli.compare import run_comparison, table
from pyels.cli.machines import EngineOptions, record_of_engine
from pyels.cli.options import command, option
from pyels.cli.settings import JobOptions, OutputOptions, SeedOptions, describe
from pyels.files import write_tensors
from pyels.studies import comparison, plots, resumable


@dataclass(frozen=True, kw_only=True)
class Demo(SeedOptions, EngineOptions, JobOptions, OutputOptions):
    num: int = option(10, "Number of seeds; seed s draws class s % 10.")
    out: Path = option(Path("pyels-demo"))


@command(Demo)
def demo_command(given: Demo) -> None:
    """A trained network and the machines draw from the same noise.

    Uses the Fashion-MNIST images and the small ResNet that come with the package; needs no network and no training.
    Writes demo.png, report.json, demo.safetensors and run.json to the output folder.
    """
    bank = datasets.load(datasets.EMBEDDED)
    network, record = comparison.load_demo_network()
    sizes = record["calibration"]["patch_sizes"]
    jobs, each = given.jobs_and_threads(given.num, bank)
    machines = {name: given.machine_of(name, bank, each) for name in ("els", "ls", "is")}
    contenders = {comparison.NETWORK: comparison.Contender(network, len(sizes))}
    for name, machine in machines.items():
        contenders[name] = comparison.Contender(machine, len(sizes), {"patch_size": sizes})
    settings = given.record(
        network=record["crc32"],
        bank=describe(bank),
        seeds=given.seeds,
        labels=[seed % 10 for seed in given.seeds],
        patch_sizes=sizes,
        **record_of_engine(bank, machines["els"]),
    )
    given.hold_folder(settings, "demo.png", "report.json", "demo.safetensors", "run.json")
    images, report = run_comparison(contenders, bank, given.out, settings, jobs)
    images["nearest"] = comparison.nearest_images(bank, images[comparison.NETWORK])
    write_tensors(given.out / "demo.safetensors", images)
    r = {name: [f"r = {v:.2f}" for v in report["per_seed"][name]["pearson_r"]] for name in machines}
    plots.draw_rows(
        given.out / "demo.png",
        [
            plots.Row("noise", images["noise"] / 2),
            plots.Row("trained\nnetwork", images[comparison.NETWORK]),
            *(plots.Row(f"{name.upper()} machine", images[name], r[name]) for name in machines),
            plots.Row("nearest\ntraining image", images["nearest"]),
        ],
        [f"seed {s}" for s in given.seeds],
        plots.title_of({**settings, "network": "the network that comes with pyels", "dataset": datasets.EMBEDDED}),
    )
    resumable.finished(given.out)
    given.show(report, [*table(report), f"picture: {given.out / 'demo.png'}"])
