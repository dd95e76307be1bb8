"""The machines by name. Each is its definition (Kamb & Ganguli, ICML 2025, arXiv 2412.20292)."""

from __future__ import annotations

from typing import Any

from pyels.bank import PatchBank
from pyels.definition import Definition, Fold, Gaussian, Sized, Sources, Square, WholeImage
from pyels.engines import Engine
from pyels.machines.machine import Machine


class IS(Machine):
    """The ideal score machine: whole images, N sources. It reproduces training images, and nothing else.

    Parameters
    ----------
    bank     the training images
    engine   see `Machine`
    threads  number of threads, by default the CPUs this process may use; results do not depend on it
    options  further options of the engine
    """

    def __init__(
        self, bank: PatchBank, engine: str | Engine = "auto", threads: int | None = None, **options: Any
    ) -> None:
        definition = Definition(WholeImage(), Sources.SAME_POSITION)
        super().__init__(bank, definition, engine, threads=threads, **options)


class ES(Machine):
    """The equivariant score machine: whole images, wrapped around; all N*H*W translates are sources.

    Parameters as of `IS`.
    """

    def __init__(
        self, bank: PatchBank, engine: str | Engine = "auto", threads: int | None = None, **options: Any
    ) -> None:
        super().__init__(bank, Definition(WholeImage(), Sources.CIRCULAR), engine, threads=threads, **options)


class LS(Machine):
    """The local score machine: k x k windows, clipped at the border; the N patches at the same position are sources.

    Parameters
    ----------
    bank        the training images
    patch_size  window size k, odd; may be left out if every call gives one
    engine      see `Machine`
    threads     number of threads, by default the CPUs this process may use; results do not depend on it
    window      instead of patch_size, another window that has a size: `Gaussian(width)`, `Square(k, inside=True)`
    fold        None, "uniform" or `Fold(rho)`: what answers, see `Definition`
    mirror      whether the left-right mirror images are sources too
    options     further options of the engine
    """

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | None = None,
        engine: str | Engine = "auto",
        threads: int | None = None,
        *,
        window: Square | Gaussian | None = None,
        fold: str | Fold | None = None,
        mirror: bool = False,
        **options: Any,
    ) -> None:
        definition = Definition(_window(patch_size, window), Sources.SAME_POSITION, fold, mirror)
        super().__init__(bank, definition, engine, threads=threads, **options)


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
    engine      see `Machine`
    threads     number of threads, by default the CPUs this process may use; results do not depend on it
    window      instead of patch_size, another window that has a size; fold and mirror as of `LS`
    options     further options of the engine: precision of `pyels.engines.Cuda`, tolerance, index and dice of
                `pyels.engines.Sampled`
    """

    boundaries = ("zeros", "circular", "interior")

    def __init__(
        self,
        bank: PatchBank,
        patch_size: int | None = None,
        boundary: str = "zeros",
        engine: str | Engine = "auto",
        threads: int | None = None,
        *,
        window: Square | Gaussian | None = None,
        fold: str | Fold | None = None,
        mirror: bool = False,
        **options: Any,
    ) -> None:
        if boundary not in self.boundaries:
            raise ValueError(f"boundary must be one of {', '.join(self.boundaries)}, got {boundary!r}")
        definition = Definition(_window(patch_size, window), boundary, fold, mirror)
        super().__init__(bank, definition, engine, threads=threads, **options)


def _window(patch_size: int | None, window: Square | Gaussian | None) -> Square | Gaussian:
    if window is None:
        return Square(patch_size)
    if not isinstance(window, Sized):
        raise TypeError(f"window must be Square(k) or Gaussian(width), got {window!r}")
    if patch_size is not None:
        raise ValueError(f"patch_size {patch_size} and window {window} were given; say the size in the window")
    return window
