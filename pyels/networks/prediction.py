"""What a network predicts of x = alpha * x0 + sigma * noise: what training asks of it, and x0 from what it answers.

Every prediction y is a sum of image and noise, c * y = a * x0 + b * noise, so that

    x0 = (b * x - sigma * c * y) / (b * alpha - a * sigma)

A new kind of prediction is a new line of the table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (alpha, sigma) -> (c, a, b). Only score needs c: noise over sigma has no limit at sigma = 0, -sigma * score has one.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float, Tensor | float]]] = {
    "eps": lambda alpha, sigma: (1, 0, 1),
    "x0": lambda alpha, sigma: (1, 1, 0),
    "score": lambda alpha, sigma: (-sigma, 0, 1),
    "v": lambda alpha, sigma: (1, -sigma, alpha),
}


def target(predicts: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network would predict, shaped as x0; alpha and sigma (B, 1, 1, 1)."""
    c, a, b = PREDICTIONS[predicts](alpha, sigma)
    return (a * x0 + b * noise) / c


def x0_from(predicts: str, y: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x0 that a prediction y for x implies, shaped as x and of its dtype; alpha and sigma (B, 1, 1, 1) float64.

    Raises ValueError where y says nothing of x0, as noise alone does at alpha = 0.
    """
    if predicts == "x0":
        return y  # the formula's sigma * y / sigma would round, and means nothing at sigma = 0
    c, a, b = PREDICTIONS[predicts](alpha, sigma)
    over = b * alpha - a * sigma
    if not over.all():
        lost = over == 0
        raise ValueError(
            f"a network that predicts {predicts} says nothing of x0 at alpha = {float(alpha[lost][0]):g}, "
            f"sigma = {float(sigma[lost][0]):g}; start at a time below 1"
        )
    c, b, sigma, over = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (c, b, sigma, over))
    return (b * x - sigma * (c * y)) / over
