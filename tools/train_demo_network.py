"""Train and calibrate the network that comes with the package, and write it to pyels/data.

    python tools/train_demo_network.py

The weights in the package took 66 minutes on one busy core with bfloat16 instructions; without these add --float32.
Writes fashion_resnet.safetensors (weights, configuration) and fashion_resnet.json (training record, calibration curve
and patch sizes). Seeds are fixed; the bits of the weights depend on the machine and the number of threads.
"""

import argparse
from pathlib import Path

import torch

import pyels
from pyels.calibration import calibrate
from pyels.datasets import EMBEDDED
from pyels.files import write_json
from pyels.runs import noise_of_seed
from pyels.training import train

SEED = 0
CALIBRATION_SEEDS = list(range(1000, 1030))  # none of them is a seed of the demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pyels" / "data")
    options = parser.parse_args()

    bank = pyels.datasets.load(EMBEDDED)
    torch.manual_seed(SEED)
    network = pyels.ResNet(channels=1, width=64, depth=6, num_classes=10)
    weights = sum(p.numel() for p in network.parameters())
    print(f"{bank}; {weights} weights; {torch.get_num_threads()} threads", flush=True)
    settings = dict(steps=options.steps, batch_size=32, learning_rate=1e-3, ema_decay=0.999, seed=SEED)
    network, losses = train(network, bank, bfloat16=not options.float32, **settings)
    network.save(options.out / "fashion_resnet.safetensors")
    record = {
        "training": {
            "command": "python tools/train_demo_network.py",
            "bank": EMBEDDED,
            "weights": weights,
            **settings,
            "bfloat16": not options.float32,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "losses": [round(loss, 5) for loss in losses],
        }
    }
    noise = torch.stack([noise_of_seed(seed, bank.shape) for seed in CALIBRATION_SEEDS])
    labels = torch.arange(len(CALIBRATION_SEEDS)) % 10
    calibration = calibrate(pyels.NetworkDenoiser(network), pyels.ELS(bank), noise, labels)
    record["calibration"] = {
        "machine": "els, boundary zeros",
        "seeds": CALIBRATION_SEEDS,
        "times": [round(t, 6) for t in calibration.times],
        "sizes": calibration.sizes,
        "patch_sizes": calibration.patch_sizes,
        "cosine": [[round(v, 6) for v in row] for row in calibration.cosine.tolist()],
        "mse": [[round(v, 6) for v in row] for row in calibration.mse.tolist()],
    }
    write_json(options.out / "fashion_resnet.json", record)
    print("patch sizes:", *calibration.patch_sizes)


if __name__ == "__main__":
    main()
