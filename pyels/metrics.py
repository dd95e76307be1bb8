"""How alike two sets of images are, each measure by its own name.

All take a and b of the same shape (B, ...) and return (B,) float64, one figure an image. The ELS paper's released
evaluation plots what is `pearson_r` here under the name r^2; `pearson_r2` is its square, `r2_score` the coefficient of
determination. They differ. How near images come to those of a bank: `pyels.novelty`, whose functions are here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyels.novelty import Nearest, Patches, log_evidence, nearest_image, nearest_patches

__all__ = [
    "Nearest",
    "Patches",
    "cosine",
    "log_evidence",
    "mse",
    "nearest_image",
    "nearest_patches",
    "pearson_r",
    "pearson_r2",
    "r2_score",
]


def pearson_r(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the pixels of each image, in [-1, 1]; 0 where either image is constant."""
    a, b = _rows(a, b)
    return _cosine(_centred(a), _centred(b))


def pearson_r2(a: Tensor, b: Tensor) -> Tensor:
    """Square of `pearson_r`, in [0, 1]."""
    return pearson_r(a, b).square()


def r2_score(a: Tensor, b: Tensor) -> Tensor:
    """Coefficient of determination 1 - SSE / SST of b as a prediction of a; at most 1, and negative where b is worse
    than a's own mean. Where a is constant: 1 if b equals it, else 0."""
    a, b = _rows(a, b)
    errors = (a - b).square().sum(dim=1)
    total = _centred(a).square().sum(dim=1)
    constant = total == 0
    return torch.where(constant, (errors == 0).double(), 1 - errors / torch.where(constant, 1.0, total))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the pixels of each image."""
    a, b = _rows(a, b)
    return (a - b).square().mean(dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two images as vectors, in [-1, 1]; 0 where either is all zero."""
    return _cosine(*_rows(a, b))


def _centred(a: Tensor) -> Tensor:
    """Each row less its mean; exactly zero where it is constant, whatever the rounding of the mean."""
    constant = (a == a[:, :1]).all(dim=1, keepdim=True)
    return torch.where(constant, 0.0, a - a.mean(dim=1, keepdim=True))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(dim=1) / torch.where(norms > 0, norms, 1.0), 0.0).clamp(-1, 1)


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() < 2 or value[0:1].numel() == 0:
            raise ValueError(f"{name} must have shape (B, ...), with B at least 1, got {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.detach().double().flatten(1), b.detach().double().flatten(1)
