"""Classifier-free guidance."""

import pytest
import torch
from helpers import noisy

import pyels
from pyels.adapters import NetworkDenoiser


def test_guidance_of_networks_and_machines(small):
    x, labels = noisy(small, 0.6, 0.8, batch=3), torch.tensor([0, 1, 2])
    machine = pyels.LS(small, 3)
    none, label = machine.eps(x, 0.6, 0.8), machine.eps(x, 0.6, 0.8, labels)
    for scale in (0, 1, 2.5):
        guided = pyels.Guided(machine, scale)
        torch.testing.assert_close(guided.eps(x, 0.6, 0.8, labels), none + scale * (label - none), atol=1e-5, rtol=0)
    assert pyels.sample(pyels.Guided(pyels.ELS(small), 2), x, 2, patch_sizes=[3, 5], labels=labels).shape == x.shape
    network = NetworkDenoiser(lambda x, t, y: y[:, None, None, None] * 0.1 + 0 * x, "x0", null_label=4, clip=0.5)
    found = pyels.Guided(network, 3).denoise(x, 0.6, 0.8, labels)
    expected = (0.4 + 3 * (0.1 * labels - 0.4)).clamp(-0.5, 0.5)  # clipped once, in the end
    torch.testing.assert_close(found, expected[:, None, None, None].expand_as(x))
    with pytest.raises(ValueError, match="guidance needs the class of every image"):
        pyels.Guided(machine, 2).denoise(x, 0.6, 0.8)
    with pytest.raises(ValueError, match="give NetworkDenoiser a null_label"):
        pyels.Guided(NetworkDenoiser(lambda x, t, y: x, num_classes=3), 2)
    with pytest.raises(TypeError, match="denoiser must be a machine"):
        pyels.Guided(small, 2)
    for scale in (float("nan"), "2"):
        with pytest.raises((TypeError, ValueError), match=r"scale must be (finite|a number)"):
            pyels.Guided(machine, scale)
