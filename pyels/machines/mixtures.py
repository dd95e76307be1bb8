"""Mixtures over window sizes, of which every pixel of every query takes those that suit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.checks import beside, check_number
from pyels.denoiser import Composite, Pullback, Query, refuse_derivative
from pyels.engines import Engine
from pyels.machines.machine import Machine
from pyels.machines.named import ELS, LS
from pyels.posterior import Want

SIZES, BETA = (3, 5, 7, 9, 11), 5.0  # as published


class Mixture(Composite):
    """At every pixel the mean over window sizes k of a machine's posterior means (arXiv 2607.08041), weighted with

        exp(-E_k),    E_k = beta alpha^2 / sigma^2 Var_k - S_k

    Var_k is the posterior variance at the pixel, its mean over the channels, and S_k the entropy of the posterior
    there, in nats: sizes count that leave many sources which agree.

    Parameters
    ----------
    machine  one whose windows have a size, and whose engine has a second pass
    sizes    odd, k of the windows
    beta     not negative
    """

    denoiser: Machine

    def __init__(self, machine: Machine, sizes: Sequence[int] = SIZES, beta: float = BETA) -> None:
        super().__init__(machine)
        self.bank, self.parameter = machine.bank, None
        self.sizes = tuple(machine.check_wish("patch_size", k) for k in sizes)
        if not self.sizes:
            raise ValueError("sizes is empty; give at least one patch size")
        self.beta = check_number("beta", beta)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be finite and not negative, got {beta}")
        if "second" not in machine.engine.knows:
            raise machine.engine.no_second_pass()

    def check_wish(self, name: str, value: Any) -> Any:
        if name == "patch_size" and value is not None:
            raise ValueError(f"patch_size {value} was given, but {type(self).__name__} has {self.sizes}; leave it out")
        return super().check_wish(name, value)

    def estimate(self, query: Query) -> Tensor:
        means, merits = [], []
        scale = beside(query.x, self.beta * (query.alpha / query.sigma) ** 2)[:, None, None]
        for k in self.sizes:
            of_size = replace(query, patch_size=k)
            partial = self.denoiser.partial(of_size, Want.POSTERIOR | Want.SECOND)
            posterior = partial.finish(torch.float64)
            means.append(posterior.mean)
            merits.append(posterior.entropy - scale * self.denoiser.variance_of(of_size, partial).double().mean(1))
        shares = torch.stack(merits).softmax(0)[:, :, None]
        return (shares * torch.stack(means)).sum(0).to(self.denoiser.engine.dtype)

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        return self.estimate(query), refuse_derivative


class ASLS(Mixture):
    """The mixture of `LS` over window sizes: see `Mixture`.

    Parameters
    ----------
    bank     the training images
    sizes    odd, k of the windows
    beta     see `Mixture`
    engine   see `Machine`
    options  options of the engine
    """

    def __init__(
        self,
        bank: PatchBank,
        sizes: Sequence[int] = SIZES,
        beta: float = BETA,
        engine: str | Engine = "auto",
        **options: Any,
    ) -> None:
        super().__init__(LS(bank, engine=engine, **options), sizes, beta)


class ASELS(Mixture):
    """The mixture of `ELS` over window sizes; parameters as of `ASLS`, and boundary as of `ELS`."""

    def __init__(
        self,
        bank: PatchBank,
        sizes: Sequence[int] = SIZES,
        beta: float = BETA,
        boundary: str = "zeros",
        engine: str | Engine = "auto",
        **options: Any,
    ) -> None:
        super().__init__(ELS(bank, None, boundary, engine, **options), sizes, beta)
