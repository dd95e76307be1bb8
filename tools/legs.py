"""Which images gave which leg of a pair of trousers with three, and when it was decided that there would be three:
prints it, draws docs/three_legs.png, and writes docs/three_legs.html, a page to look into.

    pyels explain --network results/fashion-resnet-zeros --patch-sizes results/fashion-resnet-zeros/sizes/scales.json \\
      --seed 140 --label 1 --out three-legs
    python tools/legs.py three-legs [--dataset fashion-mnist] [--row 25] [--out docs/three_legs.png]

A leg is a run of pixels of the row that are brighter than mid-grey, in the last picture of the network.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import pyels
from pyels.explorer import write_page
from pyels.files import replacing
from pyels.provenance import Trace

ROOT = Path(__file__).parent.parent
SHOWN, COLOURS = 4, ("#e69f00", "#56b4e9", "#cc79a7", "#009e73")
_WHOSE = {"network_x0": "network", "x0": "machine"}


def legs_of(row: torch.Tensor) -> list[tuple[int, int]]:
    """First and behind-the-last column of each."""
    bright = torch.nn.functional.pad((row > 0).int(), (1, 1))
    turns = bright.diff().nonzero()[:, 0].tolist()
    return list(zip(turns[::2], turns[1::2], strict=True))


def heaviest(trace: Trace, step: int, row: int, leg: tuple[int, int]) -> list[tuple[int, int, int, float]]:
    """Image, row and column of a leg's heaviest sources, each image once, with its share of what the trace has kept."""
    at = (step, 0, row, slice(*leg))
    image, rows, columns, weight = (getattr(trace, name)[at].flatten() for name in ("image", "row", "column", "weight"))
    found = []
    for one in image.unique().tolist():
        mine = image == one
        best = (weight * mine).argmax()
        share = float(weight[mine].sum() / weight.sum())
        found.append((one, int(rows[best]), int(columns[best]), share))
    return sorted(found, key=lambda each: -each[3])[:SHOWN]


def show(axis, image: torch.Tensor) -> None:
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("explained", type=Path)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--row", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "three_legs.png")
    options = parser.parse_args()

    bank = pyels.datasets.load(options.dataset)
    trace = Trace.load(options.explained / "trace.safetensors", bank)
    assert trace.network_x0 is not None, "the trace is of a network"
    legs = legs_of(trace.sample[0, 0, options.row])
    counts = {name: [len(legs_of(x0[0, 0, options.row])) for x0 in getattr(trace, name)] for name in _WHOSE}
    decided, followed = (max(i for i, n in enumerate(counts[name]) if n != len(legs)) + 1 for name in _WHOSE)
    print(f"legs in row {options.row}, step by step: network {counts['network_x0']}, machine {counts['x0']}")
    print(
        f"{len(legs)} in all later ones: network from t = {trace.t[decided]:.2f}, machine from {trace.t[followed]:.2f}"
    )
    entropy = torch.stack([trace.entropy[:, 0, options.row, slice(*leg)].mean(-1) for leg in legs], dim=-1)
    surest = int(entropy.mean(-1).argmin())

    steps = sorted({*range(0, len(trace), 3), decided, surest, len(trace) - 1})
    figure = Figure(figsize=(1.2 * len(steps) + 0.5, 1.35 * (2 + len(legs)) + 0.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(2, len(legs)))
    for (name, who), axes in zip(_WHOSE.items(), above.subplots(2, len(steps)), strict=True):
        for axis, step in zip(axes, steps, strict=True):
            show(axis, getattr(trace, name)[step, 0])
            if name == "network_x0":
                axis.set_title(f"t = {trace.t[step]:.2f}", fontsize=8)
        axes[0].set_ylabel(who, fontsize=8)
    for step, part in zip((decided, surest), below.subfigures(1, 2), strict=True):
        side = trace.levels[step].told["patch_size"]
        part.suptitle(f"heaviest at t = {trace.t[step]:.2f}, windows of {side} x {side}", fontsize=9)
        for number, (leg, axes) in enumerate(zip(legs, part.subplots(len(legs), SHOWN, squeeze=False), strict=True)):
            print(
                f"t = {trace.t[step]:.2f}, leg {number + 1}, columns {leg[0]} to {leg[1] - 1}, each pixel of some "
                f"{entropy[step, number].exp():.3g} patches; of the heaviest {trace.weight.shape[-1]}:"
            )
            for axis in axes[1:]:
                axis.set_axis_off()
            for axis, (image, row, column, share) in zip(axes, heaviest(trace, step, options.row, leg), strict=False):
                print(f"  {share:.0%} image {image}, around row {row}, column {column}")
                axis.set_axis_on()
                show(axis, bank.read([image])[0])
                corner, colour = (column - side / 2, row - side / 2), COLOURS[number % len(COLOURS)]
                axis.add_patch(Rectangle(corner, side, side, fill=False, color=colour, linewidth=1.5))
                axis.set_xlabel(f"{image}: {share:.0%}", fontsize=7, labelpad=2)
            axes[0].set_ylabel(f"leg {number + 1}", fontsize=8)
    with replacing(options.out) as temporary:
        figure.savefig(temporary, format="png")
    title = "Trousers with three legs, drawn by a ResNet, and whose patches they are by ELS"
    write_page(options.out.with_suffix(".html"), trace, pyels.ELS(bank), title=title, limit=2_900_000)


if __name__ == "__main__":
    main()
