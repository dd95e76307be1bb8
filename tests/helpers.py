"""What several tests need."""

import os

import numpy as np
import pytest
import torch

import pyels
from pyels.cli import main
from pyels.schedules import make_schedule

COSINE = make_schedule("cosine")
TIMES = [i / 20 for i in (1, 2, 4, 7, 10, 13, 16, 19, 20)]
ALPHAS = torch.tensor([COSINE.alpha(t) for t in TIMES], dtype=torch.float64)
SIGMAS = torch.tensor([COSINE.sigma(t) for t in TIMES], dtype=torch.float64)

# Of the places at which a run may be killed, every so many are tried; `.ci/run large` tries all.
KILLED_AT_EVERY = 1 if os.environ.get("PYELS_LARGE") else 4

# What engines may be off the oracle. Worst seen: mean 1.9e-5, entropy 4.4e-5, source_weight 1.7e-5, log_evidence 7e-6.
BOUNDS = {"mean": 1e-4, "entropy": 2e-4, "source_weight": 1e-4, "log_evidence": 3e-5}


def make_bank(n, shape, labels=None, dtype=torch.uint8, seed=0):
    """A bank of random images with some structure: neighbouring pixels are alike."""
    generator = np.random.default_rng(seed)
    c, h, w = shape
    coarse = generator.integers(0, 256, (n, c, h // 2 + 1, w // 2 + 1))
    fine = np.clip(np.kron(coarse, np.ones((2, 2)))[..., :h, :w] + generator.integers(-40, 41, (n, c, h, w)), 0, 255)
    images = torch.from_numpy(fine.astype(np.uint8))
    if dtype == torch.float32:
        images = images.float() / 127.5 - 1
    return pyels.PatchBank(images, labels)


def noisy(bank, alpha, sigma, batch=1, seed=0):
    """Queries alpha * image + sigma * noise; alpha and sigma are numbers or (B,) tensors."""
    noise = torch.randn((batch, *bank.shape), generator=torch.Generator().manual_seed(seed))
    x0 = bank.read(torch.arange(batch) % len(bank))
    column = (-1, 1, 1, 1)
    return torch.as_tensor(alpha).float().reshape(column) * x0 + torch.as_tensor(sigma).float().reshape(column) * noise


MACHINES = {
    "IS": lambda bank, k, **options: pyels.IS(bank, **options),
    "ES": lambda bank, k, **options: pyels.ES(bank, **options),
    "LS": lambda bank, k, **options: pyels.LS(bank, k, **options),
    "ELS-circular": lambda bank, k, **options: pyels.ELS(bank, k, "circular", **options),
    "ELS-interior": lambda bank, k, **options: pyels.ELS(bank, k, "interior", **options),
    "ELS-zeros": lambda bank, k, **options: pyels.ELS(bank, k, "zeros", **options),
}


def partial(machine, x, alpha, sigma, **wishes):
    """The partial posterior of a machine, with all that there can be in it."""
    return machine.partial(machine.query(x, alpha, sigma, **wishes))


WRAPPING = ("ELS-circular", "ELS-interior")


def check(ours, oracle):
    """Every field; log-evidence to float32's relative accuracy, since it reaches many thousand nats."""
    assert ours.mean.dtype == torch.float32
    errors = {
        field: float((getattr(ours, field) - getattr(oracle, field)).abs().max())
        for field in ("mean", "entropy", "source_weight")
    }
    scale = 1 + oracle.log_evidence.abs()
    errors["log_evidence"] = float(((ours.log_evidence - oracle.log_evidence).abs() / scale).max())
    for field, bound in BOUNDS.items():
        assert errors[field] < bound, (field, errors[field])
    # Where the heaviest patch is clearly the heaviest, it is found.
    clear = oracle.source_weight > 0.51
    assert (ours.source[clear] == oracle.source[clear]).all()


def run_program(*arguments):
    """Exit status of the command line program, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code


def save_random_diffusers_pipeline(folder, size, num_class_embeds=None, prediction_type="epsilon"):
    """A randomly initialised UNet2DModel for grey images and its scheduler."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=num_class_embeds,
    ).eval()
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return unet, scheduler


TOY = """import torch

class Toy:
    def encode(self, x): return 3 * torch.nn.functional.pixel_unshuffle(x, 2) + 1
    def decode(self, z): return torch.nn.functional.pixel_shuffle((z - 1) / 3, 2)
"""


def save_toy_autoencoder(folder):
    """One that puts blocks of 2x2 pixels into channels, and loses nothing, as FILE.py:NAME."""
    (folder / "toy.py").write_text(TOY)
    return f"{folder / 'toy.py'}:Toy"
