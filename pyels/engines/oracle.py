"""The formula, in float64 and in Python: slow, obvious, and what everything else is tested against.

`csrc/reference.cpp` says the same in C++ (engine "reference"); the two were written independently and are tested
against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.definition import Definition, Masks, Sources, WholeImage
from pyels.posterior import Posterior

Array = np.ndarray[Any, Any]


@dataclass
class Oracle:
    """A definition over a bank, evaluated for queries x (B, C, H, W) at one noise level for all, with labels (B,).

    For every pixel p, every patch of S(p), every place z: every window is a mask, L_p(z), and
    log w_i = - sum_z L_p(z) (x(z) - alpha * phi_i(z))^2 / (2 sigma^2); the weights are its softmax.
    """

    definition: Definition
    bank: PatchBank
    x: Tensor
    alpha: float
    sigma: float
    labels: Tensor | None = None
    precision: Tensor | None = None

    def __post_init__(self) -> None:
        responses = self.definition.responses
        self.images = self._all(self.bank)
        self.responses = self.images if responses is None else self._all(responses)
        self.shape = tuple(self.x.shape[1:])
        self.precisions = (torch.ones(self.x.shape) if self.precision is None else self.precision).expand(self.x.shape)

    def _all(self, bank: PatchBank) -> Array:
        """With the mirror images after them."""
        pixels = bank.images.numpy()
        images = pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
        return np.concatenate([images, images[..., ::-1]]) if self.definition.mirror else images

    def sources(self, b: int, row: int, column: int) -> tuple[Array, Array, Array, Array]:
        """What pixel (row, column) of query b is compared with: image numbers (n,), the rows and columns (Q,) of the
        patches in each, and the logarithms of their weights (n, Q)."""
        numbers = np.arange(len(self.bank))
        if self.labels is not None:
            begin, end = self.bank.class_range(int(self.labels[b]))
            numbers = self.bank.order.numpy()[begin:end]
        if self.definition.mirror:
            numbers = np.concatenate([numbers, numbers + len(self.bank)])
        _, height, width = self.shape
        query, precision = self.x[b].double().numpy(), self.precisions[b].double().numpy()
        rows, columns = _sources(self.definition, row, column, height, width)
        log_w = np.zeros((len(numbers), len(rows)))
        for i, j, weight in _window(self.definition, row, column, self.shape, self.alpha, self.sigma):
            zi, zj = (row + i) % height, (column + j) % width
            there = self.images[numbers][:, :, (rows + i) % height, (columns + j) % width]
            weights = (weight * precision[:, zi, zj])[:, None]
            log_w -= (weights * (query[:, zi, zj][:, None] - self.alpha * there) ** 2).sum(axis=1)
        return numbers, rows, columns, log_w / (2 * self.sigma**2)

    def posterior(self) -> Posterior:
        """All fields in float64, of the response at each pixel's own centre, or of the fold."""
        batch, _, height, width = self.x.shape
        mean = np.zeros((batch, self.responses.shape[1], height, width))
        log_evidence, entropy, source_weight = (np.zeros((batch, height, width)) for _ in range(3))
        source = np.zeros((batch, height, width, 3), dtype=np.int64)
        for b, row, column in np.ndindex(batch, height, width):
            numbers, rows, columns, log_w = self.sources(b, row, column)
            top = log_w.max()
            w = np.exp(log_w - top)
            p = w / w.sum()
            centres = self.responses[numbers][:, :, rows, columns]  # (n, R, Q)
            mean[b, :, row, column] = (p[:, None] * centres).sum(axis=(0, 2))
            log_evidence[b, row, column] = top + np.log(w.mean())
            entropy[b, row, column] = -(p[p > 0] * np.log(p[p > 0])).sum()
            n, q = np.unravel_index(int(p.argmax()), p.shape)
            mirrored = numbers[n] >= len(self.bank)
            of_image = width - 1 - columns[q] if mirrored else columns[q]
            source[b, row, column] = numbers[n] % len(self.bank), rows[q], of_image
            source_weight[b, row, column] = p.max()
        if self.definition.fold is not None:
            mean = self.second().folded
        error, certified = np.zeros((batch, height, width)), np.ones((batch, height, width), dtype=bool)
        arrays = mean, log_evidence, entropy, source, source_weight, error, certified
        return Posterior(*map(torch.from_numpy, arrays))

    def second(self, cotangent: Tensor | None = None) -> Second:
        """What follows from the weights of all pairs; cotangent (B, R, H, W), of the derivative."""
        batch, channels, height, width = self.x.shape
        answers = self.responses.shape[1]
        folded, variance = (np.zeros((batch, answers, height, width)) for _ in range(2))
        cover, derivative = np.zeros((height, width)), np.zeros((batch, channels, height, width))
        influence, windows = np.zeros((batch, len(self.bank))), self.definition.windows(height, width).numpy()
        for b, row, column in np.ndindex(batch, height, width):
            if not windows[row, column]:
                continue
            numbers, rows, columns, log_w = self.sources(b, row, column)
            p = np.exp(log_w - log_w.max())
            p /= p.sum()
            np.add.at(influence[b], numbers % len(self.bank), p.sum(axis=1) / windows.sum())
            images, responses = self.images[numbers], self.responses[numbers]
            centres = responses[:, :, rows, columns]
            off = centres - (p[:, None] * centres).sum(axis=(0, 2))[:, None]
            variance[b, :, row, column] = (p[:, None] * off**2).sum(axis=(0, 2))
            places = _window(self.definition, row, column, self.shape, self.alpha, self.sigma)
            if cotangent is not None:
                g = cotangent[b, :, row, column].double().numpy()
                moved = p * (g[:, None] * off).sum(axis=1) * self.alpha / self.sigma**2
                for i, j, weight in places:
                    zi, zj = (row + i) % height, (column + j) % width
                    there = images[:, :, (rows + i) % height, (columns + j) % width]
                    pull = (moved[:, None] * there).sum(axis=(0, 2))
                    derivative[b, :, zi, zj] += weight * self.precisions[b, :, zi, zj].numpy() * pull
            for i, j, _ in places if self.definition.fold is not None else []:
                taps, r = self.definition.fold_taps, self.definition.size // 2
                answer = 1.0 if taps is None else float(taps[i + r] * taps[j + r])
                zi, zj = (row + i) % height, (column + j) % width
                there = responses[:, :, (rows + i) % height, (columns + j) % width]
                folded[b, :, zi, zj] += answer * (p[:, None] * there).sum(axis=(0, 2))
                cover[zi, zj] += answer / batch
        folded = folded / cover if self.definition.fold is not None else folded
        return Second(folded, variance, derivative, influence)


class Second(NamedTuple):
    folded: Array  # (B, R, H, W)
    variance: Array  # (B, R, H, W)
    derivative: Array  # (B, C, H, W)
    influence: Array  # (B, N)


def posterior(definition: Definition, bank: PatchBank, x: Tensor, *level_and_labels: Any) -> Posterior:
    """The posterior of every pixel; further arguments are alpha, sigma, and perhaps labels."""
    return Oracle(definition, bank, x, *level_and_labels).posterior()


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
    taps = window.taps(definition.size).numpy()
    return [
        (i, j, np.full(channels, taps[i + r] * taps[j + r]))
        for i in range(-r, r + 1)
        for j in range(-r, r + 1)
        # Clipped, at the sources just as here.
        if definition.wraps or (0 <= row + i < height and 0 <= column + j < width)
    ]
