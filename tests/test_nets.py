import pytest
import torch

import pyels
from pyels.calibration import calibrate
from pyels.training import train


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


def test_denoiser_does_not_depend_on_the_scale_of_alpha_and_sigma():
    torch.manual_seed(0)
    denoiser = pyels.NetworkDenoiser(pyels.ResNet(width=8, depth=2))
    x = torch.randn(3, 1, 9, 9)
    a = denoiser.denoise(x, 0.6, 0.8)
    b = denoiser.denoise(5 * x, 3.0, 4.0)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_v_prediction_is_x0_prediction():
    """A network that returns the true v gives back x0."""
    x0, noise = torch.randn(2, 1, 6, 6), torch.randn(2, 1, 6, 6)
    denoiser = pyels.NetworkDenoiser(pyels.ResNet(width=4, depth=1))
    denoiser.network.forward = lambda x, angle, labels: 0.6 * noise - 0.8 * x0
    torch.testing.assert_close(denoiser.denoise(0.6 * x0 + 0.8 * noise, 0.6, 0.8), x0, atol=1e-5, rtol=0)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    network = pyels.ResNet(width=8, depth=2, num_classes=3).eval()
    network.save(tmp_path / "net.safetensors")
    loaded = pyels.ResNet.load(tmp_path / "net.safetensors")
    arguments = torch.randn(2, 1, 9, 9), torch.tensor([0.2, 1.1]), torch.tensor([0, 2])
    assert torch.equal(network(*arguments), loaded(*arguments))
    content = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"net\.safetensors: not a ResNet"):
        pyels.ResNet.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("labels", "message"), [(None, "needs a label"), (torch.tensor([3]), r"labels must lie in 0\.\.2")]
)
def test_bad_labels(labels, message):
    denoiser = pyels.NetworkDenoiser(pyels.ResNet(width=8, depth=2, num_classes=3))
    with pytest.raises(ValueError, match=message):
        denoiser.denoise(torch.zeros(1, 1, 9, 9), 0.6, 0.8, labels=labels)


def test_training_learns_and_repeats(fashion):
    bank = pyels.PatchBank(fashion.images[:64, :, 8:20, 8:20].contiguous(), fashion.labels[:64])

    def run():
        torch.manual_seed(0)
        network = pyels.ResNet(width=16, depth=2, num_classes=10)
        return train(network, bank, steps=300, batch_size=16, progress=False)

    network, losses = run()
    assert sum(losses[-10:]) < 0.65 * sum(losses[:10])  # 0.55 seen
    again, _ = run()
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no labels"):
        train(pyels.ResNet(num_classes=10), pyels.PatchBank(bank.images), steps=1)


def test_calibration_finds_the_size_of_a_machine_in_disguise(fashion):
    """The 'network' is an ELS machine of size 5: calibration must say 5 at every step."""
    bank = fashion[:30]
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = calibrate(pyels.ELS(bank, 5), pyels.ELS(bank), noise, sizes=(3, 5, 7, 9), steps=4, progress=False)
    assert found.patch_sizes == [5, 5, 5, 5]
    for schedule in ("edm", "flow"):
        other = calibrate(
            pyels.ELS(bank, 5), pyels.ELS(bank), noise, sizes=(3, 5), steps=2, schedule=schedule, progress=False
        )
        assert float(other.mse[:, 1].max()) == 0
    assert found.times == [0.25, 0.5, 0.75, 1.0]
    assert found.cosine.shape == found.mse.shape == (4, 4)
    assert float(found.mse[:, 1].max()) == 0
