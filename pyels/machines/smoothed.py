"""The ideal score machine, smoothed so that it does not only recite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.checks import CPU, check_count, check_number
from pyels.denoiser import Composite, Pullback, Query
from pyels.engines import Engine
from pyels.machines.named import IS


class SmoothedIS(Composite):
    """The mean of `IS` over perturbed queries (Scarvelis, Borde & Solomon, arXiv 2310.12395):

        x0_hat(x) = mean over m of IS(x + std * noise_m)

    The noise comes from the seed: it is the same for every image and in every call. Differentiable in x.

    Parameters
    ----------
    bank     the training images
    std      of the noise, in the units of x; not negative
    draws    M, how many perturbations
    seed     of the noise
    engine   see `Machine`
    options  options of the engine

    Raises
    ------
    TypeError, ValueError  bad arguments
    """

    def __init__(
        self,
        bank: PatchBank,
        std: float = 0.1,
        draws: int = 10,
        seed: int = 0,
        engine: str | Engine = "auto",
        **options: Any,
    ) -> None:
        super().__init__(IS(bank, engine, **options))
        self.bank, self.std, self.draws, self.seed = bank, check_number("std", std), check_count("draws", draws), seed
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std must be finite and not negative, got {std}")
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn((draws, *bank.shape), generator=generator, dtype=torch.float32, device=CPU)

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        shape = query.x.shape
        repeated = query.of([b for b in range(len(query)) for _ in range(self.draws)])
        x = query.x[:, None] + self.std * self.noise.to(query.x.device)
        x0, back = self.denoiser.estimate_and_pullback(replace(repeated, x=x.reshape(-1, *shape[1:])))

        def pullback(gradient: Tensor) -> Tensor:
            each = gradient[:, None].expand(-1, self.draws, -1, -1, -1).reshape(-1, *shape[1:])
            return back(each / self.draws).reshape(len(query), self.draws, *shape[1:]).sum(1)

        return x0.reshape(len(query), self.draws, *shape[1:]).mean(1), pullback
