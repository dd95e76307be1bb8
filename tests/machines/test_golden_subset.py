"""Golden subsets against their definition in numpy."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

import pyels


def averaged(images, n):
    c, h, w = images.shape[-3:]
    return images.reshape(-1, c, n, h // n, n, w // n).mean((3, 5))


def subset(images, x, alpha, sigma, least, most, n):
    """Numbers of the images (N, C, H, W) float64 that count for a query (C, H, W)."""
    count = max(least, round(most - (most - least) * (1 - sigma / math.hypot(alpha, sigma))))
    distances = ((averaged(x, n) - alpha * averaged(images, n)) ** 2).sum((1, 2, 3))
    near = np.sort(np.argsort(distances, kind="stable")[:most])
    distances = ((x - alpha * images[near]) ** 2).sum((1, 2, 3))
    return near[np.argsort(distances, kind="stable")[:count]]


@pytest.fixture
def bank():
    return make_bank(60, (2, 8, 8), labels=[0, 1, 2] * 20)


def in_float64(bank):
    return bank.images.numpy() / 127.5 - 1


@pytest.mark.parametrize("averages", [None, 4, 1])
def test_each_query_has_its_own_images(bank, averages):
    alpha, sigma = torch.tensor([0.99, 0.6, 0.1, 1.0]), torch.tensor([0.1, 0.8, 0.99, 3.0])
    x = noisy(bank, alpha, sigma, batch=4)
    inner = pyels.LS(bank, 3)
    machine = pyels.Golden(inner, 5, 20, averages)
    chosen = machine.subsets(machine.query(x, alpha, sigma))
    means = machine.denoise(x, alpha, sigma)
    for b in range(4):
        expected = subset(
            in_float64(bank), x[b].double().numpy(), float(alpha[b]), float(sigma[b]), 5, 20, averages or 8
        )
        assert chosen[b].tolist() == expected.tolist()
        alone = inner.denoise(x[b : b + 1], alpha[b], sigma[b], selection=bank.select(images=chosen[b]))
        assert torch.equal(means[b : b + 1], alone)
        assert torch.equal(machine.denoise(x[b : b + 1], alpha[b], sigma[b]), alone)


def test_a_class_or_a_selection_is_as_a_bank_of_its_own(bank):
    x, labels = noisy(bank, 0.6, 0.8, batch=2), [2, 0]
    machine = pyels.Golden(pyels.ELS(bank, 3), 2)
    means = machine.denoise(x, 0.6, 0.8, labels)
    selected = machine.denoise(x, 0.6, 0.8, selection=bank.select(labels))
    for b, label in enumerate(labels):
        of_class = pyels.Golden(pyels.ELS(bank[bank.labels == label], 3), 2)
        torch.testing.assert_close(means[b : b + 1], of_class.denoise(x[b : b + 1], 0.6, 0.8))
    assert torch.equal(selected, means)


def test_streamed_and_pickled(bank, tmp_path):
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=2048)
    assert streamed.streamed
    x = noisy(bank, 0.6, 0.8, batch=2)
    machine = pyels.Golden(pyels.LS(bank, 3), 5, 20)
    mean = machine.denoise(x, 0.6, 0.8)
    torch.testing.assert_close(pyels.Golden(pyels.LS(streamed, 3), 5, 20).denoise(x, 0.6, 0.8), mean)
    assert torch.equal(pickle.loads(pickle.dumps(machine)).denoise(x, 0.6, 0.8), mean)


def test_sizes_and_derivatives_are_the_machines(bank):
    inner = pyels.LS(bank, engine="reference")
    machine = pyels.Golden(inner, 5, 20)
    x = noisy(bank, 0.6, 0.8).requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (machine.denoise(x, 0.6, 0.8, patch_size=5) * g).sum().backward()
    ours = x.grad.clone()
    x.grad = None
    chosen = bank.select(images=machine.subsets(machine.query(x.detach(), 0.6, 0.8)))
    (inner.denoise(x, 0.6, 0.8, patch_size=5, selection=chosen) * g).sum().backward()
    assert torch.equal(ours, x.grad)
    assert ours.abs().max() > 0
    with pytest.raises(ValueError, match="patch_size is missing"):
        machine.denoise(x, 0.6, 0.8)


def test_bad_arguments(bank):
    with pytest.raises(TypeError, match=r"machine must be a pyels.Machine, got PatchBank"):
        pyels.Golden(bank)
    with pytest.raises(ValueError, match="least must be at most most, got 9 and 3"):
        pyels.Golden(pyels.IS(bank), 9, 3)
    with pytest.raises(ValueError, match="averages must divide the sides of 8x8 images, got 3"):
        pyels.Golden(pyels.IS(bank), averages=3)
