"""The formula, in float64 and in Python: slow, obvious, and what everything else is tested against.

`csrc/reference.cpp` says the same in C++ (engine "reference"); the two were written independently and are tested
against each other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.definition import Definition, Masks, Sources, WholeImage
from pyels.posterior import Posterior

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def posterior(
    definition: Definition, bank: PatchBank, x: Tensor, alpha: float, sigma: float, labels: Tensor | None = None
) -> Posterior:
    """The posterior of every pixel, all fields in float64; x (B, C, H, W), one noise level for all, labels (B,).

    For every pixel p, every patch of S(p), every place z: every window is a mask, M_p(z), and
    log w_i = - sum_z M_p(z) (x(z) - alpha * phi_i(z))^2 / (2 sigma^2); the weights are its softmax.
    """
    pixels = bank.images.numpy()
    images = pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
    batch, channels, height, width = x.shape
    mean = np.zeros((batch, channels, height, width))
    log_evidence, entropy, source_weight = (np.zeros((batch, height, width)) for _ in range(3))
    source = np.zeros((batch, height, width, 3), dtype=np.int64)
    for b in range(batch):
        numbers = np.arange(len(bank))
        if labels is not None:
            begin, end = bank.class_range(int(labels[b]))
            numbers = bank.order.numpy()[begin:end]
        query, chosen = x[b].double().numpy(), images[numbers]
        for row in range(height):
            for column in range(width):
                rows, columns = _sources(definition, row, column, height, width)
                log_w = np.zeros((len(chosen), len(rows)))
                for i, j, weight in _window(definition, row, column, query.shape, alpha, sigma):
                    here = query[:, (row + i) % height, (column + j) % width]
                    there = chosen[:, :, (rows + i) % height, (columns + j) % width]
                    log_w -= (weight[:, None] * (here[:, None] - alpha * there) ** 2).sum(axis=1) / (2 * sigma**2)
                top = log_w.max()
                w = np.exp(log_w - top)
                p = w / w.sum()
                centres = chosen[:, :, rows, columns]  # (n, C, Q)
                mean[b, :, row, column] = (p[:, None] * centres).sum(axis=(0, 2))
                log_evidence[b, row, column] = top + np.log(w.mean())
                entropy[b, row, column] = -(p[p > 0] * np.log(p[p > 0])).sum()
                n, q = np.unravel_index(int(p.argmax()), p.shape)
                source[b, row, column] = numbers[n], rows[q], columns[q]
                source_weight[b, row, column] = p.max()
    error, certified = np.zeros((batch, height, width)), np.ones((batch, height, width), dtype=bool)
    arrays = mean, log_evidence, entropy, source, source_weight, error, certified
    return Posterior(*[torch.from_numpy(array) for array in arrays])


def _sources(definition: Definition, row: int, column: int, height: int, width: int) -> tuple[Array, Array]:
    """Rows and columns of the patches in one image that pixel (row, column) is compared with, (Q,) both."""
    sources, r = definition.sources, definition.size // 2

    def overhang(i: int, n: int) -> tuple[int, int]:
        return max(0, r - i), max(0, i + r - (n - 1))

    def allowed(i: int, p: int, n: int) -> bool:
        if sources is Sources.SAME_POSITION:
            return i == p
        if sources is Sources.CIRCULAR:
            return True
        if sources is Sources.INTERIOR:
            return overhang(i, n) == (0, 0)
        return overhang(i, n) == overhang(p, n)

    places = [
        (i, j) for i in range(height) for j in range(width) if allowed(i, row, height) and allowed(j, column, width)
    ]
    rows, columns = np.array(places).T
    return rows, columns


def _window(
    definition: Definition, row: int, column: int, shape: tuple[int, ...], alpha: float, sigma: float
) -> list[tuple[int, int, Array]]:
    """The mask of pixel (row, column): places, counted from it, and their weights (C,) where they are not zero."""
    channels, height, width = shape
    window = definition.window
    if isinstance(window, Masks):
        mask = window.at(alpha, sigma, (channels, height, width))[row * width + column].numpy()
    else:
        mask = np.ones(shape)
    if isinstance(window, (Masks, WholeImage)):
        places = [(i, j) for i in range(height) for j in range(width) if mask[:, i, j].any()]
        return [(i - row, j - column, mask[:, i, j]) for i, j in places]
    r = definition.size // 2
    return [
        (i, j, np.ones(channels))
        for i in range(-r, r + 1)
        for j in range(-r, r + 1)
        # Clipped, at the sources just as here.
        if definition.wraps or (0 <= row + i < height and 0 <= column + j < width)
    ]
