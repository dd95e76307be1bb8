"""What one would otherwise run to evaluate ELS "interior", for `pyels.studies.bench` to time.

Each prepares, from patches (P, C, k, k) and queries x (B, C, H, W), what is then timed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

RELEASED_WAY = "conv2d"
CACHED_WEIGHTS = 1 << 18  # weights of a chunk that stay in one core's cache: larger chunks are up to twice as slow
CACHED_QUERIES = 1 << 10
LEAST_LOG_WEIGHT = -80.0  # below the largest; exp of less is denormal, many times slower to sum, and adds nothing
MATERIALISED_WEIGHTS = 1 << 25

Evaluation = Callable[[], Tensor]  # -> (B, C, H, W)
Alternative = Callable[[Tensor, Tensor, float, float], Evaluation]


def alternatives() -> dict[str, Alternative]:
    """By name; KeOps where it is installed."""
    found: dict[str, Alternative] = {"SDPA": sdpa, "matmul": chunked_matmul, RELEASED_WAY: conv2d}
    if importlib.util.find_spec("pykeops") is not None:
        found["KeOps"] = keops
    return found


def windows(images: Tensor, k: int) -> Tensor:
    """All k x k windows that lie wholly inside images (n, C, H, W): (n * (H-k+1) * (W-k+1), C, k, k)."""
    views = images.unfold(2, k, 1).unfold(3, k, 1).permute(0, 2, 3, 1, 4, 5)
    return views.reshape(-1, *views.shape[3:])


def sdpa(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """torch's scaled_dot_product_attention; an extra coordinate holds the patches' squared norms.

    q.k = (alpha * x.phi - alpha^2 * ||phi||^2 / 2) / sigma^2 is log w up to a constant of the query. The values are the
    keys once more, because the fused kernel wants both of one width; the centre pixel of the mean patch is the answer.
    """
    k = patches.shape[-1]
    queries = _queries(x, k).flatten(1)
    flat = patches.flatten(1)
    queries = torch.cat(
        [queries * (alpha / sigma**2), queries.new_full((len(queries), 1), -((alpha / sigma) ** 2) / 2)], 1
    )
    keys = torch.cat([flat, flat.square().sum(dim=1, keepdim=True)], dim=1)
    if x.is_cuda:  # whose fused kernel wants rows of whole 32 bytes
        queries, keys = (F.pad(rows, (0, -rows.shape[1] % 8)) for rows in (queries, keys))

    def evaluate() -> Tensor:
        mean = F.scaled_dot_product_attention(queries[None, None], keys[None, None], keys[None, None], scale=1.0)
        return _images(mean[0, 0, :, k * k // 2 : flat.shape[1] : k * k], x)

    return evaluate


def chunked_matmul(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """||a||^2 - 2ab + ||b||^2 by matrix products, chunk by chunk with a running softmax.

    As fast as torch makes it: ||a||^2, the same for all patches, is left out, the weights of a chunk stay in cache, and
    none is denormal.
    """
    queries = _queries(x, patches.shape[-1]).flatten(1)
    weights = MATERIALISED_WEIGHTS if x.is_cuda else CACHED_WEIGHTS * torch.get_num_threads()
    chunk = max(1, weights // min(len(queries), CACHED_QUERIES))
    flat = torch.split(patches.flatten(1), chunk)
    norms = [phi.square().sum(dim=1) for phi in flat]
    centres = torch.split(_centres(patches), chunk)

    def evaluate() -> Tensor:
        means = []
        for q in torch.split(queries, CACHED_QUERIES):
            log_w = (
                torch.addmm(n, q, phi.T, beta=-((alpha / sigma) ** 2) / 2, alpha=alpha / sigma**2)
                for n, phi in zip(norms, flat, strict=True)
            )
            means.append(_softmax_mean(log_w, centres, LEAST_LOG_WEIGHT))
        return _images(torch.cat(means), x)

    return evaluate


def conv2d(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """The paper's released code's way: patches of a batch of images are filters of a convolution of the query, and
    distances and weights are written out as whole tensors, here of up to 128 MB.

    Unlike there, the softmaxes of the batches are merged, not averaged.
    """
    chunks = torch.split(patches, max(1, MATERIALISED_WEIGHTS // x[0, 0].numel()))
    centres = [_centres(phi) for phi in chunks]
    wrapped = _wrapped(x, patches.shape[-1])

    def log_weights(image: Tensor, phi: Tensor) -> Tensor:
        image_norms = F.conv2d(image.square(), torch.ones_like(phi[:1]))
        phi_norms = phi.square().sum(dim=(1, 2, 3))[:, None, None]
        distances = image_norms - 2 * alpha * F.conv2d(image, phi) + alpha**2 * phi_norms
        return (-distances / (2 * sigma**2)).flatten(1).T

    def evaluate() -> Tensor:
        means = [_softmax_mean((log_weights(image, phi) for phi in chunks), centres) for image in wrapped]
        return _images(torch.cat(means), x)

    return evaluate


def keops(patches: Tensor, x: Tensor, alpha: float, sigma: float) -> Evaluation:
    """KeOps' symbolic matrices: squared differences and softmax in one compiled loop."""
    with contextlib.redirect_stdout(sys.stderr):  # where it says what it found
        importlib.import_module("pykeops").set_verbose(False)
        lazy = importlib.import_module("pykeops.torch").LazyTensor
    queries = _queries(x, patches.shape[-1]).flatten(1)[:, None]
    flat, centres = alpha * patches.flatten(1)[None], _centres(patches)[None]

    def evaluate() -> Tensor:
        distances = ((lazy(queries) - lazy(flat)) ** 2).sum(-1)
        return _images((distances / (-2 * sigma**2)).sumsoftmaxweight(lazy(centres), dim=1), x)

    return evaluate


def _softmax_mean(log_w: Iterable[Tensor], centres: Iterable[Tensor], least: float | None = None) -> Tensor:
    """Means (Q, C) of centres (P, C) with weights from log_w (Q, P), both in chunks along P; overwrites log_w."""
    m, s, y = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for chunk, chunk_centres in zip(log_w, centres, strict=True):
        higher = torch.maximum(m, chunk.amax(dim=1))
        below = chunk.sub_(higher[:, None])
        w = (below if least is None else below.clamp_(min=least)).exp_()
        rescale = (m - higher).exp()
        s = rescale * s + w.sum(dim=1)
        y = rescale[:, None] * y + w @ chunk_centres
        m = higher
    return y / s[:, None]


def _wrapped(x: Tensor, k: int) -> Tensor:
    return F.pad(x, (k // 2,) * 4, mode="circular")


def _queries(x: Tensor, k: int) -> Tensor:
    """The wrapped windows of all pixels, (B * H * W, C, k, k)."""
    return windows(_wrapped(x, k), k)


def _centres(patches: Tensor) -> Tensor:
    """(P, C)"""
    r = patches.shape[-1] // 2
    return patches[:, :, r, r].contiguous()


def _images(means: Tensor, x: Tensor) -> Tensor:
    """Means (B * H * W, C) as images (B, C, H, W)."""
    batch, channels, height, width = x.shape
    return means.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
