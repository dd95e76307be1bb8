"""Named machines against the plain torch of the codes they were published with, one query at every noise level; and ELS
with a fold against ELS without.

    python benchmarks/denoisers.py                              # embedded Fashion-MNIST, 2,000 images
    python benchmarks/denoisers.py cifar.npz --threshold 0.05   # any data set name or bank file

Both ways take turns, with what depends on the bank and the level alone found before; medians of the seconds of a call.
First a bank of a few images is compared with the reference engine, at every level. Torch works in float32, as released.
"""

import argparse
import json
import math
import time
from statistics import geometric_mean, median

import torch

import pyels
from pyels.datasets import EMBEDDED

SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)  # alpha^2 + sigma^2 = 1


def pca(bank, options):
    """PCALocality: one product with the matrix of all windows, softmax, weighted mean."""
    machine = pyels.PCALocality(bank, options.threshold, threads=options.threads)
    flat = bank.read(slice(None)).flatten(1)

    def at(x, alpha, sigma):
        windows = machine.windows(alpha, sigma).flatten(3).flatten(0, 2)
        matrix = windows.T.float().contiguous()  # n first

        def theirs():
            squares = (x.flatten(1) - alpha * flat) ** 2
            weights = torch.softmax(squares @ matrix / (-2 * sigma**2), 0)
            return (weights * flat).sum(0).reshape(x.shape)

        return lambda: machine.denoise(x, alpha, sigma), theirs, {"density": float(windows.double().mean())}

    def reference(few):
        return pyels.PCALocality(few, options.threshold), pyels.PCALocality(few, options.threshold, engine="reference")

    return at, reference


def pspc(bank, options):
    """PSPC of squares: a loop over the windows, softmax, weighted mean of each."""
    k, (_, height, width) = options.size, bank.shape
    machine = pyels.PSPC(bank, k, threads=options.threads)
    images = bank.read(slice(None))
    images = torch.cat([images, images.flip(-1)])

    def at(x, alpha, sigma):
        def theirs():
            total, cover = torch.zeros_like(x), torch.zeros_like(x)
            for i in range(height - k + 1):
                for j in range(width - k + 1):
                    window = (..., slice(i, i + k), slice(j, j + k))
                    patches = images[window].flatten(1)
                    squares = (x[window].flatten(1) - alpha * patches).square().sum(1)
                    mean = torch.softmax(squares / (-2 * sigma**2), 0) @ patches
                    total[window] += mean.reshape(x[window].shape)
                    cover[window] += 1
            return total / cover

        return lambda: machine.denoise(x, alpha, sigma), theirs, {}

    def reference(few):
        return pyels.PSPC(few, k), pyels.PSPC(few, k, engine="reference")

    return at, reference


def wiener(bank, options):
    """Wiener: a linear system at every call, of a covariance that is there."""
    machine = pyels.Wiener(bank)
    flat = bank.read(slice(None)).flatten(1)
    mean, covariance = flat.mean(0), torch.cov(flat.T)
    one = torch.eye(len(mean))

    def at(x, alpha, sigma):
        def theirs():
            solved = torch.linalg.solve(alpha**2 * covariance + sigma**2 * one, x.flatten() - alpha * mean)
            return (mean + alpha * covariance @ solved).reshape(x.shape)

        return lambda: machine.denoise(x, alpha, sigma), theirs, {}

    return at, lambda few: (pyels.Wiener(few), pyels.Wiener(few))  # which has no engine: its tests have the formula


def golden(bank, options):
    """Golden(PCALocality): the nearest by averages that are there, the nearest of these, and PCALocality's way."""
    local = pyels.PCALocality(bank, options.threshold, threads=options.threads)
    machine = pyels.Golden(local)
    images = bank.read(slice(None))
    least, most = len(bank) // 20, len(bank) // 10
    square = tuple(side // along for side, along in zip(bank.shape[1:], machine.averages, strict=True))

    def coarse(some):
        return torch.nn.functional.avg_pool2d(some, square).flatten(1)

    averages = coarse(images)

    def at(x, alpha, sigma):
        matrix = local.windows(alpha, sigma).flatten(3).flatten(0, 2).T.float().contiguous()
        k = max(least, round(most - (most - least) * (1 - sigma)))

        def theirs():
            near = (coarse(x) - alpha * averages).square().sum(1).topk(most, largest=False).indices
            some = images[near].flatten(1)
            some = some[(x.flatten(1) - alpha * some).square().sum(1).topk(k, largest=False).indices]
            squares = (x.flatten(1) - alpha * some) ** 2
            return (torch.softmax(squares @ matrix / (-2 * sigma**2), 0) * some).sum(0).reshape(x.shape)

        return lambda: machine.denoise(x, alpha, sigma), theirs, {}

    def reference(few):
        ours, slow = (pyels.PCALocality(few, options.threshold, engine=engine) for engine in ("cpu", "reference"))
        return pyels.Golden(ours, 5, 10), pyels.Golden(slow, 5, 10)

    return at, reference


def fold(bank, options):
    """ELS with a fold, and, in torch's place, ELS without."""
    machine, centre = (pyels.ELS(bank, options.size, fold=fold, threads=options.threads) for fold in ("uniform", None))

    def at(x, alpha, sigma):
        return lambda: machine.denoise(x, alpha, sigma), lambda: centre.denoise(x, alpha, sigma), {}

    def reference(few):
        return tuple(pyels.ELS(few[:2], options.size, fold="uniform", engine=engine) for engine in ("cpu", "reference"))

    return at, reference


MACHINES = {"pca": pca, "pspc": pspc, "wiener": wiener, "golden": golden, "fold": fold}


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default=EMBEDDED)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS)
    parser.add_argument("--threshold", type=float, default=0.02, help="of pca and golden")
    parser.add_argument("--size", type=int, default=7, help="of the windows of pspc and fold")
    parser.add_argument("--checked", type=int, default=20, help="images that the reference engine is given")
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bank = pyels.datasets.load(options.dataset, limit=options.images)
    levels = [(math.sqrt(1 - sigma**2), sigma) for sigma in options.sigmas]
    noise = torch.randn((1, *bank.shape), generator=torch.Generator().manual_seed(0))
    queries = [alpha * bank.read(slice(0, 1)) + sigma * noise for alpha, sigma in levels]
    rows = []
    for name in options.machines:
        at, reference = MACHINES[name](bank, options)
        ours, oracle = reference(bank[: options.checked])
        worst = max(
            float((ours.denoise(x, *level) - oracle.denoise(x, *level)).abs().max())
            for x, level in zip(queries, levels, strict=True)
        )
        print(f"{name}, {bank}: worst error with {options.checked} images {worst:.1e}")
        print("sigma  ours, ms  other, ms   ratio  differ by")
        for x, (alpha, sigma) in zip(queries, levels, strict=True):
            ways = at(x, alpha, sigma)
            differ = float((ways[0]() - ways[1]()).abs().max())
            taken = [[seconds(way) for way in ways[:2]] for _ in range(options.repeats)]
            mine, theirs = (median(one) * 1e3 for one in zip(*taken, strict=True))
            rows.append({"machine": name, "sigma": sigma, "ours": mine, "other": theirs, "error": worst, **ways[2]})
            notes = ", ".join(f"{key} {value:.4f}" for key, value in ways[2].items())
            print(f"{sigma:5.3g}  {mine:8.2f}  {theirs:9.2f}  {theirs / mine:6.1f}  {differ:.0e}  {notes}", flush=True)
        ratios = [row["other"] / row["ours"] for row in rows if row["machine"] == name]
        print(f"geometric mean {geometric_mean(ratios):.1f}, least {min(ratios):.1f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"bank": repr(bank), "threads": options.threads, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
