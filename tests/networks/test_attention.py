import pytest
import torch

import pyels
from pyels.networks import KINDS, NETWORKS
from pyels.networks.load import load_network


def build(kind, **config):
    torch.manual_seed(0)
    network = kind(**{"width": 8, "depth": 2, **config}).eval()
    with torch.no_grad():  # of layers that begin with zeros too
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    return network


@pytest.mark.parametrize("kind", [pyels.UNetAttention, pyels.DiT])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 12, 8)])
@torch.no_grad()
def test_a_pixel_sees_the_whole_image(kind, shape):
    network = build(kind, channels=shape[1])
    x = torch.randn(shape)
    angle = torch.tensor([0.3, 1.2])
    out = network(x, angle)
    assert out.shape == x.shape
    assert torch.allclose(network(x[:1], angle[:1]), out[:1], atol=1e-5)  # samples do not meet
    far = x.clone()
    far[..., -1, -1] += 1
    assert (network(far, angle) - out)[..., 0, 0].abs().min() > 1e-5
    assert (network(x, angle + 0.1) - out).abs().min(0).values.max() > 1e-4


@torch.no_grad()
def test_places_are_told_apart_by_a_transformer():
    network = build(pyels.DiT)
    x = torch.ones(1, 1, 8, 8)
    tokens = torch.nn.functional.pixel_unshuffle(network(x, torch.tensor([0.5])), 2)[0].flatten(1).T
    assert len(torch.unique(tokens, dim=0)) == 16
    swapped = torch.randn(1, 1, 8, 8)
    turned = network(swapped.transpose(2, 3), torch.tensor([0.5])).transpose(2, 3)
    assert not torch.allclose(turned, network(swapped, torch.tensor([0.5])), atol=1e-3)


@pytest.mark.parametrize("kind", [pyels.UNetAttention, pyels.DiT])
def test_new_networks_say_nothing_of_their_attention(kind):
    """As deep networks begin as the identity, or as nothing."""
    torch.manual_seed(0)
    network = kind(width=8, depth=1)
    far, x = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    far[..., -1, -1] = 1
    assert torch.equal(network(far, torch.ones(1))[..., 0, 0], network(x, torch.ones(1))[..., 0, 0])


@pytest.mark.parametrize("name", NETWORKS)
def test_files_keep_what_a_network_predicts(name, tmp_path):
    network = build(NETWORKS[name], num_classes=3, predicts="velocity", null_label=True)
    network.save(tmp_path / "network.safetensors")
    again, record = load_network(tmp_path / "network.safetensors")
    assert record["config"] == network.config
    assert (again.predicts, again.null_label) == ("velocity", 3)
    x, angle, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(again(x, angle, labels), network(x, angle, labels))
    denoiser = pyels.adapters.from_pyels(again)
    assert (denoiser.predicts, denoiser.null_label, denoiser.num_classes) == ("velocity", 3, 3)


def test_what_cannot_be_made_is_refused():
    for config, message in (
        ({"predicts": "score"}, "predicts must be one of v, eps, x0, velocity, got 'score'"),
        ({"null_label": True}, "null_label is of networks with classes"),
    ):
        for kind in KINDS.values():
            with pytest.raises(ValueError, match=message):
                kind(**config)
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        pyels.DiT(width=6)
    with pytest.raises(ValueError, match="patch must be at least 1"):
        pyels.DiT(patch=0)
    with pytest.raises(ValueError, match="images of 9x8 pixels are not made of the transformer's squares of 2x2"):
        pyels.DiT(width=8)(torch.zeros(1, 1, 9, 8), torch.ones(1))
