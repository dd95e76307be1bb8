"""Draw docs/denoisers_levels.png and docs/denoisers_samples.png: every named machine, beside a network.

    python tools/denoisers.py [--num 6] [--out docs]

The first has the same picture under the same noise at five noise levels, denoised by all; the second what all draw from
the same noise, with Pearson's r between machine and network. The network is the one that comes with pyels, the images
are those it was trained on, and windows that have a size have the one calibrated to it.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import pyels
from pyels.cli.progress import StepBar
from pyels.machines import MACHINES
from pyels.schedules import make_schedule
from pyels.studies import comparison, plots, resumable

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--num", type=int, default=6, help="seeds of the second picture")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()

    bank = pyels.datasets.load(pyels.datasets.EMBEDDED)
    network, record = comparison.load_demo_network()
    machines = {name: MACHINES[name](bank) for name in options.machines.split(",")}
    sizes = record["calibration"]["patch_sizes"]
    draw_levels(options.out / "denoisers_levels.png", bank, network, machines, sizes)
    draw_samples(options.out / "denoisers_samples.png", bank, network, machines, sizes, options.num)


def draw_levels(path, bank, network, machines, sizes):
    schedule = make_schedule("cosine")
    noise, noise_of_picture = (resumable.noise_of_seed(seed, bank.shape)[None] for seed in (0, 1))
    labels = [0] if network.conditional else None  # machines then draw on the images of that class
    x0 = pyels.sample(network, noise_of_picture, len(sizes), labels=labels)  # a picture that is in no bank
    rows = {"noisy": [], "network": [], **{name: [] for name in machines}}
    for t in TIMES:
        level = schedule.alpha(t), schedule.sigma(t)
        x = level[0] * x0 + level[1] * noise
        rows["noisy"].append(x.clamp(-1, 1))
        rows["network"].append(network.denoise(x, *level, labels))
        for name, machine in machines.items():
            size = sizes[round(t * len(sizes)) - 1] if machine.parameter == "patch_size" else None
            rows[name].append(machine.denoise(x, *level, labels, patch_size=size))
    drawn = [plots.Row(name, torch.cat(images)) for name, images in rows.items()]
    plots.draw_rows(path, drawn, [f"t = {t:g}" for t in TIMES])


def draw_samples(path, bank, network, machines, sizes, num):
    contenders = {comparison.NETWORK: comparison.Contender(network, len(sizes))}
    for name, machine in machines.items():
        contenders[name] = comparison.Contender(machine, len(sizes), {"patch_size": sizes})
    seeds = list(range(num))
    labels = [seed % 10 for seed in seeds] if network.conditional else None
    with (
        tempfile.TemporaryDirectory() as folder,
        StepBar(num, sum(contender.steps for contender in contenders.values())) as bar,
    ):
        images = comparison.compare(contenders, bank, seeds, labels, "cosine", folder, {}, bar)
    report = comparison.report(images, list(machines), seeds)
    rows = [plots.Row("network", images[comparison.NETWORK])]
    for name in machines:
        r = [f"r = {value:.2f}" for value in report["per_seed"][name]["pearson_r"]]
        rows.append(plots.Row(name, images[name], r))
        print(f"{name:10} median r {report['median'][name]['pearson_r']:.3f}")
    plots.draw_rows(path, rows, [f"seed {seed}" for seed in seeds])


if __name__ == "__main__":
    main()
