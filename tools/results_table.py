"""Print the tables of docs/results.md from the records in results/.

    python tools/results_table.py

Each folder of results/ holds what `pyels train` wrote for one row, and in it sizes/ and theory/ are what `pyels
calibrate` and `pyels compare` wrote. The paper's figures are those of Kamb & Ganguli (ICML 2025, arXiv 2412.20292),
medians of what is Pearson r here, 20 steps both.
"""

import json
import zlib
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
NAMES = {
    "fashion-resnet-zeros": "Fashion-MNIST, ResNet, zeros",
    "fashion-unet-zeros": "Fashion-MNIST, UNet, zeros",
    "mnist-resnet-zeros": "MNIST, ResNet, zeros",
    "mnist-resnet-circular": "MNIST, ResNet, circular",
    "cifar-resnet-zeros": "CIFAR-10, ResNet, zeros",
}
PAPER = {
    "fashion-resnet-zeros": {"els": 0.90, "ls": 0.88, "is": 0.74},
    "fashion-unet-zeros": {"els": 0.91},
    "mnist-resnet-zeros": {"els": 0.94, "ls": 0.84, "is": 0.62},
    "mnist-resnet-circular": {"els": 0.73},
    "cifar-resnet-zeros": {"els": 0.90, "ls": 0.86, "is": 0.43},
}


def read(row: str, name: str) -> dict:
    return json.loads((RESULTS / row / name).read_text(encoding="utf-8"))


def cell(report: dict, machine: str, measure: str) -> str:
    low, high = report["interval_95"][machine][measure]
    return f"{report['median'][machine][measure]:.3f} [{low:.3f}, {high:.3f}]"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    rows = [row for row in NAMES if (RESULTS / row / "theory" / "report.json").exists()]
    correlation, others, networks, sizes = [], [], [], []
    for row in rows:
        report, run = read(row, "theory/report.json"), read(row, "theory/run.json")
        train, scales = read(row, "run.json"), read(row, "sizes/scales.json")
        crc32 = f"{zlib.crc32((RESULTS / row / 'network.safetensors').read_bytes()):08x}"
        assert run["network"]["crc32"] == scales["network"]["crc32"] == crc32, f"{row}: results of several networks"
        assert run["data"]["bank"] == scales["data"]["bank"] == train["data"]["bank"], f"{row}: several banks"
        assert run["patch_sizes"] == scales["patch_sizes"], f"{row}: patch sizes of another calibration"
        assert run["steps"] == run["network_steps"] == 20, row
        line = [NAMES[row], str(len(report["seeds"]))]
        for machine in ("els", "ls", "is"):
            paper = PAPER[row].get(machine)
            line += [cell(report, machine, "pearson_r"), "" if paper is None else f"{paper:.2f}"]
            low, high = report["quartiles"][machine]["pearson_r"]
            others.append(
                [NAMES[row], machine.upper(), f"{low:.3f} .. {high:.3f}"]
                + [cell(report, machine, measure) for measure in ("pearson_r2", "r2_score")]
            )
        correlation.append([*line, f"{report['els_beats_is']:.0%}"])
        net, recipe = train["network"], train["recipe"]
        networks.append(
            [
                NAMES[row],
                f"{train['data']['bank']['images']:,}",
                f"{net['width']} channels, {net['weights']:,} weights",
                f"{recipe['steps']:,} of {recipe['batch_size']}: {train['epochs']:.1f} epochs",
                f"{train['losses'][-1]:.4f}",
                f"{train['seconds'] / 60:.0f} min",
            ]
        )
        sizes.append([NAMES[row], " ".join(map(str, scales["patch_sizes"]))])
    print_table(
        ["", "seeds", "ELS", "paper", "LS", "paper", "IS", "paper", "ELS closer than IS"],
        correlation,
    )
    print_table(["", "machine", "quartiles of Pearson r", "its square", "r2 score"], others)
    print_table(["", "images", "network", "steps", "last loss", "training"], networks)
    print_table(["", "patch sizes at t = 1/20 .. 20/20"], sizes)


if __name__ == "__main__":
    main()
