import pytest
import torch

import pyels
from pyels.adapters import from_pyels
from pyels.networks.load import load_network


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_receptive_field_and_equivariance(padding):
    torch.manual_seed(0)
    network = pyels.ResNet(channels=2, width=8, depth=2, padding=padding).eval()
    x = torch.randn(1, 2, 24, 24, requires_grad=True)
    network(x, torch.tensor([0.7]))[0, 0, 12, 12].backward()
    seen = x.grad[0].abs().amax(dim=0) > 0
    assert int(seen.any(dim=0).sum()) == int(seen.any(dim=1).sum()) == 2 * 2 + 5
    with torch.no_grad():
        moved = network(torch.roll(x, (3, 5), (2, 3)), torch.tensor([0.7]))
        expected = torch.roll(network(x, torch.tensor([0.7])), (3, 5), (2, 3))
    assert torch.allclose(moved, expected, atol=1e-5) == (padding == "circular")


def _with_weights(network):
    """All weights random: those that start at zero hide what a network depends on."""
    torch.manual_seed(1)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network.eval()


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_unet_is_equivariant_to_moves_by_its_coarsest_pixel(padding):
    network = _with_weights(pyels.UNet(channels=3, width=4, padding=padding))
    x, angle = torch.randn(1, 3, 16, 24), torch.tensor([0.7])
    with torch.no_grad():
        out = network(x, angle)
        by_four = network(torch.roll(x, (4, 8), (2, 3)), angle)
        by_one = network(torch.roll(x, (1, 0), (2, 3)), angle)
    assert out.shape == x.shape
    assert torch.allclose(by_four, torch.roll(out, (4, 8), (2, 3)), atol=1e-5) == (padding == "circular")
    assert not torch.allclose(by_one, torch.roll(out, (1, 0), (2, 3)), atol=1e-3)


def test_unet_sees_noise_level_and_class_at_every_scale():
    network = _with_weights(pyels.UNet(width=4, depth=2, num_classes=3))
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        outs = [network(x, torch.tensor([a]), torch.tensor([c])) for a, c in ((0.3, 0), (0.9, 0), (0.3, 1))]
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.allclose(outs[0], outs[2], atol=1e-3)
    with pytest.raises(ValueError, match="9x8 pixels do not fit the UNet's three scales"):
        network(torch.zeros(1, 1, 9, 8), torch.tensor([0.3]), torch.tensor([0]))


@pytest.mark.parametrize("kind", [pyels.ResNet, pyels.UNet])
@pytest.mark.parametrize("half", [False, True])
def test_save_and_load(tmp_path, kind, half):
    network = _with_weights(kind(channels=2, width=8, depth=2, num_classes=3, padding="circular"))
    network.save(tmp_path / "net.safetensors", {"training": {"steps": 7}}, half)
    loaded, record = load_network(tmp_path / "net.safetensors")
    assert type(loaded) is kind
    assert loaded.config == network.config == record["config"]
    assert record["training"] == {"steps": 7}
    for a, b in zip(network.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float() if half else a, b)
    arguments = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 1.1]), torch.tensor([0, 2])
    torch.testing.assert_close(network(*arguments), loaded(*arguments), atol=0.05 if half else 0, rtol=0)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "net.safetensors"
    pyels.ResNet(width=8, depth=2).save(path)
    content = path.read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\x80\x04}q\x00.", content.replace(b"ResNet", b"VitNet")):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"net\.safetensors: (not a network saved by pyels|damaged safetensors file)"
        ):
            load_network(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such file"):
        load_network(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"padding": "reflect"}, "padding must be 'zeros' or 'circular', got 'reflect'"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        pyels.UNet(**arguments)


@pytest.mark.parametrize(
    ("labels", "message"), [(None, "needs a label"), (torch.tensor([3]), r"labels must lie in 0\.\.2")]
)
def test_bad_labels(labels, message):
    network = pyels.ResNet(width=8, depth=2, num_classes=3)
    with pytest.raises(ValueError, match=message):
        from_pyels(network).denoise(torch.zeros(1, 1, 9, 9), 0.6, 0.8, labels=labels)
