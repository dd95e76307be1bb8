"""Wiener filters against their formula in numpy."""

import pickle

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

import pyels
from pyels.machines import linear

LEVELS = [(0.99, 0.14), (0.6, 0.8), (1.0, 20.0), (0.2, 1e-3)]


def flat(images):
    return images.numpy().astype(np.float64).reshape(len(images), -1)


def filtered(images, x, alpha, sigma, rank=None):
    """The formula, over flattened images (N, D), of queries (B, D)."""
    mean = images.mean(0)
    covariance = np.cov(images.T)
    if rank is not None:
        values, vectors = np.linalg.eigh(covariance)
        covariance = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    inverse = np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(len(mean)))
    return mean + alpha * (x - alpha * mean) @ inverse @ covariance


def close(ours, expected, bound=1e-5):
    assert ours.dtype == torch.float32
    assert np.abs(flat(ours) - expected).max() < bound


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("n", [12, 200], ids=["fewer-images", "fewer-values"])
@pytest.mark.parametrize("rank", [None, 5])
def test_wiener_is_its_formula(n, rank, alpha, sigma):
    bank = make_bank(n, (2, 7, 8))
    x = noisy(bank, alpha, sigma, batch=3)
    ours = pyels.Wiener(bank, rank=rank).denoise(x, alpha, sigma)
    close(ours, filtered(flat(bank.read(slice(None))), flat(x), alpha, sigma, rank))  # worst seen 2e-6


def test_levels_and_classes_of_a_batch(small):
    labels, alpha, sigma = torch.tensor([2, 0, 2]), [0.9, 0.5, 0.7], [0.3, 0.8, 0.7]
    x = noisy(small, torch.tensor(alpha), torch.tensor(sigma), batch=3)
    machine = pyels.Wiener(small)
    ours = machine.denoise(x, alpha, sigma, labels)
    images = small.read(slice(None))
    for b, label in enumerate(labels):
        of_class = flat(images[small.labels == label])
        close(ours[b : b + 1], filtered(of_class, flat(x[b : b + 1]), alpha[b], sigma[b]))
    chosen = machine.denoise(x, alpha, sigma, selection=small.select(without=[0, 3]))
    for b in range(3):
        others = np.delete(flat(images), [0, 3], axis=0)
        close(chosen[b : b + 1], filtered(others, flat(x[b : b + 1]), alpha[b], sigma[b]))
    assert machine.denoise(x[:0], 0.5, 0.5).shape == (0, *small.shape)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 4, 3)], ids=str)
def test_circular_is_that_of_all_translates(shape, alpha, sigma):
    bank = make_bank(6, shape)
    images = bank.read(slice(None))
    moved = [images.roll((i, j), (2, 3)) for i in range(shape[1]) for j in range(shape[2])]
    x = noisy(bank, alpha, sigma, batch=2)
    ours = pyels.Wiener(bank, circular=True).denoise(x, alpha, sigma)
    close(ours, filtered(flat(torch.cat(moved)), flat(x), alpha, sigma))


def test_large_covariances_need_a_rank_or_translates(monkeypatch, small):
    x = noisy(small, 0.6, 0.8)
    exact = pyels.Wiener(small, rank=2).denoise(x, 0.6, 0.8)
    monkeypatch.setattr(linear, "LARGEST", 24)
    monkeypatch.setattr(linear, "DIRECT", 1)
    with pytest.raises(ValueError, match=r"72 values over 12 images is too large: give rank="):
        pyels.Wiener(small).denoise(x, 0.6, 0.8)
    torch.testing.assert_close(pyels.Wiener(small, rank=2).denoise(x, 0.6, 0.8), exact, rtol=0, atol=1e-5)
    assert pyels.Wiener(small, circular=True).denoise(x, 0.6, 0.8).shape == x.shape
    assert pyels.Wiener(small).denoise(x, 0.6, 0.8, labels=[1]).shape == x.shape  # of 4 images


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"circular": True}], ids=str)
def test_streamed_and_pickled(options, tmp_path):
    bank = make_bank(300, (3, 32, 32), labels=[0, 1] * 150)
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit="300KB")
    assert streamed.streamed
    x, labels = noisy(bank, 0.6, 0.8, batch=2), [1, 0]
    machine = pyels.Wiener(bank, **options)
    expected = machine.denoise(x, 0.6, 0.8, labels)
    assert torch.equal(pyels.Wiener(streamed, **options).denoise(x, 0.6, 0.8, labels), expected)
    assert torch.equal(pickle.loads(pickle.dumps(machine)).denoise(x, 0.6, 0.8, labels), expected)


@pytest.mark.parametrize("circular", [False, True])
def test_derivative_is_the_matrix(small, circular):
    machine = pyels.Wiener(small, circular=circular)
    x = noisy(small, 0.6, 0.8).requires_grad_()
    g, along = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    (machine.denoise(x, 0.6, 0.8) * g).sum().backward()
    moved = machine.denoise((x + along).detach(), 0.6, 0.8) - machine.denoise(x.detach(), 0.6, 0.8)
    torch.testing.assert_close((x.grad * along).sum(), (moved * g).sum(), rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_bounded(monkeypatch, small):
    x = noisy(small, 0.6, 0.8)
    machine = pyels.Wiener(small)
    monkeypatch.setattr(linear, "KEPT_BYTES", 1)
    for label in (0, 1, 0, None):
        machine.denoise(x, 0.6, 0.8, None if label is None else [label])
        assert len(machine._kept) == 1


def test_an_only_image_is_the_answer(small):
    bank = small[4:5]
    torch.testing.assert_close(pyels.Wiener(bank).denoise(noisy(bank, 0.6, 0.8), 0.6, 0.8), bank.read(slice(None)))


def test_bad_arguments(small):
    with pytest.raises(TypeError, match=r"bank must be a pyels.PatchBank, got Tensor"):
        pyels.Wiener(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="leave out rank"):
        pyels.Wiener(small, rank=2, circular=True)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        pyels.Wiener(small, rank=0)
    with pytest.raises(ValueError, match="patch_size 3 was given, but Wiener has none"):
        pyels.Wiener(small).denoise(noisy(small, 0.6, 0.8), 0.6, 0.8, patch_size=3)
    with pytest.raises(ValueError, match="x has images of shape"):
        pyels.Wiener(small).denoise(torch.zeros(1, 1, 4, 4), 0.6, 0.8)
