"""Images drawn at random in place of all: how engine "sampled" answers at high noise, without an index.

There the weight of a pixel is spread over so many windows that some hundred to some thousand images stand for the
others. They are evaluated exactly, and in batches: by how much these differ is known how far off their sum may be. The
windows of one image are alike, so that nothing could be said by window; by batch, it holds for every machine, and for
pixels whose windows overhang the border as for the others.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.bank.selection import Selection, as_numbers
from pyels.checks import CPU
from pyels.definition import Definition
from pyels.denoiser import Query
from pyels.engines.exact import chunks
from pyels.engines.operator import evaluate
from pyels.posterior import ROUNDING, PartialPosterior, Want, alone

BATCHES, PILOT = 32, 4  # powers of two; PILOT of the look before
LANES = 16  # of the widest vectors: batches of other than multiples of so many images take longer
LEAST_IMAGES = 5000  # of a set, of which a first round in vain is a tenth
# The index search costs about as much as so many images, which is the most that is drawn: a part of the set for pixels
# that overhang the border, and for lists that are looked at.
SEARCH_IMAGES, SEARCH_SHARE = 2000, 1 / 6
TRUSTED = 100  # windows that must have been drawn where those that carry the weight are
LEAST_DEVIATION = 0.5  # of pixels, see _least_spread
STRANGE = 16.0  # times as far as the others from their mean, squared, is an image that no other stands for
UNLIKE = 1.0  # half of the range of pixels, see _estimate
FEW = 3  # as in csrc/sampled/engine.cpp: errors grow by FEW / n where the variance is that of n equal contributions
_SEED = 20251126
_FOUND_ALIKE: WeakKeyDictionary[PatchBank, dict[str, bool]] = WeakKeyDictionary()  # by set, as all images are read


def draw(
    definition: Definition,
    bank: PatchBank,
    name: str,
    numbers: range | Tensor,
    query: Query,
    want: Want,
    tolerance: float,
    threads: int,
    dice: int,
) -> PartialPosterior | None:
    """The partial posterior of a query, estimated from some of the images of these numbers; None: it would take too
    many, or what those drawn say cannot be trusted.

    Parameters
    ----------
    name     what the set of images is called, as in `Selection`
    numbers  of its images in the bank
    query    one; the same draws the same images, whatever it is asked beside
    dice     which of independent draws; as `Sampled` has it
    """
    n, most = len(numbers), SEARCH_IMAGES + SEARCH_SHARE * len(numbers)
    least, places = _least_spread(definition, query), definition.places(*query.x.shape[2:])
    if n < LEAST_IMAGES or _to_trust(least, places) > most:
        return None
    # Other images for every query: one unlucky draw is not that of all, and errors of samples and steps average out.
    # Those of dice 0 are as without any: a zero at the end is none to numpy.
    rng = np.random.default_rng((_SEED, zlib.crc32(query.x.detach().numpy().tobytes()), dice))
    order = as_numbers(numbers)[torch.from_numpy(rng.permutation(n))]

    def batches(count: int, size: int, first: int, of: Query, want: Want) -> PartialPosterior:
        """So many partial posteriors, each of so many images, from the first on."""
        begin = first + size * torch.arange(count, device=CPU)
        selection = Selection(len(bank), order, begin, begin + size, ("",) * count)
        return evaluate("cpu", {"threads": threads}, definition, bank.images, selection, of.of([0] * count), want)

    # With more noise weights are flatter, and a few images tell how log w varies: that is by the ratio of sigma^2 more.
    # The entropy says it by the second moment where log w varies little, and of a normal distribution always. Measured
    # on Fashion-MNIST, it is within a tenth of the standard deviation up to 5 nats, and on the low side.
    ratio = 1 + 4 * float(least.max())
    noisier = replace(query, sigma=query.sigma * math.sqrt(ratio))
    flat = _estimate(batches(PILOT, LANES, 0, noisier, Want.POSTERIOR), PILOT * LANES, n)
    lost = (flat.count.log() - flat.finish(torch.float64).entropy)[0].clamp(min=0)
    trusted = _to_trust(torch.maximum(least, ratio * (2 * lost).sqrt()), places)
    # The worst pixel needs more than the mean one does with flatter weights.
    if max(trusted, _needed(float(flat.error()[0].mean()) / tolerance, PILOT * LANES, n)) > most:
        return None
    if not _are_alike(bank, name, numbers):
        return None
    total, drawn, wanted = None, 0, float(BATCHES * LANES)
    while True:
        size = min(LANES * math.ceil((wanted - drawn) / (BATCHES * LANES)), (n - drawn) // BATCHES)
        if wanted - drawn > most or size == 0:
            return None
        more = batches(BATCHES, size, drawn, query, want)
        total = more if total is None else total.merge(more)
        drawn += BATCHES * size
        found = _estimate(total, drawn, n)
        too_large = (float(found.error()[0].max()) - ROUNDING) / tolerance
        if too_large <= 1 and drawn >= trusted:
            return found
        wanted = max(trusted, _needed(1.1 * too_large, drawn, n) if too_large > 1 else 0)


def _least_spread(definition: Definition, query: Query) -> Tensor:
    """The least standard deviation of log w, in nats, that every pixel (H, W) is credited with, float64: an image that
    was not drawn may be unlike those that were. It is that of windows of independent pixels with LEAST_DEVIATION, to
    first order in alpha, of a query that is noise: half of what Fashion-MNIST has. By itself it rules out low noise,
    before an image is looked at."""
    _, channels, height, width = query.x.shape

    def values(n: int) -> Tensor:
        """Of a window, along an axis."""
        at, r = torch.arange(n, dtype=torch.float64, device=CPU), definition.size // 2
        return torch.full_like(at, 2 * r + 1) if definition.wraps else (at + r + 1).clamp(max=n) - (at - r).clamp(min=0)

    within = channels * values(height)[:, None] * values(width)[None, :]
    return LEAST_DEVIATION * float(query.alpha / query.sigma) * within.sqrt()


def _to_trust(spread: Tensor, places: Tensor) -> float:
    """How many images have to be drawn, where log w has these standard deviations (H, W), for what was drawn to tell of
    what was not. A small variance tells nothing if the windows that carry the weight are not among those drawn. They
    lie as many standard deviations above the mean as these are nats: w times a normal density is one that is moved by
    so much."""
    return float((TRUSTED / (places * torch.special.ndtr(-spread))).max())


def _needed(too_large: float, drawn: int, n: int) -> float:
    """How many of n images make an error small enough that is too large by this factor with so many."""
    return 1 / (1 / n + (1 / drawn - 1 / n) / too_large**2)


def _are_alike(bank: PatchBank, name: str, numbers: range | Tensor) -> bool:
    """Whether the set is without strange images: one that is bright where thousands are dark may carry all of a weight,
    and those drawn without it would not tell."""
    found = _FOUND_ALIKE.setdefault(bank, {})
    if name not in found:
        some = as_numbers(numbers)[:: max(1, len(numbers) // 512)]
        middle = bank.images[some].float().mean(0)
        parts = chunks(bank.images, numbers, 1 << 22)
        apart = torch.cat([(part.float() - middle).square().flatten(1).mean(1) for _, part in parts])
        found[name] = bool(apart.max() <= STRANGE * apart.mean())
    return found[name]


def _estimate(batches: PartialPosterior, drawn: int, n: int) -> PartialPosterior:
    """What equal batches of images, so many in all, say of the set of n that they were drawn from."""
    total, count = batches, len(batches.m)
    while len(total.m) > 1:
        half = len(total.m) // 2
        total = total.of(slice(half)).merge(total.of(slice(half, None)))
    scale = alone(np.exp, torch.exp, batches.m - total.m)
    # By how much each differs from their mean.
    s, y = scale * batches.s - total.s / count, scale[:, None] * batches.y - total.y / count
    # Their variance is known as well as if it were that of so many equal contributions.
    squared = (y - total.y / total.s[:, None] * s[:, None]).square()
    inverse = squared.square().sum(0) / squared.sum(0).square().clamp(min=1e-300) - 1 / count
    up, left = n / drawn, 1 - drawn / n
    variance = up**2 * left * count / (count - 1) * (1 + FEW * inverse.amax(0).clamp(min=0)) ** 2
    # As if one image had been of another kind: where all that were drawn are black, a white one is not impossible.
    unlike = left * (up * total.s[:, None] / drawn * UNLIKE) ** 2
    return replace(
        total,
        s=up * total.s,
        y=up * total.y,
        count=up * total.count,
        e=None if total.e is None else up * total.e,
        ss=variance * s.square().sum(0, keepdim=True),
        sy=variance * (s[:, None] * y).sum(0, keepdim=True),
        yy=variance * y.square().sum(0, keepdim=True) + unlike,
        chance=up * total.count * (left > 0),
    )
