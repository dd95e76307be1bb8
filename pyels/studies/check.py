"""Whether a denoiser denoises: its error on real images beside trivial answers, and what may be wrong with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyels import metrics
from pyels.bank import PatchBank
from pyels.checks import CPU
from pyels.denoiser import Denoiser
from pyels.networks.adapters import NetworkDenoiser, OutOfReach
from pyels.networks.wiring import readings, rewired
from pyels.sampling import sample

LEVELS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # sigma / alpha
JUDGED = (0.8, 0.2, 3.2)  # those of a quick check, and by which wirings are compared
_IMAGES = 16
_MOST = 2000  # images for what is known of the bank as a whole
_VALUES = 1 << 26  # as float32, 256 MB
_MARGIN = 1.1  # pixels up to so many times the largest of the data count as its own
_SUSPECT = 0.6  # times Wiener's error: trained networks have .3 to .6 of it on pictures of 28 x 28
_HOPELESS = 3  # times Wiener's error
_BETTER = 0.8  # of the error: a wiring that is worth a word
_SEED = 2_000_000


def check(
    denoiser: Denoiser,
    bank: PatchBank,
    labels: Sequence[int] | None = None,
    levels: Sequence[float] = LEVELS,
    drawn: int = 4,
    try_all: bool = True,
) -> dict[str, Any]:
    """Denoise real images, and compare with what needs no network.

    Parameters
    ----------
    bank     the images that it should know
    labels   classes of the samples that are drawn
    levels   sigma / alpha
    drawn    number of samples
    try_all  also try other wirings of a network that does well as it is

    Returns
    -------
    levels      for each level its mean squared errors: of the `network` (None where its schedule does not reach),
                `x_over_alpha`, `mean_image` and `wiener`, the best linear answer that treats all positions alike
    ratio       geometric mean, over the levels, of the network's error over wiener's
    range       least and largest pixel of the samples, `outside` the share of their pixels beyond the data's
    repeatable  whether it answers alike again, and each image as by itself
    likely      another wiring that does better, in words; None: there is none, or it was not looked for
    doubts      what seems wrong, in sentences
    """
    probe = _Probe(bank, getattr(denoiser, "num_classes", None))
    labels_of = _conditions(denoiser, probe.labels)
    rows, doubts = [], []
    for level in levels:
        x, alpha, sigma = probe.noisy(level)
        row: dict[str, Any] = {"sigma_over_alpha": level, "network": None, **probe.trivial(x, alpha, sigma)}
        with contextlib.suppress(OutOfReach):
            row["network"] = probe.error(denoiser.denoise(x, alpha, sigma, labels_of))
        rows.append(row)
    reached = [row for row in rows if row["network"] is not None]
    if not reached:
        raise ValueError(f"the network's schedule reaches none of the levels sigma / alpha = {list(levels)}")
    ratio = _mean_ratio([(row["network"], row["wiener"]) for row in reached])
    repeatable = _repeats(denoiser, *probe.noisy(reached[len(reached) // 2]["sigma_over_alpha"]), labels_of)
    if not repeatable:
        doubts.append(
            "it answers the same images differently from call to call, or with what else is in the batch: is there "
            "dropout or batch norm in training mode?"
        )
    likely = None
    if isinstance(denoiser, NetworkDenoiser) and (try_all or ratio > _SUSPECT):
        likely = _likely(denoiser, probe, labels_of, 1)
        if likely is None and ratio > 1:
            likely = _likely(denoiser, probe, labels_of, 2)
    if ratio > 1:
        doubts.append(
            f"it denoises worse than a linear filter ({ratio:.3g} times the error of Wiener's): it is untrained, or "
            "wired wrongly" + ("" if likely is None else f"; likely {likely}")
        )
    elif likely is not None:
        doubts.append(f"it denoises better with {likely}")
    result: dict[str, Any] = {"levels": rows, "ratio": ratio, "repeatable": repeatable, "likely": likely}
    if drawn:
        told = None if labels is None else torch.tensor([labels[i % len(labels)] for i in range(drawn)], device=CPU)
        try:
            images = sample(denoiser, _noise((drawn, *bank.shape)), labels=told)
        except OutOfReach as error:
            result.update(range=None, outside=None)
            doubts.append(f"it cannot be sampled along schedule cosine: {error}")
        else:
            result.update(range=[float(images.min()), float(images.max())], outside=outside(images, limit_of(bank)))
            doubts += [] if result["outside"] < SAID else [leaves("its samples leave", images, limit_of(bank))]
    return {**result, "doubts": doubts}


SAID = 0.01  # share of pixels outside that is worth a word


def limit_of(bank: PatchBank) -> float:
    """The largest |pixel| of a bank, at least 1; of a large one in float, of some of its images."""
    if bank.dtype == torch.uint8:
        return 1.0
    return max(1.0, float(bank.read(_spread(bank, _MOST)).abs().max()))


def outside(images: Tensor, limit: float) -> float:
    """The share of pixels that are well beyond a bank's."""
    return float((images.abs() > _MARGIN * limit).double().mean())


def leaves(what: str, images: Tensor, limit: float, of_network: bool = True) -> str:
    said = (
        f"{what} the data's range [-{limit:g}, {limit:g}] at {outside(images, limit):.0%} of the pixels, which reach "
        f"from {float(images.min()):.3g} to {float(images.max()):.3g}"
    )
    return said + "; --clip keeps them within" * of_network


class _Probe:
    """Real images to denoise, and what is known of their bank."""

    def __init__(self, bank: PatchBank, classes: int | None) -> None:
        chosen = _spread(bank, _IMAGES)
        if bank.labels is not None and classes is not None:  # of those that the network knows
            known = ((bank.labels >= 0) & (bank.labels < classes)).nonzero()[:, 0]
            chosen = known[chosen * len(known) // len(bank)] if len(known) else chosen
        self.x0, many = bank.read(chosen), bank.read(_spread(bank, _MOST))
        self.labels = None if bank.labels is None else bank.labels[chosen]
        self.noise = _noise(tuple(self.x0.shape))
        self.mean = many.mean(dim=0)
        self.spectrum = torch.fft.fft2(many - self.mean, norm="ortho").abs().square().mean(dim=0)

    def noisy(self, level: float) -> tuple[Tensor, float, float]:
        """x, alpha and sigma."""
        alpha, sigma = math.cos(math.atan(level)), math.sin(math.atan(level))
        return alpha * self.x0 + sigma * self.noise, alpha, sigma

    def trivial(self, x: Tensor, alpha: float, sigma: float) -> dict[str, float]:
        gain = alpha * self.spectrum / (alpha**2 * self.spectrum + sigma**2)
        filtered = torch.fft.ifft2(gain * torch.fft.fft2(x - alpha * self.mean)).real
        answers = {"x_over_alpha": x / alpha, "mean_image": self.mean.expand_as(x), "wiener": self.mean + filtered}
        return {name: self.error(answer) for name, answer in answers.items()}

    def error(self, x0: Tensor) -> float:
        return float(metrics.mse(x0, self.x0).mean())


def _spread(bank: PatchBank, most: int) -> Tensor:
    """Up to so many numbers of images, evenly over all, as far as memory is no matter."""
    count = min(len(bank), most, max(_IMAGES, _VALUES // math.prod(bank.shape)))
    return torch.linspace(0, len(bank) - 1, count, dtype=torch.float64, device=CPU).round().long()


def _noise(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator(CPU).manual_seed(_SEED)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=CPU)


def _conditions(denoiser: Denoiser, labels: Tensor | None) -> Tensor | None:
    return labels if getattr(denoiser, "conditional", False) else None


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    logs = [math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in pairs]
    return math.exp(sum(logs) / len(logs))


def _repeats(denoiser: Denoiser, x: Tensor, alpha: float, sigma: float, labels: Tensor | None) -> bool:
    def answer(which: slice) -> Tensor:
        return denoiser.denoise(x[which], alpha, sigma, None if labels is None else labels[which])

    first = answer(slice(None))
    again, alone = answer(slice(None)), answer(slice(0, 1))
    scale = float(first.abs().max())
    return all(torch.allclose(a, first[: len(a)], atol=1e-3 * max(1.0, scale), rtol=0) for a in (again, alone))


def _likely(denoiser: NetworkDenoiser, probe: _Probe, labels: Tensor | None, most: int) -> str | None:
    """The wiring of up to so many changes with by far the least error; of those as good, the one of the fewest."""
    if denoiser.device.type == "cuda":
        most = 0  # a step that is not in a network's table would end all work on the GPU
    scores: dict[tuple[str, ...], float] = {}
    for asking, network in rewired(denoiser, most):
        try:
            scores.update({asking + reading: score for reading, score in _scores(network, probe, labels).items()})
        except ValueError:  # the network fails when it is asked so, or its schedule does not reach
            continue
    words, score = min(scores.items(), key=lambda one: one[1] * 1.05 ** len(one[0]), default=((), math.inf))
    return " and ".join(words) if words and score < min(1, _BETTER * scores.get((), math.inf)) else None


def _scores(network: NetworkDenoiser, probe: _Probe, labels: Tensor | None) -> dict[tuple[str, ...], float]:
    """The ratio of errors by each reading of the network's answers; none where the first of them rule all out."""
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for level in JUDGED:
        x, alpha, sigma = probe.noisy(level)
        wiener = probe.trivial(x, alpha, sigma)["wiener"]
        for reading, x0 in readings(network, network.query(x, alpha, sigma, labels)):
            found.setdefault(reading, []).append((probe.error(x0.cpu()), wiener))
        if level == JUDGED[0] and min(map(_mean_ratio, found.values())) > _HOPELESS:
            return {}
    return {reading: _mean_ratio(pairs) for reading, pairs in found.items() if len(pairs) == len(JUDGED)}
