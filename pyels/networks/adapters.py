"""Networks as denoisers: anything that was trained to denoise, behind the interface of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyels.checks import CPU, check_images
from pyels.denoiser import Denoiser, Query
from pyels.networks.network import Network
from pyels.networks.prediction import PREDICTIONS, x0_from
from pyels.schedules import Discrete, Schedule, make_schedule

_BISECTIONS = 60
_ANGLE_SLACK = 1e-4  # radians beyond a schedule's ends that count as the end: cosine ends at sigma = 80.2, edm at 80


class NotDifferentiable(ValueError):
    """A network whose output torch cannot differentiate."""


class NetworkDenoiser(Denoiser):
    """A network with the interface of a machine, so that one sampler and one comparison serve both.

    The network sees what it was trained on: a query x = alpha * x0 + sigma * noise is rescaled to the time t of the
    network's own schedule that has the same sigma / alpha, which leaves x0 as it is. So a network may be compared along
    another schedule than the one it was trained with.

    Parameters
    ----------
    function     function(x, t, labels): x (B, C, H, W) float32 on `device`, t (B,) float32, labels (B,) int64 or None;
                 returns the prediction (B, C, H, W). A torch module is put into evaluation mode. May be called from
                 several threads at once
    predicts     "eps", "x0", "score" = -eps / sigma, or "v" = alpha * eps - sigma * x0
    schedule     the schedule that t refers to: a name, or an object with alpha(t) and sigma(t) (see
                 `pyels.make_schedule`). One that also has angle_to_time(angle) maps angle = atan2(sigma, alpha) to its
                 time by itself, for others the time is found by bisection of [0, 1]
    num_classes  number of classes of a class-conditional network, which then needs labels; None: labels are not passed
    channels     channels of the images, where known: queries are checked against it
    device       where the function wants its arguments

    Raises
    ------
    ValueError  from `denoise`: an output of another shape or with NaN, a noise level that the schedule does not reach
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        predicts: str = "eps",
        schedule: str | Schedule = "cosine",
        num_classes: int | None = None,
        channels: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if predicts not in PREDICTIONS:
            raise ValueError(f"predicts must be one of {', '.join(PREDICTIONS)}, got {predicts!r}")
        if isinstance(function, Network) and not isinstance(schedule, _Angle):
            raise TypeError(f"a {type(function).__name__} of pyels becomes a denoiser by pyels.adapters.from_pyels")
        if not callable(function):
            raise TypeError(f"function must be callable as function(x, t, labels), got {type(function).__name__}")
        self.function = function.eval() if isinstance(function, nn.Module) else function
        self.predicts = predicts
        self.schedule = make_schedule(schedule)
        self.num_classes = num_classes
        self.channels = channels
        self.device = torch.device(device)

    def check_images(self, x: Tensor) -> Tensor:
        return check_images(x, channels=self.channels, device=self.device)

    def estimate(self, query: Query) -> Tensor:
        """x0_hat (B, C, H, W) float32, where query.x is; differentiable if query.x requires a gradient.

        Raises NotDifferentiable if it does and the network's output has none.
        """
        labels = self._labels(query.labels)
        levels = zip(query.sigma.tolist(), query.alpha.tolist(), strict=True)
        times = [self._time(math.atan2(*level)) for level in levels]
        alpha = _column([float(self.schedule.alpha(t)) for t in times])
        sigma = _column([float(self.schedule.sigma(t)) for t in times])
        scale = torch.hypot(alpha, sigma) / torch.hypot(_column(query.alpha), _column(query.sigma))
        x = query.x.cpu() * scale.float()
        with torch.set_grad_enabled(x.requires_grad):  # the weights alone ask for none
            y = self._predict(x, times, labels)
            return x0_from(self.predicts, y, x, alpha, sigma).to(query.x.device)

    def _predict(self, x: Tensor, times: list[float], labels: Tensor | None) -> Tensor:
        """What the network says of x, in CPU memory; checked, as the network may be anybody's."""
        t = torch.tensor(times, dtype=torch.float32, device=self.device)
        try:
            out = self.function(x.to(self.device), t, None if labels is None else labels.to(self.device))
        except Exception as error:  # a network of one's own may fail in any way
            raise ValueError(
                f"the network failed on images of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the network returned {what} for images of shape {tuple(x.shape)}; it must return a tensor of the "
                "same shape (of a network that also predicts a variance, pass on the mean alone)"
            )
        if x.requires_grad and not out.requires_grad:
            raise NotDifferentiable("the network's output has no gradient with respect to its input")
        out = out.float().cpu()
        if not torch.isfinite(out).all():
            raise ValueError(f"the network returned NaN or infinite values at t = {times}")
        return out

    def _labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels that the network is passed."""
        if self.num_classes is None:
            return None
        if labels is None:
            raise ValueError("labels: this network is class-conditional and needs a label for every image")
        if not ((labels >= 0) & (labels < self.num_classes)).all():
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1} for this network, got {labels.tolist()}")
        return labels

    def _time(self, angle: float) -> float:
        """The time of the schedule at which atan2(sigma, alpha) is `angle`."""
        exact = getattr(self.schedule, "angle_to_time", None)
        if exact is not None:
            return float(exact(angle))

        def angle_of(t: float) -> float:
            return math.atan2(self.schedule.sigma(t), self.schedule.alpha(t))

        low, high = 0.0, 1.0
        if not angle_of(low) - _ANGLE_SLACK <= angle <= angle_of(high) + _ANGLE_SLACK:
            raise ValueError(
                f"sigma / alpha = {math.tan(angle):.4g} is outside what the network's schedule reaches, "
                f"{abs(math.tan(angle_of(low))):.4g} to {math.tan(angle_of(high)):.4g}; sample along another schedule"
            )
        if angle >= angle_of(high):
            return high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if angle_of(middle) < angle else (low, middle)
        return high


def _column(levels: Tensor | list[float]) -> Tensor:
    return torch.as_tensor(levels, dtype=torch.float64, device=CPU)[:, None, None, None]


class _Angle:
    """t is the angle atan2(sigma, alpha) itself."""

    def alpha(self, t: float) -> float:
        return math.cos(t)

    def sigma(self, t: float) -> float:
        return math.sin(t)

    def angle_to_time(self, angle: float) -> float:
        return angle


class _NoiseLevel:
    """t is sigma itself, at alpha = 1."""

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

    def angle_to_time(self, angle: float) -> float:
        return math.tan(angle)


def from_pyels(network: Network) -> NetworkDenoiser:
    """A `pyels.ResNet` or `pyels.UNet` as a denoiser, in float32."""
    config, device = network.config, next(network.parameters()).device
    return NetworkDenoiser(
        network.float(), network.predicts, _Angle(), config["num_classes"], config["channels"], device
    )


def from_edm(denoiser: Callable[..., Tensor], num_classes: int | None = None, device: Any = "cpu") -> NetworkDenoiser:
    """A denoiser in the style of Karras et al. (arXiv 2206.00364): D(x0 + sigma * noise, sigma, labels) -> x0_hat.

    Parameters
    ----------
    denoiser  called with x (B, C, H, W), sigma (B,), and class labels (B,) int64 or None; wrap one that wants them
              one-hot
    """
    return NetworkDenoiser(denoiser, "x0", _NoiseLevel(), num_classes, device=device)


def from_diffusers(unet: Any, scheduler: Any) -> NetworkDenoiser:
    """A `diffusers` UNet2DModel with the scheduler it was trained with (DDPM, DDIM or any other with alphas_cumprod).

    Raises ValueError for a scheduler of another kind or an unknown prediction type.
    """
    kinds = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in kinds or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction type {prediction!r}: needed is a scheduler with "
            f"alphas_cumprod that predicts one of {', '.join(kinds)}"
        )
    count = len(scheduler.alphas_cumprod)
    unet = unet.eval()
    classes = unet.config.get("num_class_embeds")

    def function(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        # Step j = 1 .. T of the schedule is diffusers' timestep j - 1.
        out: Tensor = unet(x, (t * count - 1).clamp(min=0), class_labels=labels).sample
        return out

    schedule = Discrete(scheduler.alphas_cumprod.double().cpu().numpy())
    channels = unet.config.get("in_channels")
    return NetworkDenoiser(function, kinds[prediction], schedule, classes, channels, unet.device)
