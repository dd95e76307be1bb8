"""What fold, derivative and variance cost beside the mean alone: medians of seconds, all taking turns.

python benchmarks/second_pass.py --engine cuda                        # 4,096 images of 3x32x32, batch 16
python benchmarks/second_pass.py --engine cpu --images 200 --batch 1  # the same, small
"""

import argparse
from statistics import median

import torch
from full_run import made_up_images

import pyels
from pyels.studies.hardware import seconds_of


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--shape", default="3,32,32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", default="3,5,7,11,17")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    bank = pyels.PatchBank(made_up_images(given.images, tuple(int(n) for n in given.shape.split(","))))
    x = 0.6 * bank.read(slice(given.batch)) + 0.8 * torch.randn(given.batch, *bank.shape)
    x = x.to(pyels.ELS(bank, engine=given.engine).device).requires_grad_()
    for name, machine in {"els": pyels.ELS, "ls": pyels.LS}.items():
        mean, fold = machine(bank, engine=given.engine), machine(bank, engine=given.engine, fold="uniform")
        for k in (int(k) for k in given.sizes.split(",")):
            at = {"alpha": 0.6, "sigma": 0.8, "patch_size": k}
            ways = {
                "mean": lambda machine=mean, at=at: machine.denoise(x.detach(), **at),
                "fold": lambda machine=fold, at=at: machine.denoise(x.detach(), **at),
                "mean and derivative": lambda machine=mean, at=at: machine.denoise(x, **at).sum().backward(),
                "posterior and variance": lambda machine=mean, at=at: machine.posterior(x.detach(), **at).variance,
            }
            seconds = {way: [] for way in ways}
            for i in range(given.repeats + 1):
                for way, call in ways.items():
                    took = seconds_of(call, device=x.device)
                    if i:  # the first call warms up
                        seconds[way].append(took)
            of = {way: median(all_of) for way, all_of in seconds.items()}
            told = ", ".join(f"{way} {s:.3g} s ({s / of['mean']:.2f})" for way, s in of.items())
            print(f"{name} k={k}: {told}", flush=True)


if __name__ == "__main__":
    main()
