"""The machines: which window a pixel compares, and with which patches.

For every output pixel p (Kamb & Ganguli, ICML 2025, arXiv 2412.20292):

    x0_hat(p) = sum_{i in S(p)} w_i * centre(phi_i) / sum_{i in S(p)} w_i
    log w_i   = - || x[window(p)] - alpha * phi_i ||^2 / (2 sigma^2)

A machine is no more than a declaration of the window and of the source set S(p); engines evaluate any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.checks import (
    CPU,
    check_images,
    check_labels,
    check_level,
    check_patch_size,
    check_tolerance,
    is_captured,
)
from pyels.denoiser import Denoiser
from pyels.engines import choose_engine, cuda, default_threads, faiss, partial_posterior
from pyels.index import Index, open_index
from pyels.posterior import PartialPosterior, Posterior

MOST_THREADS = 4096
PRECISIONS = ("highest", "high")
_bringing = threading.Lock()

# Images (n, C, H, W), the order and the two ends of each query's range in it as engines take them, and what numbers the
# images have in the bank; None: they are the bank.
Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Window(IntEnum):
    """What a query compares: the whole image, or a k x k square around the pixel. Numbered as in csrc/pyels.h."""

    IMAGE = 0
    SQUARE = 1


class Sources(IntEnum):
    """Where in each image the patches of S(p) lie. Numbered as in csrc/pyels.h."""

    SAME_POSITION = 0
    CIRCULAR = 1
    INTERIOR = 2
    ZEROS = 3

    @property
    def wraps(self) -> bool:
        return self in (Sources.CIRCULAR, Sources.INTERIOR)


class Machine(Denoiser):
    """A closed-form denoiser over a bank of images. Use the subclasses `IS`, `ES`, `LS` and `ELS`."""

    window: Window
    sources: Sources
    tolerance = 0.01

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | None = None,
        engine: str = "auto",
        threads: int | None = None,
        tolerance: float = tolerance,
        index: str | Path | None = None,
        precision: str = PRECISIONS[0],
    ) -> None:
        if not isinstance(bank, PatchBank):
            raise TypeError(f"bank must be a pyels.PatchBank, got {type(bank).__name__}; use PatchBank(images, labels)")
        self.bank = bank
        self.patch_size = None if patch_size is None else self.check_size(patch_size)
        self.engine = choose_engine(engine, bank.device)
        self.device = CPU
        if self.engine == "cuda":
            self.device = cuda.default_device() if bank.device == CPU else bank.device
        self._on_device: tuple[Tensor, Tensor] | None = None  # images and order, once they are there
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise TypeError(f"threads must be an int, got {type(threads).__name__}")
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads must be between 1 and {MOST_THREADS}, got {threads}")
        self.threads = default_threads() if threads is None else threads
        self.tolerance = check_tolerance(tolerance)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.precision = precision
        self.index = index
        self._indexes: dict[tuple[int, int | None], Index] = {}

    def __repr__(self) -> str:
        size = "" if self.window is Window.IMAGE else f", patch_size={self.patch_size}"
        high = f", precision={self.precision!r}" if self.precision != PRECISIONS[0] else ""
        return f"{type(self).__name__}({self.bank!r}{size}, engine={self.engine!r}{high})"

    def denoise(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        labels: Tensor | None = None,
        patch_size: int | None = None,
        tolerance: float | None = None,
    ) -> Tensor:
        """The posterior mean x0_hat.

        Parameters
        ----------
        x           (B, C, H, W) float32 noisy images alpha * x0 + sigma * noise; in CPU memory, or with engine "cuda"
                    also on `device`
        alpha       signal level >= 0, a number or (B,)
        sigma       noise level > 0, a number or (B,)
        labels      (B,) integers: restrict each query to the bank images of its class; None: all images
        patch_size  odd window size in pixels, instead of the machine's own
        tolerance   engine "faiss": how far the mean of a pixel may be from the exact one (half a 95% interval) for its
                    search to end, instead of the machine's own; the other engines are exact

        Returns
        -------
        (B, C, H, W) float32 (float64 from engine "reference"), where x is; each image as if it had been computed alone

        Raises
        ------
        TypeError, ValueError  wrong dtype or shape, NaN or infinite pixels, sigma <= 0, alpha < 0, a class without
                               images, a patch size that is even, not positive, or larger than the boundary allows
        """
        return self.partial(x, alpha, sigma, labels, patch_size, False, tolerance).mean(self._dtype)

    def posterior(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        labels: Tensor | None = None,
        patch_size: int | None = None,
        tolerance: float | None = None,
    ) -> Posterior:
        """The mean with its error, log-evidence, entropy and heaviest source of every pixel; arguments as in
        `denoise`."""
        return self.partial(x, alpha, sigma, labels, patch_size, True, tolerance).finish(self._dtype)

    def denoise_over_sizes(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        sizes: Sequence[int],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The posterior means of the same queries for several patch sizes: what a calibration compares.

        Parameters
        ----------
        sizes   odd patch sizes; the other arguments as in `denoise`

        Returns
        -------
        (K, B, C, H, W), one mean for each of the K sizes, each as `denoise` gives it
        """
        self._check_sizes(sizes)
        return torch.stack([self.denoise(x, alpha, sigma, labels, k) for k in sizes])

    def posterior_over_sizes(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        sizes: Sequence[int],
        labels: Tensor | None = None,
    ) -> list[Posterior]:
        """As `denoise_over_sizes`, with all that `posterior` gives, one posterior for each size."""
        self._check_sizes(sizes)
        return [self.posterior(x, alpha, sigma, labels, k) for k in sizes]

    def partial(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        labels: Tensor | None = None,
        patch_size: int | None = None,
        full: bool = True,
        tolerance: float | None = None,
    ) -> PartialPosterior:
        """The posterior as a mergeable part of that over a larger bank; arguments as in `denoise`.

        Image numbers in `source` count from the start of this machine's bank.
        """
        given = check_images(x, shape=self.bank.shape, device=self.device)
        batch = len(given)
        alphas, sigmas = check_level("alpha", alpha, batch), check_level("sigma", sigma, batch)
        labels = check_labels(labels, batch)
        k = self._size(patch_size)
        tolerance = self.tolerance if tolerance is None else check_tolerance(tolerance)
        if self.engine == "faiss" and self._has_lists(k) and batch > 0:
            return self._sampled(given, alphas, sigmas, labels, k, full, tolerance)
        if is_captured(given) and self._on_device is None:
            raise RuntimeError("call the machine once before a CUDA graph captures it: then its bank is on the GPU")
        x = given.to(self.device)
        begin, end = self._ranges(labels, batch)
        positions = self._positions(k)
        total: PartialPosterior | None = None
        with closing(self._parts(labels, begin, end)) as parts:
            for images, order, first, last, numbers in parts:
                m, s, y, e, top, source = partial_posterior(
                    images,
                    order,
                    first,
                    last,
                    x,
                    alphas,
                    sigmas,
                    "cpu" if self.engine == "faiss" else self.engine,
                    int(self.window),
                    int(self.sources),
                    k,
                    self.threads,
                    full,
                    self.precision == "high",
                )
                if numbers is not None:
                    source = _renumbered(source, numbers.to(self.device), x.shape[2] * x.shape[3])
                count = _beside(x, last - first)[:, None, None] * positions
                part = PartialPosterior(m, s, y, count, *((e, top, source) if full else ()))
                total = part if total is None else total.merge(part)
        assert total is not None
        return total.to(given.device)

    def _has_lists(self, k: int) -> bool:
        """Whether there are windows to search among: LS, IS and ES have few, of which all have to be looked at, and so
        has ELS where every window overhangs the border."""
        _, height, width = self.bank.shape
        everywhere = self.window is Window.SQUARE and self.sources is not Sources.SAME_POSITION
        return everywhere and k <= min(height, width) and height * width <= faiss.MOST_PLACES

    def _sampled(
        self,
        x: Tensor,
        alphas: Tensor,
        sigmas: Tensor,
        labels: Tensor | None,
        k: int,
        full: bool,
        tolerance: float,
    ) -> PartialPosterior:
        """The posterior by engine "faiss": for the queries of each class, the lists of that class."""
        if self.bank.streamed:
            raise ValueError("engine 'faiss' needs the bank in memory or mapped; load it without a memory_limit")
        self.bank.check_file()  # a mapped file that was cut off would kill the process
        begin, end = self._ranges(labels, len(x))
        classes: list[int | None] = [None] if labels is None else sorted(set(labels.tolist()))
        parts, places = [], []
        for label in classes:
            if (k, label) not in self._indexes:
                wraps = self.sources is Sources.CIRCULAR
                self._indexes[k, label] = open_index(self.bank, k, wraps, label, self.index, self.threads)
            of_class = torch.tensor([i for i in range(len(x)) if labels is None or int(labels[i]) == label])
            count = (end - begin)[of_class].double()[:, None, None] * self._positions(k)
            parts.append(
                faiss.sampled_posterior(
                    self.bank,
                    self._indexes[k, label],
                    begin[of_class],
                    end[of_class],
                    label is not None,
                    x[of_class],
                    alphas[of_class],
                    sigmas[of_class],
                    int(self.sources),
                    k,
                    self.threads,
                    full,
                    tolerance,
                    count,
                )
            )
            places.append(of_class)
        return PartialPosterior.stack(parts, torch.cat(places))

    def _parts(self, labels: Tensor | None, begin: Tensor, end: Tensor) -> Generator[Part, None, None]:
        """What `_ranges` gave, or part of every range, in one part, or in several where the bank is streamed: then only
        the images that are needed."""
        bank, zeros = self.bank, torch.zeros_like(begin)
        order = bank.order[:0] if labels is None else bank.order
        ranges = {(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True) if a < b}
        if not bank.streamed:
            for a, b in ranges:  # within a class, image numbers ascend
                bank.check_file(*((a, b) if labels is None else (int(order[a]), int(order[b - 1]) + 1)))
        if not bank.streamed and self._resident():
            images, by_class = self._on_device or (bank.images, bank.order)
            yield images, by_class[: len(order)], begin, end, None
            return
        if not ranges:  # an empty batch, or an empty share of the bank
            nothing = torch.zeros((1, *bank.shape), dtype=bank.dtype, device=self.device)
            yield nothing, order[:0].to(self.device), zeros, zeros, None
            return
        needed = range(*min(ranges)) if labels is None else torch.cat([order[a:b] for a, b in ranges]).sort().values
        some = bank.stream(needed) if bank.streamed else cuda.chunks(bank.images, needed)
        with closing(cuda.upload(some, self.device) if self.engine == "cuda" else some) as parts:
            for numbers, images in parts:
                if labels is None or bank.labels is None:
                    first, last = zeros, torch.full_like(end, len(images))
                    yield images, order.to(self.device), first, last, numbers
                else:  # of a class all images that are needed are in its range
                    classes, of_part = bank.labels[numbers].sort(stable=True)
                    first = torch.searchsorted(classes, labels)
                    last = torch.searchsorted(classes, labels, right=True)
                    yield images, of_part.to(self.device), first, last, numbers

    def _resident(self) -> bool:
        """Whether all images can be where the engine works; brings them there if they are not."""
        if self.device == CPU:
            return True
        with _bringing:  # several threads may use one machine
            if self._on_device is None and cuda.fits(self.bank.images, self.device):
                self._on_device = self.bank.images.to(self.device), self.bank.order.to(self.device)
        return self._on_device is not None

    def pairs(self, labels: Tensor | None, patch_size: int | None = None, batch: int = 1) -> int:
        """The number of pairs (query pixel, source patch) that one call of `denoise` evaluates."""
        labels = check_labels(labels, batch)
        begin, end = self._ranges(labels, batch)
        k = self._size(patch_size)
        return int((end - begin).sum()) * int(self._positions(k).sum())

    def _size(self, patch_size: int | None) -> int:
        """The patch size of a call; 1, which has no meaning, where whole images are compared."""
        if patch_size is None and self.window is Window.IMAGE:
            return 1
        return self.check_size(self.patch_size if patch_size is None else patch_size)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.engine == "reference" else torch.float32

    def check_size(self, patch_size: int | None) -> int:
        _, height, width = self.bank.shape
        return check_patch_size(patch_size, height, width, self.sources.wraps)

    def _check_sizes(self, sizes: Sequence[int]) -> None:
        """Fail before the first size is worked off, not at the last."""
        if not sizes:
            raise ValueError("sizes is empty; give at least one patch size")
        for k in sizes:
            self.check_size(k)

    def _ranges(self, labels: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Where each query's images begin and end in the bank's order, (B,) int64 both."""
        if labels is None:
            return torch.zeros(batch, dtype=torch.int64), torch.full((batch,), len(self.bank), dtype=torch.int64)
        ranges = [self.bank.class_range(c) for c in labels.tolist()]
        return torch.tensor([begin for begin, _ in ranges]), torch.tensor([end for _, end in ranges])

    def _positions(self, k: int) -> Tensor:
        """The number of places in one image that S(p) draws on, (H, W) float64, on the machine's device."""
        _, height, width = self.bank.shape

        def along(n: int) -> Tensor:
            positions = torch.ones(n, dtype=torch.float64, device=self.device)
            if self.sources is Sources.CIRCULAR:
                positions[:] = n
            elif self.sources is Sources.INTERIOR:
                positions[:] = n - k + 1
            elif self.sources is Sources.ZEROS and n >= k:
                positions[k // 2 : n - k // 2] = n - k + 1
            return positions

        return along(height)[:, None] * along(width)[None, :]


def _beside(x: Tensor, numbers: Tensor) -> Tensor:
    """A few numbers (B,) as float64 where x is."""
    if not is_captured(x):
        return numbers.double().to(x.device)
    # A copy from CPU memory would have to be waited for.
    return torch.stack([torch.full((), float(n), dtype=torch.float64, device=x.device) for n in numbers])


def _renumbered(source: Tensor, numbers: Tensor, pixels: int) -> Tensor:
    """Sources in part of a bank, -1 for none, as sources in the bank."""
    return torch.where(source < 0, source, numbers[source.clamp(min=0) // pixels] * pixels + source % pixels)


class _WholeImageMachine(Machine):
    window = Window.IMAGE

    def __init__(self, bank: PatchBank, engine: str = "auto", threads: int | None = None) -> None:
        super().__init__(bank, None, engine, threads)

    def check_size(self, patch_size: int | None) -> int:
        return Denoiser.check_size(self, patch_size)


class IS(_WholeImageMachine):
    """The ideal score machine: whole images, N sources. It reproduces training images, and nothing else.

    Parameters
    ----------
    bank     the training images
    engine   "auto", "cpu", "cuda" or "reference"; see `pyels.engines.choose_engine`
    threads  number of threads, by default the CPUs this process may use; results do not depend on it
    """

    sources = Sources.SAME_POSITION


class ES(_WholeImageMachine):
    """The equivariant score machine: whole images, wrapped around; all N*H*W translates are sources.

    Parameters as of `IS`.
    """

    sources = Sources.CIRCULAR


class LS(Machine):
    """The local score machine: k x k windows, clipped at the border; the N patches at the same position are sources.

    Parameters
    ----------
    bank        the training images
    patch_size  window size k, odd; may be left out if every call gives one
    engine      "auto", "cpu", "cuda" or "reference"; see `pyels.engines.choose_engine`
    threads     number of threads, by default the CPUs this process may use; results do not depend on it
    """

    window = Window.SQUARE
    sources = Sources.SAME_POSITION

    def __init__(
        self, bank: PatchBank, patch_size: int | None = None, engine: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(bank, patch_size, engine, threads)


class ELS(Machine):
    """The equivariant local score machine: k x k windows; patches from everywhere are sources.

    Parameters
    ----------
    bank        the training images
    patch_size  window size k, odd; may be left out if every call gives one
    boundary    "zeros"     windows clipped at the border; a pixel meets the patches whose windows overhang the border
                            by the same four amounts as its own (appendix B.2, "boundary-broken ELS")
                "circular"  windows wrap around; all N*H*W patches are sources (section 3.3)
                "interior"  as the released code: the query's window wraps around, patches lie wholly inside
    engine      "auto", "cpu", "cuda", "faiss" or "reference"; see `pyels.engines.choose_engine`
    threads     number of threads, by default the CPUs this process may use; results do not depend on it
    tolerance   engine "faiss": see `denoise`
    index       engine "faiss": folder of the indexes, which are built when first needed; see
                `pyels.index.default_folder`
    precision   "highest"   exact to float32 rounding
                "high"      engine "cuda" may take inner products of small windows (k * k * C <= 80) of a uint8 bank on
                            tensor cores: means keep to the same bound, 1e-4, but log-weights err by up to 2e-3, mostly
                            all of a pixel alike, if x = alpha * x0 + sigma * noise with x0 within [-1, 1]; where they
                            would err by more, and with other engines, the same as "highest"
    """

    window = Window.SQUARE
    sources = Sources.ZEROS
    boundaries = ("zeros", "circular", "interior")

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | None = None,
        boundary: str = "zeros",
        engine: str = "auto",
        threads: int | None = None,
        tolerance: float = Machine.tolerance,
        index: str | Path | None = None,
        precision: str = PRECISIONS[0],
    ) -> None:
        if boundary not in self.boundaries:
            raise ValueError(f"boundary must be one of {', '.join(self.boundaries)}, got {boundary!r}")
        self.boundary = boundary
        self.sources = Sources[boundary.upper()]
        super().__init__(bank, patch_size, engine, threads, tolerance, index, precision)
