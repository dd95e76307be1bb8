"""Draw docs/artefacts.png: garments with a wrong number of legs or sleeves, by the network and by the theory alike.

    python tools/artefacts.py [--dataset fashion-mnist] [--out docs/artefacts.png]

The network is that of results/fashion-resnet-zeros, the patch sizes are its calibration's. The seeds were found by
looking at the pairs that `pyels compare` draws.
"""

import argparse
import tempfile
from pathlib import Path

import pyels
from pyels.cli.machines import told_in_file
from pyels.cli.progress import StepBar
from pyels.studies import comparison, plots

ROOT = Path(__file__).parent.parent
NETWORK = ROOT / "results" / "fashion-resnet-zeros"
CASES = [  # seed, class, what is wrong
    (126, 1, "three legs"),
    (140, 1, "three legs"),
    (157, 1, "three legs"),
    (100, 1, "three feet"),
    (213, 2, "one sleeve"),
    (225, 2, "two left sleeves"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "artefacts.png")
    options = parser.parse_args()

    bank = pyels.datasets.load(options.dataset)
    network, _ = pyels.adapters.load(NETWORK)
    _, sizes = told_in_file(NETWORK / "sizes" / "scales.json", "cosine")
    contenders = {
        comparison.NETWORK: comparison.Contender(network, len(sizes)),
        "els": comparison.Contender(pyels.ELS(bank), len(sizes), {"patch_size": sizes}),
    }
    seeds, labels, remarks = zip(*CASES, strict=True)
    with tempfile.TemporaryDirectory() as folder, StepBar(len(CASES), 2 * len(sizes)) as bar:
        images = comparison.compare(contenders, bank, seeds, labels, "cosine", folder, {}, bar)
    r = pyels.metrics.pearson_r(images["network"], images["els"])
    plots.draw_rows(
        options.out,
        [
            plots.Row("trained\nnetwork", images["network"], remarks),
            plots.Row("ELS machine", images["els"], [f"r = {v:.2f}" for v in r]),
            plots.Row("nearest\ntraining image", comparison.nearest_images(bank, images["network"])),
        ],
        [f"seed {seed}, class {label}" for seed, label, _ in CASES],
    )


if __name__ == "__main__":
    main()
