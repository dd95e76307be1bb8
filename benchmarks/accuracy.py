"""Worst error of the cpu engine against the float64 oracle, on real images, at every noise level and patch size.

    python benchmarks/accuracy.py                  # embedded Fashion-MNIST, 28x28
    python benchmarks/accuracy.py bank.npz         # any data set name or bank file

For each machine: queries at t = 1/20 .. 20/20, every odd patch size from 3 to beyond the image, the first few images.
"""

import argparse

import torch
from tqdm import tqdm

import pyels
from pyels.datasets import EMBEDDED
from pyels.schedules import make_schedule


def machines(bank, k, engine):
    size = min(bank.shape[1:])
    yield "LS", pyels.LS(bank, k, engine=engine)
    for boundary in pyels.ELS.boundaries:
        if boundary == "zeros" or k <= size:
            yield f"ELS {boundary}", pyels.ELS(bank, k, boundary, engine=engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default=EMBEDDED)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="*", default=[3, 5, 7, 9, 11, 13, 15, 17, 25, 61])
    options = parser.parse_args()
    bank = pyels.datasets.load(options.dataset, limit=options.images)
    schedule = make_schedule("cosine")
    times = [i / 20 for i in range(1, 21)]
    alpha = torch.tensor([schedule.alpha(t) for t in times], dtype=torch.float64)
    sigma = torch.tensor([schedule.sigma(t) for t in times], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = bank.read(torch.arange(20) % len(bank))
    noise = torch.randn(x0.shape, generator=generator)
    x = alpha.float()[:, None, None, None] * x0 + sigma.float()[:, None, None, None] * noise

    worst: dict[str, tuple[float, str]] = {}

    def record(name, k, ours, oracle):
        errors = (ours - oracle).abs().flatten(1).amax(dim=1)
        i = int(errors.argmax())
        where = f"k = {k}, t = {times[i]:.2f}" if k else f"t = {times[i]:.2f}"
        worst[name] = max(worst.get(name, (0.0, "")), (float(errors[i]), where))

    for kind in (pyels.IS, pyels.ES):
        record(kind.__name__, 0, *(kind(bank, engine=e).denoise(x, alpha, sigma) for e in ("cpu", "reference")))
    for k in tqdm(options.sizes):
        for (name, ours), (_, oracle) in zip(machines(bank, k, "cpu"), machines(bank, k, "reference"), strict=True):
            record(name, k, ours.denoise(x, alpha, sigma), oracle.denoise(x, alpha, sigma))
    print(f"worst |x0_hat - oracle| over 20 noise levels, {bank}:")
    for name, (error, where) in worst.items():
        print(f"  {name:13} {error:.1e}  at {where}")


if __name__ == "__main__":
    main()
