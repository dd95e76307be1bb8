"""Training of the reference networks: as small as it can be and still train well."""

from __future__ import annotations

import copy
import math

import torch
from tqdm import tqdm

from pyels.bank import PatchBank
from pyels.nets import ResNet
from pyels.schedules import Schedule, make_schedule


def train(
    network: ResNet,
    bank: PatchBank,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    schedule: str | Schedule = "cosine",
    seed: int = 0,
    bfloat16: bool = False,
    progress: bool = True,
) -> tuple[ResNet, list[float]]:
    """Train `network` to predict v on the bank's images; returns an average of its weights, and the losses.

    Minimises E ||v_hat - v||^2, v = alpha * noise - sigma * x0, over images, noise and t uniform in (0, 1], with AdamW,
    a short warm-up and a cosine decay of the learning rate to zero.

    Parameters
    ----------
    network        changed in place; class-conditional if it was built with num_classes, and then the bank needs labels
    steps          optimiser steps
    batch_size     images a step
    learning_rate  its peak
    ema_decay      decay a step of the exponential moving average of the weights
    schedule       noise schedule
    seed           of images, noise and noise levels; initialise the network under a seed of your own
    bfloat16       run the network under bfloat16 autocast: twice as fast on CPUs that have it

    Returns
    -------
    the averaged network, ready for use, and the mean loss of each hundredth of the run
    """
    conditional = network.config["num_classes"] is not None
    if conditional and bank.labels is None:
        raise ValueError("the network is class-conditional, but the bank has no labels")
    generator = torch.Generator().manual_seed(seed)
    noise_schedule = make_schedule(schedule)
    network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4, fused=True)
    warm_up = max(1, min(500, steps // 10))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    losses: list[float] = []
    recent: list[float] = []
    bar = tqdm(range(steps), desc="training", unit="step", disable=not progress)
    for step in bar:
        chosen = torch.randint(len(bank), (batch_size,), generator=generator)
        x0 = bank.read(chosen)
        noise = torch.randn(x0.shape, generator=generator)
        times = (1 - torch.rand(batch_size, generator=generator, dtype=torch.float64)).tolist()
        alpha = torch.tensor([noise_schedule.alpha(t) for t in times])[:, None, None, None]
        sigma = torch.tensor([noise_schedule.sigma(t) for t in times])[:, None, None, None]
        scale = torch.hypot(alpha, sigma)
        alpha, sigma = alpha / scale, sigma / scale
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
            # Early on a plain mean, so that the average does not remember the initial weights.
            rate = max(1 - ema_decay, 1 / (step + 1))
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, rate)
        recent.append(float(loss.detach()))
        if len(recent) == max(1, steps // 100):
            losses.append(sum(recent) / len(recent))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            recent = []
    return average, losses
