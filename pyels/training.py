"""Training of the reference networks by denoising, as small as it can be and still train well."""

from __future__ import annotations

import copy
import math

import torch
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.nets import ResNet
from pyels.schedules import make_schedule


def train(
    network: ResNet,
    bank: PatchBank,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    schedule: str = "cosine",
    seed: int = 0,
    bfloat16: bool = False,
    progress: bool = True,
) -> tuple[ResNet, list[float]]:
    """Train `network` to predict v on the bank's images; returns its exponential moving average and the losses.

    Minimises E || v_hat - v ||^2 over images, noise and t uniform in (0, 1], with AdamW, a short warm-up and a cosine
    decay of the learning rate to zero. The loss list holds the mean over each hundredth of the run.

    Parameters
    ----------
    steps          optimiser steps
    batch_size     images per step
    learning_rate  peak learning rate
    ema_decay      decay per step of the returned average of the weights
    schedule       noise schedule name
    seed           seeds images, noise and noise levels; initialise the network under a seed of its own
    bfloat16       run the convolutions under bfloat16 autocast (twice as fast on CPUs that have it)
    """
    generator = torch.Generator().manual_seed(seed)
    noise_schedule = make_schedule(schedule)
    network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4, fused=True)
    warmup = max(1, min(500, steps // 10))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    conditional = network.config["num_classes"] is not None
    losses, recent = [], []
    bar = tqdm(range(steps), desc="training", unit="step", disable=not progress)
    for step in bar:
        chosen = torch.randint(len(bank), (batch_size,), generator=generator)
        x0 = bank.read(chosen)
        noise = torch.randn(x0.shape, generator=generator)
        t = 1 - torch.rand(batch_size, generator=generator, dtype=torch.float64)
        alpha = torch.tensor([noise_schedule.alpha(float(u)) for u in t])[:, None, None, None]
        sigma = torch.tensor([noise_schedule.sigma(float(u)) for u in t])[:, None, None, None]
        x = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        labels = bank.labels[chosen] if conditional and bank.labels is not None else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            v = network(x, torch.atan2(sigma, alpha).flatten(), labels)
        loss = (v.float() - (alpha * noise - sigma * x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            # The average starts as a plain mean, so that it does not remember the initial weights.
            rate = max(1 - ema_decay, 1 / (step + 1))
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, rate)
        recent.append(float(loss))
        if len(recent) == max(1, steps // 100):
            losses.append(sum(recent) / len(recent))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            recent = []
    return average, losses
