"""What machines and networks have in common: what they are asked, a posterior mean, and all that follows from it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyels.bank.selection import Selection, check_selection
from pyels.checks import (
    CPU,
    Levels,
    beside,
    check_images,
    check_labels,
    check_level,
    check_patch_size,
    check_precision,
    check_share,
    check_tolerance,
    check_width,
    checked,
    checks_of,
)

F = TypeVar("F", bound=Callable[..., Any])
_NO_DERIVATIVE = (
    "a derivative was asked for of what has none in pyels, which differentiates denoise, eps, score and samples of "
    "machines alone: give it x.detach(), call it under torch.no_grad(), or take finite differences"
)
_NO_SECOND = (
    "second derivatives, and those forward in x, are not computed: take finite differences of the first, by backward"
)
_NO_VMAP = "torch.vmap over a denoiser is not supported: give it the whole batch, (B, C, H, W), in one call"
# From the gradient of something with respect to x0_hat, that with respect to x.
Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Query:
    """Noisy images x = alpha * x0 + sigma * noise, and what is known of them and wished for.

    Made and checked in one place, `Denoiser.query`; whatever gets one relies on it.

    Attributes
    ----------
    x           (B, C, H, W) float32, contiguous, in CPU memory or on the denoiser's device
    alpha       (B,) float64 signal levels >= 0, in CPU memory
    sigma       (B,) float64 noise levels > 0, in CPU memory
    labels      (B,) int64 classes of the images, in CPU memory; None: of any class
    patch_size  window size in pixels; None: as the denoiser has it, or it has none; likewise, of those that have it,
    threshold   of windows that follow the data, in [0, 1]
    width       of Gaussian windows in pixels
    mass        share of a network's sensitivity that a window holds, in [0, 1]
    tolerance   a wish: how far the mean of a pixel may be from the exact one (half a 95% interval) for its search to
                end, instead of the engine's own; engine "sampled" alone takes notice, the others are exact
    selection   a wish: which images of a machine's bank count (see `PatchBank.select`), instead of those of the labels
    precision   a wish: how precisely each value of x is known, (B, C, H, W) float32 or what expands to it, not
                negative: a factor of its weight 1 / sigma^2 in every comparison; 0: not at all
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    labels: Tensor | None = None
    patch_size: int | None = checked(None, check_patch_size)
    threshold: float | None = checked(None, partial(check_share, "threshold"))
    width: float | None = checked(None, check_width)
    mass: float | None = checked(None, partial(check_share, "mass"))
    tolerance: float | None = checked(None, check_tolerance)
    selection: Selection | None = checked(None, check_selection)
    precision: Tensor | None = checked(None, check_precision)

    def __post_init__(self) -> None:
        for level in (self.alpha, self.sigma):
            if not isinstance(level, Tensor) or level.dtype != torch.float64 or level.shape != self.x.shape[:1]:
                raise TypeError(
                    "alpha and sigma of a Query are (B,) float64; make one by denoiser.query(x, alpha, sigma)"
                )
        if self.precision is not None:
            try:
                expanded = self.precision.to(self.x.device).expand(self.x.shape).contiguous()
            except RuntimeError:
                given = tuple(self.precision.shape)
                raise ValueError(
                    f"precision must expand to the shape of x, {tuple(self.x.shape)}, got {given}"
                ) from None
            object.__setattr__(self, "precision", expanded)

    def __len__(self) -> int:
        return len(self.x)

    def mirrored(self) -> Query:
        """The same from right to left."""
        precision = None if self.precision is None else self.precision.flip(-1)
        return replace(self, x=self.x.flip(-1), precision=precision)

    def of(self, queries: Sequence[int]) -> Query:
        """Some of the queries."""
        which = torch.tensor(queries, dtype=torch.int64, device=CPU)
        given = {name: getattr(self, name) for name in ("x", "alpha", "sigma", "labels", "precision")}
        some = {name: value[which] for name, value in given.items() if value is not None}
        if self.selection is not None:
            some["selection"] = self.selection.expand(len(self)).of(queries)
        return replace(self, **some)


_WISHES = checks_of(Query)


@dataclass(eq=False)
class _Step:
    """What gives a tensor, or a tuple of them, and the pullback from it to the first of its arguments."""

    compute: Callable[..., tuple[Any, Pullback]]
    pullback: Pullback | None = None


class _Derived(torch.autograd.Function):
    """The step, taken: step.compute(*arguments)."""

    @staticmethod
    def forward(step: _Step, *arguments: Any) -> Any:
        value, step.pullback = step.compute(*arguments)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pullback, ctx.count = inputs[0].pullback, len(inputs)
        if isinstance(inputs[1], Tensor):
            ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if any(ctx.needs_input_grad[2:]):
            raise RuntimeError(_NO_DERIVATIVE)
        pulled = _Pulled.apply(ctx.pullback, gradients[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, pulled, *[None] * (ctx.count - 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_NO_SECOND)

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> Any:
        raise RuntimeError(_NO_VMAP)


_Derived.forward.__signature__ = inspect.signature(_Derived.forward)  # type: ignore[attr-defined]  # asked at every call


class _Pulled(torch.autograd.Function):
    """pullback(gradient), which has no derivative itself; of many gradients, for a Jacobian, one after the other."""

    @staticmethod
    def forward(pullback: Pullback, gradient: Tensor, *x: Tensor) -> Tensor:  # which it depends on too
        return pullback(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_NO_SECOND)

    jvp = backward

    @staticmethod
    def vmap(info: Any, dims: Any, pullback: Pullback, gradient: Tensor, *x: Tensor) -> Any:
        pulled = [_Pulled.apply(pullback, one, *x) for one in gradient.movedim(dims[1], 0)]  # type: ignore[no-untyped-call]
        return torch.stack(pulled), 0


def refuse_derivative(gradient: Tensor) -> Tensor:
    """The pullback of what has no derivative: to ask for one is an error, and not zero."""
    raise RuntimeError(_NO_DERIVATIVE)


def derived(compute: Callable[..., tuple[Tensor, Pullback]], x: Tensor, *others: Any) -> Tensor:
    """What compute(x, *others) gives, differentiable in x alone, by the pullback that it gives too."""
    value: Tensor = _Derived.apply(_Step(compute), x, *others)  # type: ignore[no-untyped-call]
    return value


def underived(function: F) -> F:
    """The function, which gives a tensor or a tuple; asked for a derivative of these, it refuses."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        def compute(*values: Any) -> Any:
            given = dict(zip(named, values[len(arguments) :], strict=True))
            return function(*values[: len(arguments)], **given), refuse_derivative

        return _Derived.apply(_Step(compute), *arguments, *named.values())  # type: ignore[no-untyped-call]

    return cast(F, call)


class Denoiser:
    """Anything that estimates the clean image x0 from x = alpha * x0 + sigma * noise.

    One of your own implements `estimate`.

    Attributes
    ----------
    device     where it works: x may be there, or in CPU memory, and the estimate is where x is
    parameter  the field of a `Query` that is calibrated, and may change from step to step: "patch_size", "threshold",
               "width" or "mass"; None: there is none
    wishes     the other fields, beyond images, levels and labels, that it takes notice of
    clip       largest |x0_hat| of `denoise` and all that follows from it, or None; `estimate` is not clipped
    """

    device = CPU
    clip: float | None = None
    parameter: str | None = None
    wishes: tuple[str, ...] = ()

    def estimate(self, query: Query) -> Tensor:
        """The estimate x0_hat (B, C, H, W) float32, where query.x is."""
        raise TypeError(f"{type(self).__name__} must define estimate(query), which returns x0_hat (B, C, H, W)")

    def estimate_and_pullback(self, query: Query) -> tuple[Tensor, Pullback]:
        """The estimate, and what takes gradients with respect to it to x; here, one that refuses."""
        return self.estimate(query), refuse_derivative

    def answer_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the estimate for images x."""
        return tuple(x.shape)

    def settings(self) -> dict[str, Any]:
        """What the bits of a result depend on, beside its inputs."""
        return {}

    def to(self, device: str | torch.device) -> None:
        """Move it to a device; raises ValueError where it cannot be moved."""
        if torch.device(device) != torch.device(self.device):
            raise ValueError(f"device {device} was asked for, but a {type(self).__name__} cannot be moved there")

    def check_wish(self, name: str, value: Any) -> Any:
        """A value, or None, for a field of a query, if this denoiser can take it; raises TypeError or ValueError if it
        cannot."""
        taken = [one for one in (*self.wishes, self.parameter) if one is not None]
        if name == "patch_size" not in taken and value is not None:
            raise ValueError(f"patch_size {value} was given, but {type(self).__name__} has none; leave it out")
        if name not in (*taken, "patch_size"):
            allowed = ", ".join(one for one in taken if one != "patch_size") or "none"
            raise TypeError(f"{type(self).__name__} has no argument {name!r}; beyond patch_size it has {allowed}")
        return None if value is None else _WISHES[name](value)

    def check_images(self, x: Tensor) -> Tensor:
        """x as the denoiser takes it; raises TypeError or ValueError if it cannot."""
        return check_images(x, device=self.device)

    def query(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Query:
        """The arguments of `denoise`, checked. Raises RuntimeError where a derivative in x would get lost."""
        if isinstance(x, Tensor):
            forward = forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
            if forward or (x.requires_grad and torch.is_grad_enabled()):
                raise RuntimeError(_NO_DERIVATIVE)
        x = self.check_images(x).clone()  # an estimate of one's own may work in place
        batch = len(x)
        return Query(
            x,
            check_level("alpha", alpha, batch),
            check_level("sigma", sigma, batch),
            check_labels(labels, batch),
            **{name: self.check_wish(name, value) for name, value in {"patch_size": patch_size, **wishes}.items()},
        )

    def denoise(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Tensor:
        """The estimate x0_hat: of a machine the posterior mean.

        Parameters
        ----------
        x           (B, C, H, W) float32 noisy images alpha * x0 + sigma * noise; in CPU memory or on `device`
        alpha       signal level >= 0: a number, or (B,) as a list, an array or a tensor
        sigma       noise level > 0, likewise
        labels      (B,) integers, likewise, classes of the images: a machine restricts each query to the bank images of
                    its class, a class-conditional network is told. None: all images
        patch_size  odd window size in pixels, instead of the machine's own; networks have none
        wishes      further fields of `Query`, by name, such as tolerance=0.03 to a machine with engine "sampled", or
                    threshold=0.05 to `PCALocality`

        Returns
        -------
        (B, C, H, W) float32 (float64 from engine "reference"), where x is; each image as if it had been computed alone.
        Differentiable in x by torch's autograd, of a machine whose engine can; second derivatives are refused

        Raises
        ------
        TypeError, ValueError  wrong dtype or shape, NaN or infinite pixels, sigma <= 0, alpha < 0, a class without
                               images, a patch size that is even, not positive, or larger than the boundary allows
        RuntimeError           where a derivative is asked for that there is none of, or torch.vmap is used
        """

        def compute(x: Tensor, *given: Any) -> tuple[Tensor, Pullback]:
            query = self.query(x, *given[:4], **dict(zip(wishes, given[4:], strict=True)))
            x0, pullback = self.estimate_and_pullback(query)
            if not isinstance(x0, Tensor) or tuple(x0.shape) != self.answer_shape(x):
                what = f"shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
                raise ValueError(f"estimate of {type(self).__name__} gave {what}, but the images are {tuple(x.shape)}")
            return x0, pullback

        x0 = derived(compute, x, alpha, sigma, labels, patch_size, *wishes.values())
        return self.clipped(x0)

    def clipped(self, x0: Tensor) -> Tensor:
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def eps(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Tensor:
        """The estimated noise (x - alpha * x0_hat) / sigma, (B, C, H, W) float32; arguments as in `denoise`."""
        x0 = self.denoise(x, alpha, sigma, labels, patch_size, **wishes)
        if x0.shape != x.shape:
            raise ValueError(
                f"the responses are {tuple(x0.shape[1:])}, but the images {tuple(x.shape[1:])}: they imply neither "
                "noise nor score; use denoise"
            )
        return eps_from_x0(x0, x, _column("alpha", alpha, x0), _column("sigma", sigma, x0))

    def score(
        self,
        x: Tensor,
        alpha: Levels,
        sigma: Levels,
        labels: Any = None,
        patch_size: int | None = None,
        **wishes: Any,
    ) -> Tensor:
        """The estimated score (alpha * x0_hat - x) / sigma^2, (B, C, H, W) float32; arguments as in `denoise`."""
        eps = self.eps(x, alpha, sigma, labels, patch_size, **wishes)
        return -eps / _column("sigma", sigma, eps)


class Composite(Denoiser):
    """A denoiser made of another one, which takes what that one takes, and clips as it does.

    One of your own implements `estimate_and_pullback`, or `estimate` alone where it has no derivative.

    Attributes
    ----------
    denoiser  what it asks
    """

    def __init__(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser must be a machine or another pyels.Denoiser, got {type(denoiser).__name__}")
        self.denoiser, self.device, self.clip = denoiser, denoiser.device, denoiser.clip
        self.wishes, self.parameter = denoiser.wishes, denoiser.parameter

    def estimate(self, query: Query) -> Tensor:
        return self.estimate_and_pullback(query)[0]

    def answer_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.denoiser.answer_shape(x)

    def settings(self) -> dict[str, Any]:
        return self.denoiser.settings()

    def to(self, device: str | torch.device) -> None:
        self.denoiser.to(device)
        self.device = self.denoiser.device

    def check_wish(self, name: str, value: Any) -> Any:
        return self.denoiser.check_wish(name, super().check_wish(name, value))

    def check_images(self, x: Tensor) -> Tensor:
        return self.denoiser.check_images(x)


def eps_from_x0(x0: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The noise that an estimate of x0 implies; alpha and sigma are numbers, or tensors beside x."""
    return (x - alpha * x0) / sigma


def _column(name: str, level: Levels, like: Tensor) -> Tensor:
    """alpha or sigma (B, 1, 1, 1), beside images of their device and dtype."""
    return beside(like, check_level(name, level, len(like))).to(like.dtype)[:, None, None, None]
