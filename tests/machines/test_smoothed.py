"""The smoothed ideal score machine against its definition in numpy."""

import pickle

import numpy as np
import pytest
import torch
from helpers import noisy

import pyels


def ideal(images, x, alpha, sigma):
    """IS over images (N, D), of queries (B, D)."""
    log_w = -((x[:, None] - alpha * images) ** 2).sum(2) / (2 * sigma**2)
    w = np.exp(log_w - log_w.max(1, keepdims=True))
    return w @ images / w.sum(1, keepdims=True)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.4), (0.5, 3.0)])
@pytest.mark.parametrize(("std", "draws", "seed"), [(0.1, 10, 0), (1.0, 3, 7), (0.0, 2, 0)])
def test_it_is_the_mean_over_perturbed_queries(small, std, draws, seed, alpha, sigma):
    x = noisy(small, alpha, sigma, batch=3)
    machine = pyels.SmoothedIS(small, std, draws, seed)
    noise = torch.randn((draws, *small.shape), generator=torch.Generator().manual_seed(seed))
    images = (small.images.numpy() / 127.5 - 1).reshape(12, -1)
    means = [ideal(images, (x + std * one).numpy().reshape(3, -1).astype(np.float64), alpha, sigma) for one in noise]
    ours = machine.denoise(x, alpha, sigma)
    assert np.abs(ours.numpy().reshape(3, -1) - np.mean(means, axis=0)).max() < 1e-4  # worst seen 2e-6
    assert torch.equal(machine.denoise(x[1:2], alpha, sigma), ours[1:2])
    assert torch.equal(pickle.loads(pickle.dumps(machine)).denoise(x, alpha, sigma), ours)


def test_levels_labels_and_selections_of_a_batch(small):
    alpha, sigma, labels = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.8]), [2, 0]
    x = noisy(small, alpha, sigma, batch=2)
    machine = pyels.SmoothedIS(small, draws=3)
    ours = machine.denoise(x, alpha, sigma, labels)
    assert torch.equal(machine.denoise(x, alpha, sigma, selection=small.select(labels)), ours)
    for b, label in enumerate(labels):
        of_class = pyels.SmoothedIS(small[small.labels == label], draws=3)
        torch.testing.assert_close(of_class.denoise(x[b : b + 1], alpha[b], sigma[b]), ours[b : b + 1])
    without = machine.denoise(x, alpha, sigma, selection=small.select(without=[0]))
    others = pyels.SmoothedIS(small[torch.arange(1, 12)], draws=3)
    torch.testing.assert_close(others.denoise(x, alpha, sigma), without)


def test_derivative_agrees_with_differences(small):
    machine = pyels.SmoothedIS(small, 0.5, 4, engine="reference")
    x = noisy(small, 0.5, 2.0, batch=2).requires_grad_()
    g, along = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    (machine.denoise(x, 0.5, 2.0) * g).sum().backward()
    step = 0.01
    ahead, behind = (machine.denoise((x + sign * step * along).detach(), 0.5, 2.0) for sign in (1, -1))
    expected = ((ahead - behind) * g).sum() / (2 * step)
    torch.testing.assert_close((x.grad * along).sum().double(), expected, rtol=1e-3, atol=1e-4)


def test_bad_arguments(small):
    with pytest.raises(ValueError, match=r"std must be finite and not negative, got -0.1"):
        pyels.SmoothedIS(small, -0.1)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        pyels.SmoothedIS(small, draws=0)
    with pytest.raises(ValueError, match="patch_size 3 was given"):
        pyels.SmoothedIS(small).denoise(noisy(small, 0.6, 0.8), 0.6, 0.8, patch_size=3)
