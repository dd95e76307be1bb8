"""The best linear denoiser: what a machine knows that looks at means and covariances alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.bank import check_bank
from pyels.bank.pixels import PIECE
from pyels.bank.selection import as_numbers
from pyels.checks import CPU, check_count, check_images
from pyels.denoiser import Denoiser, Pullback, Query

LARGEST = 12288  # side of the largest matrix that is decomposed: 1.2 GB, a quarter of an hour
DIRECT = 2048  # side of the largest of which some eigenvectors are found by finding all
KEPT_BYTES = 1 << 29  # of the decompositions that are kept, of the whole bank or of classes
_ROUNDS, _SETTLED = 100, 1e-12  # of subspace iteration: at most so many, and when its values no longer change


class Wiener(Denoiser):
    """The linear denoiser of least mean squared error, the posterior mean of a Gaussian with the bank's moments:

        x0_hat = mu + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha mu)

    mu is the mean and S the covariance of the flattened images, divided by N - 1 (N. Wiener, Extrapolation,
    Interpolation, and Smoothing of Stationary Time Series, 1949). Computed in float64; the first call of a bank, or of
    a class of it, decomposes S, which is kept for the next. Differentiable in x.

    Parameters
    ----------
    bank      the training images, in CPU memory or streamed
    rank      only so many leading eigenvectors of S, as if there were no variance along the others; of more than 2,048
              images of more than 2,048 values they are found by iteration. None: all, in steps that are the cube of the
              number of images or of values, whichever is smaller
    circular  of the bank with all N*H*W circular translates of its images instead: mean colour and power spectrum, the
              linear counterpart of `ES`; quick at any size

    Raises
    ------
    TypeError, ValueError  bad arguments; from `denoise`: more than 12,288 images of more than 12,288 values, without
                           rank and circular
    """

    wishes = ("selection",)

    def __init__(self, bank: PatchBank, rank: int | None = None, circular: bool = False) -> None:
        self.bank, self.circular = check_bank(bank), circular
        if rank is not None and circular:
            raise ValueError("rank and circular=True were given: a power spectrum is small as it is; leave out rank")
        self.rank = None if rank is None else check_count("rank", rank)
        self._kept: dict[str, Moments] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": {}}

    def check_images(self, x: Tensor) -> Tensor:
        return check_images(x, shape=self.bank.shape)

    def estimate(self, query: Query) -> Tensor:
        return self.estimate_and_pullback(query)[0]

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        self.bank.check_unchanged()
        selection = self.bank.selection_of(query.labels, query.selection, len(query))
        sets: list[tuple[Any, Moments]]
        sets = [(queries, self._moments(name, images)) for name, images, queries in selection.sets()]
        if len(sets) == 1:  # a view is quicker
            sets = [(slice(None), sets[0][1])]
        mean = torch.empty(query.x.shape, dtype=torch.float64, device=CPU)
        for queries, moments in sets:
            mean[queries] = moments.mean

        def shrunk(v: Tensor) -> Tensor:
            """By a symmetric matrix, which is why it takes gradients back, too."""
            done = torch.empty_like(mean)
            for queries, moments in sets:
                done[queries] = moments.shrunk(v[queries], query.alpha[queries], query.sigma[queries])
            return done

        x0 = mean + shrunk(query.x.double() - query.alpha[:, None, None, None] * mean)
        return x0.float(), lambda gradient: shrunk(gradient.double()).to(query.x.dtype)

    def _moments(self, name: str, images: range | Tensor) -> Moments:
        """Those of the images of this name; the oldest that are kept make room."""
        if name not in self._kept:
            self._kept[name] = moments(self.bank, images, self.rank, self.circular)
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return self._kept[name]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance S, by its eigenvectors.

    Attributes
    ----------
    mean     (C, H, W), or (C, 1, 1) of a circular one, float64
    values   (r,) eigenvalues of S, float64; of a circular one (H, W // 2 + 1, 1, C)
    vectors  (C*H*W, r) float64, orthonormal columns; of a circular one (H, W // 2 + 1, C, C) complex, frequency by
             frequency
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def shrunk(self, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha S (alpha^2 S + sigma^2 I)^-1 v, of v (B, C, H, W) float64."""
        circular = self.values.dim() > 1
        seen = torch.fft.rfft2(v, norm="ortho").movedim(1, -1)[..., None, :] if circular else v.flatten(1)
        alpha, sigma = (level.reshape(-1, *[1] * self.values.dim()) for level in (alpha, sigma))
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)
        done: Tensor = (gain * (seen @ self.vectors.conj())) @ self.vectors.mT
        if circular:
            done = torch.fft.irfft2(done[..., 0, :].movedim(-1, 1), s=v.shape[-2:], norm="ortho")
        return done.reshape(v.shape)


class _Centred:
    """Images of a bank in float64, less their mean (of all pixels where it is that of a colour), a part at a time."""

    def __init__(self, bank: PatchBank, images: range | Tensor, of_colour: bool) -> None:
        self.bank, self.numbers, self.mean = bank, as_numbers(images), torch.zeros(1, device=CPU)
        mean = torch.zeros(bank.shape, dtype=torch.float64, device=CPU)
        for part in self:
            mean += part.sum(0) / len(self)
        self.mean = mean.mean((1, 2), keepdim=True) if of_colour else mean

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        channels, height, width = self.bank.shape
        for numbers in torch.split(self.numbers, max(1, PIECE // (8 * channels * height * width))):
            yield self.bank.read(numbers, torch.float64) - self.mean

    def flat(self) -> Iterator[Tensor]:
        return (part.flatten(1) for part in self)


def moments(bank: PatchBank, images: range | Tensor, rank: int | None = None, circular: bool = False) -> Moments:
    """Those of some images of a bank; arguments as of `Wiener`. Eigenvectors without variance are left out."""
    centred = _Centred(bank, images, circular)
    return _circular(centred) if circular else _flattened(centred, rank)


def _flattened(images: _Centred, rank: int | None) -> Moments:
    """By whichever is the smaller matrix, covariances of values or inner products of images."""
    n, d = len(images), math.prod(images.bank.shape)
    if rank is not None and min(n, d) > max(DIRECT, 4 * rank):
        found, vectors = _leading(images, rank, d)
    elif min(n, d) * d > LARGEST**2:
        raise ValueError(
            f"the covariance of {d} values over {n} images is too large: give rank=, as many directions as are to "
            "count, or circular=True, or select fewer images"
        )
    elif d <= n:
        sums = torch.zeros((d, d), dtype=torch.float64, device=CPU)
        for part in images.flat():
            sums.addmm_(part.T, part)
        found, vectors = torch.linalg.eigh(sums)
    else:
        rows = torch.cat(list(images.flat()))
        found, vectors = torch.linalg.eigh(rows @ rows.T)
        some = found > found[-1] * 1e-14
        found, vectors = found[some], (rows.T @ vectors[:, some]) / found[some].sqrt()
    kept = slice(max(0, len(found) - min(n - 1, rank or d)), None)
    return Moments(images.mean, found[kept].clamp(min=0) / max(1, n - 1), vectors[:, kept].contiguous())


def _circular(images: _Centred) -> Moments:
    """Of all translates: at every frequency the channels have a covariance of their own."""
    _, height, width = images.bank.shape
    spectrum: Any = 0
    for part in images:
        seen = torch.fft.rfft2(part, norm="ortho")
        spectrum = spectrum + (seen[:, :, None] * seen[:, None].conj()).sum(0)
    places, spectrum = height * width, spectrum.permute(2, 3, 0, 1)
    values, vectors = torch.linalg.eigh(spectrum * places / max(1, len(images) * places - 1))
    return Moments(images.mean, values.clamp(min=0)[..., None, :], vectors)


def _leading(images: _Centred, rank: int, values: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of the sum of outer products, ascending, by subspace iteration with as many vectors to
    spare (Halko, Martinsson & Tropp, arXiv 0909.4061, section 4.5)."""
    generator = torch.Generator().manual_seed(0)
    columns = min(2 * rank, values)
    vectors = torch.randn(values, columns, generator=generator, dtype=torch.float64, device=CPU)
    before = torch.zeros(columns, dtype=torch.float64, device=CPU)
    for _ in range(_ROUNDS):
        vectors = torch.linalg.qr(vectors).Q
        image = torch.zeros_like(vectors)
        for part in images.flat():
            image.addmm_(part.T, part @ vectors)
        found, turn = torch.linalg.eigh(vectors.T @ image)
        vectors, last = image @ turn, vectors @ turn
        if (found - before)[-rank:].abs().max() <= _SETTLED * found[-1]:
            break
        before = found
    return found, last
