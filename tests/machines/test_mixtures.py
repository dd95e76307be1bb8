"""Mixtures over window sizes against their definition in numpy."""

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

import pyels

LEVELS = [(0.95, 0.3), (0.6, 0.8), (0.2, 0.98)]


def posterior(images, x, alpha, sigma, k, everywhere):
    """Mean and variance (C, H, W) and entropy (H, W) of LS, or circular ELS, with k x k windows."""
    (_, h, w), r = x.shape, k // 2
    mode = {"mode": "wrap"} if everywhere else {"constant_values": np.nan}
    pad = [(0, 0)] * (x.ndim - 2) + [(r, r), (r, r)]
    padded, others = np.pad(x, pad, **mode), np.pad(images, [(0, 0), *pad], **mode)
    mean, variance, entropy = np.empty_like(x), np.empty_like(x), np.empty((h, w))
    for p in np.ndindex(h, w):
        places = list(np.ndindex(h, w)) if everywhere else [p]
        window = padded[:, p[0] : p[0] + k, p[1] : p[1] + k]
        patches = np.concatenate([others[:, :, i : i + k, j : j + k] for i, j in places])
        centres = np.concatenate([images[:, :, i, j] for i, j in places])
        log_w = -np.nansum((window - alpha * patches) ** 2, axis=(1, 2, 3)) / (2 * sigma**2)
        shares = np.exp(log_w - log_w.max())
        shares /= shares.sum()
        at = (slice(None), *p)
        mean[at] = shares @ centres
        variance[at] = shares @ (centres - mean[at]) ** 2
        entropy[p] = -(shares * np.log(np.maximum(shares, 1e-300))).sum()
    return mean, variance, entropy


def mixture(images, x, alpha, sigma, sizes, beta, everywhere):
    means, energies = [], []
    for k in sizes:
        mean, variance, entropy = posterior(images, x, alpha, sigma, k, everywhere)
        means.append(mean)
        energies.append(beta * alpha**2 / sigma**2 * variance.mean(0) - entropy)
    shares = np.exp(np.min(energies, axis=0) - energies)
    return (shares[:, None] * np.stack(means)).sum(0) / shares.sum(0)


@pytest.mark.parametrize(("engine", "bound"), [("reference", 1e-9), ("cpu", 1e-4)])
@pytest.mark.parametrize("kind", [pyels.ASLS, pyels.ASELS])
@pytest.mark.parametrize(("sizes", "beta"), [((3, 5), 5.0), ((1, 3, 5), 0.5)])
def test_mixture_is_its_formula(kind, sizes, beta, engine, bound):
    bank = make_bank(9, (2, 6, 5), labels=[0, 1, 0] * 3)
    images = bank.images.numpy() / 127.5 - 1
    boundary = {"boundary": "circular"} if kind is pyels.ASELS else {}
    machine = kind(bank, sizes, beta, engine=engine, **boundary)
    alpha, sigma = (torch.tensor(level) for level in zip(*LEVELS, strict=True))
    x = noisy(bank, alpha, sigma, batch=3)
    ours, of_class = machine.denoise(x, alpha, sigma), machine.denoise(x, alpha, sigma, [0, 1, 0])
    for b in range(3):
        given = x[b].double().numpy(), float(alpha[b].double()), float(sigma[b].double())
        expected = mixture(images, *given, sizes, beta, bool(boundary))
        assert np.abs(ours[b].numpy() - expected).max() < bound
        some = images[bank.labels == [0, 1, 0][b]]
        assert np.abs(of_class[b].numpy() - mixture(some, *given, sizes, beta, bool(boundary))).max() < bound


def test_published_sizes_are_the_defaults(small):
    machine = pyels.ASELS(small, engine="reference")
    assert (machine.sizes, machine.beta, machine.denoiser.boundary) == ((3, 5, 7, 9, 11), 5.0, "zeros")


def test_one_size_is_the_machine(small):
    x = noisy(small, 0.6, 0.8)
    one, machine = pyels.ASELS(small, [3], engine="reference"), pyels.ELS(small, 3, engine="reference")
    torch.testing.assert_close(one.denoise(x, 0.6, 0.8), machine.denoise(x, 0.6, 0.8))
    other = pyels.Mixture(pyels.ELS(small, engine="reference"), [3, 5])
    assert torch.equal(other.denoise(x, 0.6, 0.8), pyels.ASELS(small, [3, 5], engine="reference").denoise(x, 0.6, 0.8))


def test_bad_arguments(small):
    x = noisy(small, 0.6, 0.8)
    with pytest.raises(ValueError, match="patch_size must be odd and positive, got 4"):
        pyels.ASLS(small, (3, 4))
    with pytest.raises(ValueError, match="sizes is empty"):
        pyels.ASLS(small, ())
    with pytest.raises(ValueError, match="beta must be finite and not negative, got -1"):
        pyels.ASELS(small, beta=-1)
    with pytest.raises(ValueError, match="patch_size 3 was given, but ASLS has"):
        pyels.ASLS(small).denoise(x, 0.6, 0.8, patch_size=3)
    with pytest.raises(RuntimeError, match="a derivative was asked for"):
        pyels.ASLS(small, (1, 3)).denoise(x.requires_grad_(), 0.6, 0.8).sum().backward()
