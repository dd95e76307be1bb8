"""Which torch modules a network is made of, wherever they are, and that they are fit to be asked."""

import functools

import pytest
import torch
from torch import nn

from pyels.adapters import NetworkDenoiser
from pyels.networks.identity import checksum

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision(dtype):
    torch.manual_seed(0)
    module = nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    expected = module.double()(X.double()).float().detach() if dtype == torch.float64 else None
    module = module.to(dtype)
    found = NetworkDenoiser(module, "x0").denoise(X, 0.6, 0.8)
    if expected is not None:
        assert found.shape == expected.shape
    assert module.weight.dtype == dtype  # nobody's weights are changed
    with pytest.raises(ValueError, match=r"given float32 images: convert it with network\.float\(\)"):
        NetworkDenoiser(lambda x, t, labels: module(x), "x0").denoise(X, 0.6, 0.8)


class Holder:
    def __init__(self, net):
        self.net = net

    def __call__(self, x, t, labels):
        return self.net(x)

    def method(self, x, t, labels):
        return self.net(x)


HOLDERS = {
    "closure": lambda net: lambda x, t, labels: net(x),
    "default": lambda net: lambda x, t, net=net: net(x),
    "partial": lambda net: functools.partial(lambda net, x, t, labels: net(x), net),
    "object": Holder,
    "method": lambda net: Holder(net).method,
    "nested": lambda net: (lambda inner: lambda x, t, labels: inner(x))(lambda x: net(x)),
    "attribute": lambda net: (lambda held: lambda x, t, labels: held.net(x))(Holder(net)),
    "list": lambda net: (lambda nets: lambda x, t, labels: nets[0](x))([net]),
}


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False)])
def test_layers_in_training_mode_are_refused_wherever_they_are(how, layer):
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), layer).train()
    network = NetworkDenoiser(HOLDERS[how](net), "x0")
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} in training mode.*call network\.eval\(\)"):
        network.denoise(X, 0.6, 0.8)
    net.eval()
    if getattr(layer, "track_running_stats", True):
        assert torch.equal(network.denoise(X, 0.6, 0.8), network.denoise(X, 0.6, 0.8))


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5))
        self.averaged = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)).eval()

    def step(self, x):
        return self.averaged(x)


def test_layers_that_are_not_used_may_be_in_training():
    trainer = Trainer()
    for function in (trainer.step, lambda x: trainer.averaged(x)):
        NetworkDenoiser(function, "x0").denoise(X, 0.6, 0.8)
    with pytest.raises(ValueError, match="Dropout in training mode"):
        NetworkDenoiser(lambda x: trainer.net(x), "x0").denoise(X, 0.6, 0.8)


def test_modules_are_put_into_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5))
    network = NetworkDenoiser(net, "x0")
    assert torch.equal(network.denoise(X, 0.6, 0.8), network.denoise(X, 0.6, 0.8))


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize(
    "wrap",
    [
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
        functools.partial,
        torch.jit.script,
        lambda net: torch.jit.trace(net, (X, torch.zeros(2))),
    ],
    ids=["average", "parallel", "partial", "script", "trace"],
)
def test_wrapped_networks_are_given_what_they_take(wrap):
    expected = NetworkDenoiser(OfTwo(), "x0", "flow").denoise(X, 0.4, 0.6)
    torch.testing.assert_close(NetworkDenoiser(wrap(OfTwo()), "x0", "flow").denoise(X, 0.4, 0.6), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_have_their_weights_in_their_checksum():
    networks = [torch.jit.script(OfTwo()) for _ in range(2)]
    with torch.no_grad():
        networks[1].scale.mul_(2)
    first, second = (checksum(NetworkDenoiser(network, "x0", "flow")) for network in networks)
    assert first != second
