"""Networks as denoisers: anything that was trained to denoise, behind the interface of a machine."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from traceback import walk_tb
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyels.checks import CPU, check_clip, check_device, check_images, warn
from pyels.denoiser import Denoiser, Query
from pyels.networks.modules import modules_of, ready, vary
from pyels.networks.network import Network
from pyels.networks.prediction import PREDICTIONS, x0_from
from pyels.schedules import Discrete, Schedule, make_schedule

OWN = "_pyels_network_"  # how names of modules begin that `load` makes of files
_BISECTIONS = 60
_ANGLE_SLACK = 1e-4  # radians beyond a schedule's ends that count as the end: cosine ends at sigma = 80.2, edm at 80
_TIME_SLACK = 1e-9  # relative: what bisection leaves
_STEP_SLACK = 1e-3  # of a step: times so near to one, by rounding of the query's level, are the step's own


class NotDifferentiable(ValueError):
    """A network whose output torch cannot differentiate."""


class OutOfReach(ValueError):
    """A noise level that the network's schedule does not have."""


class Asked(NamedTuple):
    """The network's own x (B, C, H, W), alpha and sigma (B, 1, 1, 1) of its schedule, and its answer, shaped as x."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    answer: Tensor


class NetworkDenoiser(Denoiser):
    """A network with the interface of a machine, so that one sampler and one comparison serve both.

    The network sees what it was trained on: a query x = alpha * x0 + sigma * noise is rescaled to the time t of the
    network's own schedule that has the same sigma / alpha, which leaves x0 as it is. So a network may be compared along
    another schedule than the one it was trained with.

    Parameters
    ----------
    function     function(x, t, labels), or one that takes x alone, or x and t: x (B, C, H, W) float32 on `device`, its
                 to change; t (B,) float32, never below the time that is meant, so that 1000 * t - 1, rounded or cut
                 off, is the step of a network with 1,000; labels (B,) int64 or None. Returns the prediction
                 (B, C, H, W), or (B, 2 C, H, W), of which the second half is a learned variance that is left out.
                 A torch module is put into evaluation mode, and, where its weights are not float32, copied in float32.
                 May be called from several threads at once
    predicts     "eps", "x0", "score" = -eps / sigma, "v" = alpha * eps - sigma * x0, "velocity" = eps - x0 (of flow
                 matching) or "residual" = x - x0
    schedule     the schedule that t refers to: a name, an object with alpha(t) and sigma(t) (see
                 `pyels.make_schedule`), which may run from noise to image as well, or a number: the only sigma, at
                 alpha = 1, that the network is for. An object that also has angle_to_time(angle) maps
                 angle = atan2(sigma, alpha) to its time by itself, for others it is found by bisection of [0, 1].
                 `pyels.adapters.NoiseLevel()` is that of networks that are told sigma itself
    num_classes  number of classes of a class-conditional network, which then needs labels; None: labels are not passed
    channels     channels of the images, where known: queries are checked against it
    size         height and width of the images that it was trained on, where known: a run says where others are used
    device       where the function wants its arguments.  [default: where the module's weights are, else "cpu"]
    pixel_range  what the network takes for black and white; alpha and sigma of its schedule refer to these units
    null_label   the label that stands for no class, passed where a query has none: see `pyels.Guided`
    timesteps    the number T of steps of a network that takes t as a step, which it then gets as an int64 0 .. T - 1
    clip         limit of |x0_hat| in what `denoise`, `eps`, `score` and `pyels.sample` take for the estimate, as the
                 schedulers of diffusers clip samples; None: none

    Raises
    ------
    ValueError  from `denoise`: an output of another shape or with NaN, a noise level that the schedule does not reach,
                layers in training mode, which answer otherwise at every call
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        predicts: str = "eps",
        schedule: str | Schedule | float = "cosine",
        num_classes: int | None = None,
        channels: int | None = None,
        device: str | torch.device | None = None,
        *,
        pixel_range: tuple[float, float] = (-1, 1),
        null_label: int | None = None,
        timesteps: int | None = None,
        clip: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        if predicts not in PREDICTIONS:
            raise ValueError(f"predicts must be one of {', '.join(PREDICTIONS)}, got {predicts!r}")
        if isinstance(function, Network) and not isinstance(schedule, Angle):
            raise TypeError(f"a {type(function).__name__} of pyels becomes a denoiser by pyels.adapters.from_pyels")
        if not callable(function) or isinstance(function, (type, Denoiser)):
            got = f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__
            raise TypeError(f"function must be callable as function(x, t, labels), got {got}")
        if timesteps is not None and not timesteps >= 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        self.function = ready(function) if isinstance(function, nn.Module) else function
        self.predicts = predicts
        self.schedule = (
            NoiseLevel(schedule) if isinstance(schedule, (int, float, np.number)) else make_schedule(schedule)
        )
        self.num_classes = num_classes
        self.channels = channels
        self.device = self._home() if device is None else check_device(device)
        self.pixel_range = _check_range(pixel_range)
        self.null_label = null_label
        self.timesteps = timesteps
        self.clip = check_clip(clip)
        self.size = size
        self.takes = _count_arguments(function, self.conditional)
        if predicts == "v" and not _preserves_variance(self.schedule):
            warn(
                "predicts='v' is alpha * eps - sigma * x0, which networks learn where alpha^2 + sigma^2 = 1, as it is "
                "not along this schedule: for the eps - x0 of flow matching, say predicts='velocity'"
            )

    @property
    def conditional(self) -> bool:
        """Whether the network is told classes."""
        return self.num_classes is not None or self.null_label is not None

    def to(self, device: str | torch.device) -> None:
        """Move the network; raises ValueError where it is a function in which no torch module is found."""
        device, modules = check_device(device), modules_of(self.function)
        if not modules and device != self.device:
            raise ValueError(
                f"device {device} was asked for, but the network is a function without torch modules: build it there, "
                f"and say pyels.NetworkDenoiser(.., device={str(device)!r})"
            )
        for module in modules:
            module.to(device)
        self.device = device

    def check_images(self, x: Tensor) -> Tensor:
        return check_images(x, channels=self.channels, device=self.device)

    def estimate(self, query: Query) -> Tensor:
        """x0_hat (B, C, H, W) float32, where query.x is, not clipped; differentiable if query.x requires a gradient.

        Raises NotDifferentiable if it does and the network's output has none.
        """
        with torch.set_grad_enabled(query.x.requires_grad):  # the weights alone ask for none
            asked = self.ask(query)
            return self.x0_of(asked).to(query.x.device)

    def ask(self, query: Query) -> Asked:
        """What the network is asked for a query, and what it answers."""
        labels = self._labels(query.labels, len(query))
        levels = zip(query.sigma.tolist(), query.alpha.tolist(), strict=True)
        times = [self._time(math.atan2(*level)) for level in levels]
        alpha = _column([float(self.schedule.alpha(t)) for t in times])
        sigma = _column([float(self.schedule.sigma(t)) for t in times])
        half, middle = self._units()
        scale = half * torch.hypot(alpha, sigma / half) / torch.hypot(_column(query.alpha), _column(query.sigma))
        x = query.x.to(self.device)
        x = x * scale.to(x) + (alpha * middle).to(x)
        return Asked(x, alpha, sigma, self._predict(x, times, labels))

    def x0_of(self, asked: Asked) -> Tensor:
        """The estimate of x0 that an answer implies."""
        half, middle = self._units()
        return (x0_from(self.predicts, asked.answer, asked.x, asked.alpha, asked.sigma) - middle) / half

    def _predict(self, x: Tensor, times: list[float], labels: Tensor | None) -> Tensor:
        """What the network says of x, on its device; checked, as the network may be anybody's."""
        varying = vary(modules_of(self.function))
        if varying:
            raise ValueError(
                f"the network has {' and '.join(varying)} in training mode, or without running statistics: its answers "
                "differ from call to call, or with what else is in the batch; call network.eval() before"
            )
        given = (x.clone(), self._told(times), None if labels is None else labels.to(self.device, copy=True))
        try:
            out = self.function(*given[: self.takes])
        except Exception as error:  # a network of one's own may fail in any way
            if x.requires_grad:  # it may work in numpy
                raise NotDifferentiable(self._why(error)) from error
            raise ValueError(f"the network failed on images of shape {tuple(x.shape)}: {self._why(error)}") from error
        if isinstance(out, Tensor) and out.dim() == 4 and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]  # and not its variance
        if not isinstance(out, Tensor) or out.shape != x.shape:
            what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the network returned {what} for images of shape {tuple(x.shape)}; it must return a tensor of the "
                "same shape (of diffusers' models, pass on .sample)"
            )
        if x.requires_grad and not out.requires_grad:
            raise NotDifferentiable("the network's output has no gradient with respect to its input")
        out = out.to(x)
        if not torch.isfinite(out).all():
            raise ValueError(f"the network returned NaN or infinite values at t = {times}")
        return out

    def _told(self, times: list[float]) -> Tensor:
        """The times as the network is told them."""
        steps = self.timesteps or getattr(self.schedule, "steps", None)
        if steps is not None:  # the rounding of levels that were given in float32
            times = [round(t * steps) / steps if abs(t * steps - round(t * steps)) < _STEP_SLACK else t for t in times]
        if self.timesteps is not None:
            told = [min(max(round(t * self.timesteps) - 1, 0), self.timesteps - 1) for t in times]
            return torch.tensor(told, dtype=torch.int64, device=self.device)
        exact = torch.tensor(times, dtype=torch.float64, device=CPU)
        nearest = exact.float()
        below = nearest.double() < exact - _TIME_SLACK * exact.abs()
        nearest = torch.where(below, torch.nextafter(nearest, torch.full_like(nearest, math.inf)), nearest)
        return nearest.to(self.device)

    def _why(self, error: Exception) -> str:
        """Why the network failed, with what to do where that is known."""
        text = in_words(error)
        dtypes = {str(p.dtype) for module in modules_of(self.function) for p in module.parameters()}
        if dtypes - {"torch.float32"} or "dtype" in text or "type (float)" in text:
            return f"{text}; it is given float32 images: convert it with network.float()"
        if isinstance(error, RuntimeError):
            return f"{text}; if it is for images of another size or number of channels, give it such"
        return text

    def _labels(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """The labels that the network is passed."""
        if not self.conditional:
            return None
        if labels is None:
            if self.null_label is None:
                raise ValueError("labels: this network is class-conditional and needs a label for every image")
            return torch.full((batch,), self.null_label, dtype=torch.int64, device=CPU)
        known = (labels >= 0) & (labels < (self.num_classes or math.inf)) | (labels == self.null_label)
        if not known.all():
            highest = "" if self.num_classes is None else self.num_classes - 1
            raise ValueError(f"labels must lie in 0..{highest} for this network, got {labels.tolist()}")
        return labels

    def _units(self) -> tuple[float, float]:
        """Half of the network's pixel range, and its middle."""
        low, high = self.pixel_range
        return (high - low) / 2, (high + low) / 2

    def _angle(self, t: float) -> float:
        """atan2(sigma, alpha) of its schedule, in units of images in [-1, 1]."""
        return math.atan2(self.schedule.sigma(t) / self._units()[0], self.schedule.alpha(t))

    def _time(self, angle: float) -> float:
        """The time of the schedule at which atan2(sigma, alpha) is `angle`, in units of images in [-1, 1]."""
        exact = getattr(self.schedule, "angle_to_time", None)
        if exact is not None:
            return float(exact(math.atan2(math.sin(angle) * self._units()[0], math.cos(angle))))
        low, high = (0.0, 1.0) if self._angle(0.0) <= self._angle(1.0) else (1.0, 0.0)  # the cleanest, the noisiest
        least, most = self._angle(low), self._angle(high)
        if not least - _ANGLE_SLACK <= angle <= most + _ANGLE_SLACK:
            raise OutOfReach(
                f"sigma / alpha = {math.tan(angle):.4g} is outside what the network's schedule reaches, "
                f"{abs(math.tan(least)):.4g} to {math.tan(most):.4g}; sample along another schedule"
            )
        if angle >= most:
            return high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._angle(middle) < angle else (low, middle)
        return high

    def _home(self) -> torch.device:
        """Where the weights are that the function works with."""
        return next((p.device for module in modules_of(self.function) for p in module.parameters()), CPU)


def in_words(error: Exception) -> str:
    """What went wrong in code of other people."""
    if "not compiled with CUDA" in str(error):
        return (
            "it asks for a CUDA device, but torch is built without CUDA here: leave it on the CPU (map_location='cpu')"
        )
    place = line_of_own(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def line_of_own(error: Exception) -> str:
    """FILE.py:LINE, the last in a file that holds a network, which `load` imported, on the way to what was raised."""
    frames = walk_tb(error.__traceback__)
    way = [f"{f.f_code.co_filename}:{line}" for f, line in frames if str(f.f_globals.get("__name__")).startswith(OWN)]
    return way[-1] if way else ""


def _column(levels: Tensor | list[float]) -> Tensor:
    return torch.as_tensor(levels, dtype=torch.float64, device=CPU)[:, None, None, None]


def _check_range(pixel_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in pixel_range)
    except (TypeError, ValueError):
        raise TypeError(f"pixel_range must be two numbers, such as (0, 1), got {pixel_range!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"pixel_range must be two finite numbers, black below white, got {pixel_range!r}")
    return low, high


def _preserves_variance(schedule: Schedule) -> bool:
    return abs(math.hypot(schedule.alpha(0.5), schedule.sigma(0.5)) - 1) < 1e-3


def _count_arguments(function: Callable[..., Any], conditional: bool) -> int:
    """How many of x, t and labels a function takes; those with a default are left out where they must not be told."""
    if isinstance(function, torch.jit.ScriptModule):
        told = function.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        return max(sum(not one.has_default_value() for one in told), min(len(told), 3 if conditional else 2))
    if isinstance(function, functools.partial) and isinstance(function.func, nn.Module):
        function = functools.partial(function.func.forward, *function.args, **function.keywords)
    try:
        arguments = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # builtin, or compiled
        return 3
    kinds = [one for one in arguments.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if any(one.kind is one.VAR_POSITIONAL for one in arguments.values()):
        inner = getattr(function, "_orig_mod", getattr(function, "module", None))  # of one compiled, averaged, parallel
        return _count_arguments(inner, conditional) if isinstance(inner, nn.Module) else 3
    required = sum(one.default is one.empty for one in kinds)
    takes = max(required, min(len(kinds), 3 if conditional else 2))
    if conditional and takes < 3:
        raise TypeError(
            f"the network takes {takes} arguments, but with num_classes or null_label it is given x, t and labels"
        )
    return takes


class Angle:
    """A schedule whose t is the angle atan2(sigma, alpha) itself."""

    def alpha(self, t: float) -> float:
        return math.cos(t)

    def sigma(self, t: float) -> float:
        return math.sin(t)

    def angle_to_time(self, angle: float) -> float:
        return angle


class NoiseLevel:
    """A schedule whose t is sigma itself, at alpha = 1; that of a network for one noise level has no other `only`."""

    def __init__(self, only: float | None = None) -> None:
        if only is not None and not 0 < only < math.inf:
            raise ValueError(f"the only sigma of a network must be positive and finite, got {only}")
        self.only = only

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

    def angle_to_time(self, angle: float) -> float:
        sigma = math.tan(angle)
        if self.only is not None and not math.isclose(sigma, self.only, rel_tol=1e-4):
            raise OutOfReach(
                f"the network is for sigma / alpha = {self.only:g} alone, got {sigma:.4g} (in units of its pixels); "
                "ask for denoise there: samples and calibrations need a network for all noise levels"
            )
        return sigma


def from_pyels(network: Network) -> NetworkDenoiser:
    """One of pyels' own networks as a denoiser, in float32."""
    of = network.config
    return NetworkDenoiser(
        network, network.predicts, Angle(), of["num_classes"], of["channels"], null_label=network.null_label
    )


def from_edm(denoiser: Callable[..., Tensor], num_classes: int | None = None, **conventions: Any) -> NetworkDenoiser:
    """A denoiser in the style of Karras et al. (arXiv 2206.00364): D(x0 + sigma * noise, sigma, labels) -> x0_hat.

    Parameters
    ----------
    denoiser     called with x (B, C, H, W), sigma (B,), and class labels (B,) int64 or None; wrap one that wants them
                 one-hot
    conventions  further arguments of `NetworkDenoiser`, such as device or pixel_range
    """
    return NetworkDenoiser(denoiser, "x0", NoiseLevel(), num_classes, **conventions)


def from_diffusers(unet: Any, scheduler: Any, **conventions: Any) -> NetworkDenoiser:
    """A `diffusers` UNet2DModel with the scheduler it was trained with, whose conventions are kept.

    Known are schedulers with alphas_cumprod (DDPM, DDIM, ..; zero terminal SNR too), those of flow matching, the EDM
    ones and ScoreSdeVe; learned variances are left out, class and time embeddings may be of any kind. Samples are
    clipped where the scheduler's clip_sample says so (see `NetworkDenoiser.clip`). `conventions` are arguments of
    `NetworkDenoiser` that these do not say, such as null_label, or that are to be others, such as clip.

    Raises ValueError for a scheduler of another kind or an unknown prediction type.
    """
    unet, config, kind = ready(unet), scheduler.config, type(scheduler).__name__
    classes, embedding = unet.config.get("num_class_embeds"), unet.config.get("class_embed_type")
    if embedding == "identity":
        raise ValueError(
            "class_embed_type 'identity' takes embeddings for labels: put a function that looks them up around the "
            "network, and that into pyels.NetworkDenoiser"
        )
    if embedding == "timestep":
        classes = classes or 2**31  # any number
    integers = unet.config.get("time_embedding_type") == "learned"

    def ask(x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        out: Tensor = unet(x, timestep.round().long() if integers else timestep, class_labels=labels).sample
        return out[:, : x.shape[1]]

    side = unet.config.get("sample_size")
    common: dict[str, Any] = {"num_classes": classes, "channels": unet.config.get("in_channels")}
    common["size"] = (side, side) if isinstance(side, int) else side and tuple(side)
    clips = config.get("clip_sample") or config.get("thresholding")
    common["clip"] = config.get("clip_sample_range", 1.0) if clips else None
    common.update(conventions)
    prediction, count = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    if kind.startswith("FlowMatch") or prediction == "flow_prediction":
        if config.get("invert_sigmas"):  # the data is at t = 1
            return NetworkDenoiser(lambda x, t, y: -ask(x, (1 - t) * count, y), "velocity", "flow", **common)
        return NetworkDenoiser(lambda x, t, y: ask(x, t * count, y), "velocity", "flow", **common)
    if kind.startswith("EDM"):

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            level = sigma[:, None, None, None]
            out = ask(scheduler.precondition_inputs(x, level), scheduler.precondition_noise(sigma), labels)
            x0: Tensor = scheduler.precondition_outputs(x, out, level)
            return x0

        return from_edm(denoise, **common)
    if kind == "ScoreSdeVeScheduler":
        return NetworkDenoiser(ask, "score", NoiseLevel(), pixel_range=(0, 1), **common)
    kinds = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if prediction not in kinds or alphas is None or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{kind} with prediction type {prediction!r}: needed is a scheduler with alphas_cumprod and discrete "
            f"timesteps that predicts one of {', '.join(kinds)}, or one of flow matching or EDM; others are said by "
            "pyels.NetworkDenoiser(function, predicts, schedule)"
        )
    if config.get("thresholding"):
        warn("the scheduler's dynamic thresholding is not applied, its clip_sample_range is instead")
    return NetworkDenoiser(
        # Step j = 1 .. T of the schedule is diffusers' timestep j - 1.
        lambda x, t, y: ask(x, (t * len(alphas) - 1).clamp(min=0), y),
        kinds[prediction],
        Discrete(alphas.double().cpu().numpy()),
        **common,
    )
