"""The definition, in float64 and in Python: slow, obvious, and what everything else is tested against.

`csrc/reference.cpp` says the same in C++ (engine "reference"); the two were written independently and are tested
against each other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyels.machines import Machine, Sources, Window
from pyels.posterior import Posterior

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def posterior(
    machine: Machine,
    x: Tensor,
    alpha: float,
    sigma: float,
    labels: Tensor | None = None,
    patch_size: int | None = None,
) -> Posterior:
    """The posterior of every pixel, all fields in float64; arguments as in `Machine.denoise`, one noise level for all.

    For every pixel, every patch of S(p): log w_i = -||x[window(p)] - alpha * phi_i||^2 / (2 sigma^2); the weights are
    its softmax.
    """
    bank = machine.bank
    pixels = bank.images.numpy()
    images = pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
    k = patch_size or machine.patch_size or 1
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
        whole_image = machine.window is Window.IMAGE
        if whole_image:  # one weight for a displacement, whichever the pixel
            distances, move_rows, move_columns = _moved_image_distances(machine.sources, query, chosen, alpha)
        for row in range(height):
            for column in range(width):
                if whole_image:
                    rows, columns = (row + move_rows) % height, (column + move_columns) % width
                else:
                    rows, columns = _sources(machine.sources, row, column, k, height, width)
                    distances = _window_distances(machine.sources, query, chosen, row, column, rows, columns, k, alpha)
                log_w = -distances / (2 * sigma**2)
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
    return Posterior(*map(torch.from_numpy, (mean, log_evidence, entropy, source, source_weight, error, certified)))


def _sources(sources: Sources, row: int, column: int, k: int, height: int, width: int) -> tuple[Array, Array]:
    """Rows and columns of the patches in one image that pixel (row, column) is compared with, (Q,) both."""
    r = k // 2

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


def _window_distances(
    sources: Sources,
    query: Array,
    images: Array,
    row: int,
    column: int,
    rows: Array,
    columns: Array,
    k: int,
    alpha: float,
) -> Array:
    """||x[window] - alpha * phi||^2 (n, Q) of every image's patches around (rows, columns)."""
    _, height, width = query.shape
    total = np.zeros((len(images), len(rows)))
    for i in range(-(k // 2), k // 2 + 1):
        for j in range(-(k // 2), k // 2 + 1):
            if not sources.wraps and not (0 <= row + i < height and 0 <= column + j < width):
                continue  # clipped, at the sources just as here
            x = query[:, (row + i) % height, (column + j) % width]
            phi = images[:, :, (rows + i) % height, (columns + j) % width]
            total += ((x[:, None] - alpha * phi) ** 2).sum(axis=1)
    return total


def _moved_image_distances(sources: Sources, query: Array, images: Array, alpha: float) -> tuple[Array, Array, Array]:
    """||x - alpha * image||^2 (n, D) of every image at D displacements, and their rows and columns (D,)."""
    _, height, width = query.shape
    one_place = sources is Sources.SAME_POSITION
    moves = [(i, j) for i in range(1 if one_place else height) for j in range(1 if one_place else width)]
    distances = [((query - alpha * np.roll(images, (-i, -j), axis=(2, 3))) ** 2).sum(axis=(1, 2, 3)) for i, j in moves]
    rows, columns = np.array(moves).T
    return np.stack(distances, axis=1), rows, columns
