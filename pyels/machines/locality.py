"""Machines whose windows follow the data, or a network, and those of which whole windows answer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.checks import CPU, check_share
from pyels.definition import UNIFORM, Definition, Masks, Sources, Square
from pyels.denoiser import Pullback, Query
from pyels.engines import Engine
from pyels.machines.linear import LARGEST, Moments, moments
from pyels.machines.machine import Machine
from pyels.posterior import PartialPosterior, Want

KEPT_BYTES = 256 << 20  # of windows, one byte a value
BY = ("matrix", "output")


class PCALocality(Machine):
    """The ideal score machine within windows that follow from the data's covariance S and the noise level (Lukoianov et
    al., arXiv 2509.09672):

        W = alpha^2 S (alpha^2 S + sigma^2 I)^-1, where W[n, n] < 1e-6 is replaced by 1
        R[n, m]    = W[n, m] / W[n, n]
        x0_hat(m)  = sum_i w_i(m) phi_i(m) / sum_i w_i(m)
        log w_i(m) = - sum_n (x(n) - alpha phi_i(n))^2 / (2 sigma^2 temperature), n with |R[n, m]| >= threshold max |R|

    n and m are values, pixels and channels: each has a window of its own. It may be empty; all images then weigh alike.
    S and W are computed in float64 (in float32, as released, entries fall on the other side of the threshold) and from
    the whole bank, whichever of its images a call selects.

    Parameters
    ----------
    bank         the training images, 2 or more, of up to 12,288 values each. The first call decomposes S, the first at
                 every noise level multiplies matrices of its size; windows of the last levels are kept
    threshold    from 0, all values, to 1; a call may say another. In use: .005 or .02 for MNIST and Fashion-MNIST, .03
                 or .05 for CIFAR-10, .02 for faces
    temperature  > 0, a factor of sigma^2 in the weights
    by           "matrix": as released; "output": R[n, m] = W[n, m] / W[m, m]
    engine       see `Machine`; "auto", "cpu" or "reference"
    threads      number of threads, by default the CPUs this process may use; results do not depend on it
    options      further options of the engine

    Raises
    ------
    TypeError, ValueError  bad arguments; images that are too large, fewer than two of them
    """

    def __init__(
        self,
        bank: PatchBank,
        threshold: float = 0.02,
        temperature: float = 1.0,
        by: str = "matrix",
        engine: str | Engine = "auto",
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self.threshold = check_share("threshold", threshold)
        if by not in BY:
            raise ValueError(f"by must be one of {', '.join(map(repr, BY))}, got {by!r}")
        self.by = by
        window = Masks(self._windows_of, "threshold", self.threshold, temperature)
        super().__init__(bank, Definition(window, Sources.SAME_POSITION), engine, threads=threads, **options)
        if (values := math.prod(bank.shape)) > LARGEST:
            raise ValueError(
                f"images {bank.shape} have {values} values, too many for their covariance; PCALocality takes images of "
                f"up to {LARGEST}: load smaller ones, with size="
            )
        if len(bank) < 2:
            raise ValueError("a covariance needs at least 2 images, but the bank has 1")
        self._moments: Moments | None = None
        self._kept: dict[tuple[float, ...], Tensor] = {}

    @cached_property
    def stacked(self) -> Machine:
        """The same over images of one channel, (1, C*H, W), in which every value is a pixel, with a window and a
        posterior of its own."""
        return Machine(self.bank.stacked(), self.definition, self.engine)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without what they find again."""
        kept = {name: value for name, value in vars(self).items() if name != "stacked"}
        return {**kept, "_moments": None, "_kept": {}}

    def estimate(self, query: Query) -> Tensor:
        return self.stacked.estimate(_stack(query)).reshape(query.x.shape)

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        mean, pullback = self.stacked.estimate_and_pullback(stacked := _stack(query))
        shape = query.x.shape
        return mean.reshape(shape), lambda gradient: pullback(gradient.reshape(stacked.x.shape)).reshape(shape)

    def partial(self, query: Query, want: Want = Want.POSTERIOR) -> PartialPosterior:
        """As of any machine, of images with one channel."""
        if self.bank.shape[0] > 1:
            raise ValueError(
                f"PCALocality has a posterior for each of the {self.bank.shape[0]} channels of a pixel, and for the "
                "pixel a mean alone; use denoise, or machine.stacked, in which every value of (1, C*H, W) is a pixel"
            )
        return super().partial(query, want)

    def windows(self, alpha: float, sigma: float, threshold: float | None = None) -> Tensor:
        """The windows at one noise level, (C, H, W, C, H, W) bool: of every value m all values n."""
        level = float(alpha), float(sigma), self.threshold if threshold is None else check_share("threshold", threshold)
        if level not in self._kept:
            self._kept[level] = self._found(*level)
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return self._kept[level].reshape(*self.bank.shape, *self.bank.shape)

    def _windows_of(self, *level: float) -> Tensor:
        """As sets of a mask, (C*H*W, C*H, W)."""
        channels, height, width = self.bank.shape
        return self.windows(*level).reshape(-1, channels * height, width)

    def _found(self, alpha: float, sigma: float, threshold: float) -> Tensor:
        """(d, d) bool, m first."""
        if self._moments is None:
            self._moments = moments(self.bank, range(len(self.bank)))
        signal = alpha**2 * self._moments.values
        root = self._moments.vectors * (signal / (signal + sigma**2)).sqrt()
        ratio = (root @ root.T).abs_()  # symmetric: rows are m from here on
        own = ratio.diagonal()
        own[own < 1e-6] = 1
        ratio /= own.clone()[:, None] if self.by == "output" else own.clone()[None, :]
        return ratio >= threshold * ratio.max()


def _stack(query: Query) -> Query:
    """With the channels below each other, (B, 1, C*H, W)."""
    stacked = query.x.flatten(1, 2)[:, None]
    precision = None if query.precision is None else query.precision.reshape(stacked.shape)
    return replace(query, x=stacked, precision=precision)


class PSPC(Machine):
    """The patch set posterior composite (Niedoba et al., arXiv 2411.19339): a window answers for all its pixels, by the
    posterior mean of the same window of all images, and a pixel is the mean over the windows p that cover it:

        x0_hat(q)  = mean_p sum_i w_i(p) phi_i(q) / sum_i w_i(p)
        log w_i(p) = - sum over z in window p of (x(z) - alpha phi_i(z))^2 / (2 sigma^2)

    Square: all k x k windows that lie wholly inside the image. Flex: of every pixel the fewest pixels to which a
    network's output there is sensitive. In use for CIFAR-10, at the 18 levels of EDM, noisiest first: k = 32 (as `IS`)
    seven times, 23 15 11 7 5, and 3 six times; mass 1 seven times, .7 .7 .5, .4 four times and .3 four times.

    Parameters
    ----------
    bank        the training images
    patch_size  window size k, odd; may be left out if every call gives one
    heatmaps    (H, W, H, W), not negative: [a, b] is the sensitivity of output pixel (a, b), such as the mean absolute
                gradient of a network; then windows have no size
    mass        share of the sensitivity: the window of a pixel holds pixels in descending order as long as those before
                hold at most so much; 1: all pixels. A call may say another
    mirror      whether mirror images are sources too
    engine      see `Machine`
    threads     number of threads, by default the CPUs this process may use; results do not depend on it
    options     further options of the engine

    Raises
    ------
    TypeError, ValueError  bad arguments; by a call: a pixel that no window covers
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | None = None,
        heatmaps: Any = None,
        mass: float = 1.0,
        mirror: bool = True,
        engine: str | Engine = "auto",
        threads: int | None = None,
        **options: Any,
    ) -> None:
        if heatmaps is not None and patch_size is not None:
            raise ValueError("patch_size and heatmaps were given; windows are squares, or follow heatmaps")
        window: Square | Masks = Square(patch_size, inside=True)
        if heatmaps is not None:
            window = Masks(SensitiveSets(heatmaps), "mass", check_share("mass", mass))
        definition = Definition(window, Sources.SAME_POSITION, fold=UNIFORM, mirror=mirror)
        super().__init__(bank, definition, engine, threads=threads, **options)
        if isinstance(window, Masks):
            window.at(1.0, 1.0, bank.shape)  # raises for heatmaps that do not fit


class SensitiveSets:
    """The windows of `PSPC` by heatmaps (H, W, H, W): of a mass, masks (H*W, H, W) bool."""

    def __init__(self, heatmaps: Any) -> None:
        maps = torch.as_tensor(heatmaps, device=CPU).detach().double()
        if maps.dim() != 4 or maps.shape[:2] != maps.shape[2:]:
            raise ValueError(f"heatmaps must be (H, W, H, W), got {tuple(maps.shape)}")
        if not torch.isfinite(maps).all() or (maps < 0).any():
            raise ValueError("heatmaps must be finite and not negative")
        self._shape = (-1, *maps.shape[:2])
        held, self._order = maps.flatten(2).flatten(0, 1).sort(dim=1, descending=True, stable=True)
        upto = held.cumsum(1)
        self._before, self._all = upto - held, upto[:, -1:]
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, alpha: float, sigma: float, mass: float) -> Tensor:
        last = self._last
        if last is None or last[0] != mass:
            chosen = self._before <= mass * self._all
            last = mass, torch.zeros_like(chosen).scatter_(1, self._order, chosen).reshape(self._shape)
            self._last = last
        return last[1]
