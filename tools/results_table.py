"""Write the tables of docs/results.md from the records in results/.

    python tools/results_table.py [--check]

Each folder of results/ is a network on a data set: what `pyels train` wrote (or network.py, for a network of others),
in sizes/ what `pyels calibrate` wrote, in theory/ what `pyels compare`; docs/results.md has the commands. A table
stands between <!-- NAME --> and <!-- /NAME -->; --check fails where one is not what the records say.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyels

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "results.md"
DEMO = ROOT / "pyels" / "data" / "fashion_resnet.safetensors"

NAMES = {
    "fashion-resnet-zeros": "Fashion-MNIST, ResNet",
    "fashion-unet-zeros": "Fashion-MNIST, UNet",
    "fashion6000-resnet-zeros": "Fashion-6000, ResNet",
    "fashion6000-resnet-flow": "Fashion-6000, ResNet, flow matching",
    "fashion6000-unet-attention": "Fashion-6000, UNet with attention",
    "fashion6000-dit": "Fashion-6000, transformer",
    "fashion6000-latent-resnet": "Fashion-6000, ResNet on latents",
    "fashion-ddpm": "Fashion-2000, UNet made elsewhere",
    "mnist-resnet-zeros": "MNIST, ResNet",
    "mnist-resnet-circular": "MNIST, ResNet, circular",
    "mnist-flow-vit": "MNIST-6000, transformer made elsewhere",
    "cifar-resnet-zeros": "CIFAR-10, ResNet",
}
MACHINES = {
    "els": "ELS",
    "els:fold": "ELS, fold",
    "ls": "LS",
    "is": "IS",
    "pspc": "PSPC",
    "pca": "PCA-locality",
    "wiener": "Wiener",
}
RULES = ("entropy", "validation", "sure")
SEVERAL = "network@150"

# Kamb & Ganguli (ICML 2025, arXiv 2412.20292): medians of what is Pearson r here, of ELS, LS and IS, with 20 and 150
# steps of the network; with ours where we have a network of this kind on this data.
PAPER: list[tuple[str, str | None, tuple[float, ...]]] = [
    ("MNIST, UNet", None, (0.84, 0.83, 0.69, 0.89, 0.88, 0.70)),
    ("CIFAR-10, UNet", None, (0.82, 0.80, 0.39, 0.90, 0.87, 0.41)),
    ("Fashion-MNIST, UNet", "fashion-unet-zeros", (0.91, 0.91, 0.80, 0.93, 0.93, 0.80)),
    ("CelebA, UNet", None, (0.75, 0.81, 0.51, 0.85, 0.90, 0.55)),
    ("MNIST, ResNet", "mnist-resnet-zeros", (0.94, 0.84, 0.62, 0.94, 0.82, 0.61)),
    ("MNIST, ResNet, circular", "mnist-resnet-circular", (0.73, 0.33, 0.14, 0.77, 0.36, 0.15)),
    ("CIFAR-10, ResNet", "cifar-resnet-zeros", (0.90, 0.86, 0.43, 0.95, 0.90, 0.42)),
    ("CIFAR-10, ResNet, circular", None, (0.90, 0.80, 0.36, 0.94, 0.83, 0.35)),
    ("Fashion-MNIST, ResNet", "fashion-resnet-zeros", (0.90, 0.88, 0.74, 0.94, 0.88, 0.68)),
    ("CelebA, ResNet", None, (0.92, 0.88, 0.48, 0.96, 0.90, 0.47)),
    ("CIFAR-10, UNet with attention", None, (0.75, 0.74, 0.47, 0.77, 0.77, 0.48)),
]
# arXiv 2602.16498: R2 of final images with those of a UNet without attention, 10 steps: optimal (IS), Wiener, what the
# paper calls Kamb, PCA-locality, the golden subset of that.
GOLDEN: list[tuple[str, str | None, tuple[float, ...]]] = [
    ("CIFAR-10", "cifar-resnet-zeros/ten-steps", (-0.40, 0.55, 0.41, 0.67, 0.68)),
    ("CelebA-HQ", None, (0.01, 0.78, 0.72, 0.80, 0.84)),
    ("AFHQ", None, (-0.71, 0.69, 0.58, 0.70, 0.73)),
]
# What the same network and machine come to by the measure, the machine, its sizes and the steps.
MEASURED = {
    "theory": "as above: 20 steps, sizes of its calibration",
    "ten-steps": "10 steps along the linear schedule, sizes of the same noise levels",
    "sevens": "these 10 steps, 7 x 7 at all",
    "threes": "these 10 steps, 3 x 3 at all",
    "fifteens": "these 10 steps, 15 x 15 at all",
}


def read(*parts: str | Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RESULTS.joinpath(*parts).read_text(encoding="utf-8"))
    return loaded


def has(*parts: str) -> bool:
    return RESULTS.joinpath(*parts).exists()


def number(value: float, digits: int = 3) -> str:
    """Without the 0 before the point."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def cell(report: dict[str, Any], machine: str, measure: str = "pearson_r") -> str:
    if machine not in report["median"]:
        return ""
    return with_interval(report["median"][machine][measure], report["interval_95"][machine][measure])


def between(report: dict[str, Any], one: str, other: str) -> tuple[float, list[float]] | None:
    """Pearson r of two of the contenders, and its interval."""
    matrix = report.get("matrix", {"names": []})
    if one not in matrix["names"] or other not in matrix["names"]:
        return None
    i, j = matrix["names"].index(one), matrix["names"].index(other)
    return matrix["median"][i][j], matrix["interval_95"][i][j]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def check(row: str) -> None:
    """The parts of a row are of one network and one bank."""
    run, scales = read(row, "theory", "run.json"), read(row, "sizes", "scales.json")
    assert run["network"]["crc32"] == scales["network"]["crc32"], f"{row}: results of several networks"
    assert run["patch_sizes"] == scales["patch_sizes"], f"{row}: patch sizes of another calibration"
    assert run["data"]["bank"] == scales["data"]["bank"], f"{row}: several banks"
    assert run["steps"] == 20, row
    weights = DEMO if row == "fashion6000-resnet-zeros" else RESULTS / row / "network.safetensors"
    if weights.exists():
        crc32 = pyels.adapters.load(weights)[1]["crc32"]
        assert run["network"]["crc32"] == crc32, f"{row}: results of another network"


def rows() -> list[str]:
    return [row for row in NAMES if has(row, "theory", "report.json")]


def machines_of(measure: str) -> str:
    lines = []
    for row in rows():
        check(row)
        report = read(row, "theory", "report.json")
        lines.append([NAMES[row], str(len(report["seeds"])), *(cell(report, name, measure) for name in MACHINES)])
    return table(["", "seeds", *MACHINES.values()], lines)


def of_several_steps() -> str:
    lines = []
    for row in rows():
        report = read(row, "theory", "report.json")
        found = [between(report, SEVERAL, name) for name in ("network", *MACHINES)]
        if any(found):
            lines.append([NAMES[row], *("" if one is None else with_interval(*one) for one in found)])
    return table(["", "network in 20", *MACHINES.values()], lines)


def of_paper() -> str:
    lines = []
    for name, row, published in PAPER:
        ours: list[float | None] = [None] * 6
        if row is not None and has(row, "theory", "report.json"):
            report = read(row, "theory", "report.json")
            for i, machine in enumerate(("els", "ls", "is")):
                ours[i] = report["median"][machine]["pearson_r"]
                later = between(report, SEVERAL, machine)
                ours[i + 3] = None if later is None else later[0]
        both = zip(published, ours, strict=True)
        lines.append([name, *(number(p, 2) + ("" if o is None else f", **{number(o)}**") for p, o in both)])
    of = [f"{machine}, {steps}" for steps in (20, 150) for machine in ("ELS", "LS", "IS")]
    return table(["", *of], lines)


def of_golden() -> str:
    lines = []
    for name, folder, published in GOLDEN:
        cells = [number(value, 2) for value in published]
        if folder is not None and has(folder, "report.json"):
            report = read(folder, "report.json")
            for i, machine in enumerate(("is", "wiener", "els", "pca", "golden")):
                cells[i] += f", **{cell(report, machine, 'r2_score')}**" * (machine in report["median"])
        lines.append([name, *cells])
    return table(["", "IS", "Wiener", "“Kamb”, here ELS", "PCA-locality", "its golden subset"], lines)


def of_measures() -> str:
    lines = []
    for folder, what in MEASURED.items():
        if not has("cifar-resnet-zeros", folder, "report.json"):
            continue
        report = read("cifar-resnet-zeros", folder, "report.json")
        measures = ("pearson_r", "pearson_r2", "r2_score")
        for machine in (one for one in ("els", "ls") if one in report["median"]):
            lines.append([MACHINES[machine], what, *(cell(report, machine, measure) for measure in measures)])
    return table(["", "", "Pearson r", "its square", "R2"], lines)


def of_training() -> tuple[dict[float, dict[str, Any]], tuple[str, ...]]:
    """Reports by epochs, and of which machines."""
    folders = RESULTS.glob("fashion6000-epochs/epoch-*")
    return {float(folder.name[6:]): read(folder, "report.json") for folder in folders}, ("els", "ls", "is")


def of_banks() -> tuple[dict[float, dict[str, Any]], tuple[str, ...]]:
    """Reports by number of images."""
    row = RESULTS / "fashion6000-resnet-zeros"
    reports = {float(folder.name): read(folder, "report.json") for folder in row.glob("images/*")}
    return {6000.0: read(row, "theory", "report.json"), **reports}, ("els", "ls", "is", "pca", "wiener")


def along(what: str, found: tuple[dict[float, dict[str, Any]], tuple[str, ...]]) -> str:
    reports, machines = found
    lines = [[f"{n:,g}", *(cell(reports[n], machine) for machine in machines)] for n in sorted(reports)]
    return table([what, *(MACHINES[machine] for machine in machines)], lines)


def of_rules() -> str:
    lines = []
    for row in rows():
        found = {rule: read(row, rule, "report.json") for rule in RULES if has(row, rule, "report.json")}
        if found:
            own = read(row, "limited" if has(row, "limited", "report.json") else "theory", "report.json")
            lines.append([NAMES[row], cell(own, "els"), *(cell(found[rule], "els") for rule in RULES)])
    return table(["", "the network's own", *RULES], lines)


def of_sizes() -> str:
    lines = []
    for row in rows():
        lines.append([NAMES[row], "network", " ".join(map(str, read(row, "sizes", "scales.json")["patch_sizes"]))])
        for rule in RULES:
            if has(row, rule, "scales.json"):
                lines.append(["", rule, " ".join(map(str, read(row, rule, "scales.json")["patch_sizes"]))])
    return table(["", "by", "patch sizes at t = 1/20 .. 20/20"], lines)


def of_networks() -> str:
    lines = []
    for row in rows():
        if has(row, "run.json"):
            train = read(row, "run.json")
            net, recipe = train["network"], train["recipe"]
            lines.append(
                [
                    NAMES[row],
                    f"{train['data']['bank']['images']:,}",
                    f"{net['width']} channels, {net['weights']:,} weights",
                    f"{recipe['steps']:,} of {recipe['batch_size']}: {train['epochs']:.1f} epochs",
                    f"{train['losses'][-1]:.4f}",
                    f"{train['seconds'] / 60:.0f} min",
                ]
            )
    return table(["", "images", "network", "steps", "last loss", "training"], lines)


TABLES = {
    "rows": lambda: machines_of("pearson_r"),
    "r2": lambda: machines_of("r2_score"),
    "steps": of_several_steps,
    "paper": of_paper,
    "golden": of_golden,
    "measures": of_measures,
    "epochs": lambda: along("epochs", of_training()),
    "images": lambda: along("images", of_banks()),
    "rules": of_rules,
    "sizes": of_sizes,
    "networks": of_networks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        before, begun, rest = page.partition(f"<!-- {name} -->\n")
        old, ended, after = rest.partition(f"<!-- /{name} -->")
        if not begun or not ended:
            raise SystemExit(f"{PAGE} has no table {name}")
        new = f"\n{make()}\n\n"
        if options.check and old != new:
            raise SystemExit(f"{PAGE}: table {name} is not what the records say; run tools/results_table.py")
        page = before + begun + new + ended + after
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
