"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) of a network or of a machine."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from pyels.checks import check_number
from pyels.denoiser import Composite, Denoiser, Pullback, Query
from pyels.networks.adapters import NetworkDenoiser


class Guided(Composite):
    """A denoiser whose estimates lean further towards a class: eps = eps_none + scale * (eps_label - eps_none).

    Of a machine, "none" is the whole bank, of a network its `null_label`. Clips as the denoiser does.

    Parameters
    ----------
    denoiser  a machine, or a network with a null_label; is asked twice
    scale     0: no class; 1: the class, as without guidance; more: further

    Raises
    ------
    TypeError, ValueError  no denoiser, a network without null_label, a scale that is not finite; from `denoise`: no
                           labels
    """

    conditional = True

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        super().__init__(denoiser)
        if isinstance(denoiser, NetworkDenoiser) and denoiser.null_label is None:
            raise ValueError("guidance needs a network with a label for no class: give NetworkDenoiser a null_label")
        self.scale = check_number("scale", scale)
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {scale}")
        self.wishes = tuple(wish for wish in denoiser.wishes if wish != "selection")  # labels choose the images
        for name in ("num_classes", "channels", "size"):
            setattr(self, name, getattr(denoiser, name, None))

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        if query.labels is None:
            raise ValueError("labels: guidance needs the class of every image")
        x0, of_class = self.denoiser.estimate_and_pullback(query)
        none, of_all = self.denoiser.estimate_and_pullback(replace(query, labels=None))
        return none + self.scale * (x0 - none), lambda g: of_all((1 - self.scale) * g) + of_class(self.scale * g)
