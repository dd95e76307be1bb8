"""A whole run of the sampler: seconds of every step, for a bank of any size and shape.

    python benchmarks/full_run.py --engine cuda                      # 50,000 images of 3x32x32, 20 steps, batch 16
    python benchmarks/full_run.py --engine cpu --images 100 --batch 2  # the same, small

The images are made up, smooth and all different; an exact engine's time hardly depends on what they show.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import pyels


def made_up_images(n, shape):
    """uint8 (n, C, H, W): random coarse pictures, enlarged."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    parts = []
    for start in range(0, n, 1000):
        coarse = torch.rand((min(1000, n - start), channels, 6, 6), generator=generator)
        parts.append((F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8))
    return torch.cat(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--shape", default="3,32,32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--preset", default="cifar10-resnet-zeros")
    given = parser.parse_args()
    shape = tuple(int(n) for n in given.shape.split(","))
    bank = pyels.PatchBank(made_up_images(given.images, shape))
    machine = pyels.ELS(bank, engine=given.engine)
    sizes = pyels.presets.patch_sizes(given.preset)
    noise = torch.randn((given.batch, *shape), generator=torch.Generator().manual_seed(1)).to(machine.device)
    machine.denoise(noise, 0.5, 0.5, patch_size=3)  # warms up, and brings the bank to the GPU
    steps, before = [], time.perf_counter()

    def on_step(step):
        nonlocal before
        if step.to.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        steps.append({"patch_size": step.level.patch_size, "t": step.level.t, "seconds": now - before})
        bar.update()
        before = time.perf_counter()

    with tqdm(total=len(sizes), unit="step") as bar:
        before = time.perf_counter()
        pyels.sample(machine, noise, steps=len(sizes), patch_sizes=sizes, callback=on_step)
    seconds = [step["seconds"] for step in steps]
    pairs = sum(machine.pairs(None, k, given.batch) for k in sizes)
    print(
        json.dumps(
            {
                "engine": machine.engine.name,
                "device": torch.cuda.get_device_name(machine.device) if machine.engine.name == "cuda" else "cpu",
                "bank": repr(bank),
                "batch": given.batch,
                "median_step_seconds": statistics.median(seconds),
                "total_seconds": sum(seconds),
                "pairs_per_second": pairs / sum(seconds),
                "steps": steps,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
