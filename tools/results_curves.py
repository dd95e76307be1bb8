"""Draw docs/results_curves.png: how like a network machines are, against its training and against their images.

    python tools/results_curves.py

From the records that are the tables `epochs` and `images` of docs/results.md; bands are 95% intervals of the median.
"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results_table import MACHINES, ROOT, of_banks, of_training


def main() -> None:
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2, sharey=True), (of_training(), of_banks()), ("epochs", "images"), strict=True)
    for axis, (reports, machines), what in panels:
        counts = sorted(reports)
        for machine in machines:
            medians = [reports[count]["median"][machine]["pearson_r"] for count in counts]
            low, high = zip(*(reports[n]["interval_95"][machine]["pearson_r"] for n in counts), strict=True)
            (line,) = axis.plot(counts, medians, marker="o", markersize=3, label=MACHINES[machine])
            axis.fill_between(counts, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [f"{count:,g}" for count in counts])
        axis.set_xlabel({"epochs": "epochs of training", "images": "images of the machines, N"}[what])
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("Pearson r with the network")
    figure.savefig(ROOT / "docs" / "results_curves.png")


if __name__ == "__main__":
    main()
