"""Networks of every kind denoise alike when they know the same."""

import math

import pytest
import torch
from helpers import make_bank, noisy

import pyels
from pyels.adapters import NetworkDenoiser, from_edm, from_pyels
from pyels.networks.adapters import NotDifferentiable

LEVELS = [(0.99, 0.1), (0.6, 0.8), (0.05, 0.9987492177719089), (3.0, 4.0)]


def perfect(bank, predicts, schedule):
    """A network that predicts as the IS machine would, along a schedule."""
    machine, schedule = pyels.IS(bank), pyels.make_schedule(schedule)

    def function(x, t, labels):
        alpha, sigma = (torch.tensor([f(v) for v in t.tolist()]) for f in (schedule.alpha, schedule.sigma))
        x0 = machine.denoise(x, alpha, sigma, labels)
        a, s = alpha.float()[:, None, None, None], sigma.float()[:, None, None, None]
        eps = (x - a * x0) / s
        answers = {"v": a * eps - s * x0, "velocity": eps - x0, "residual": x - x0}
        return {"x0": x0, "eps": eps, "score": -eps / s, **answers}[predicts]

    return NetworkDenoiser(function, predicts, schedule)


@pytest.mark.filterwarnings("ignore:predicts='v'")
@pytest.mark.parametrize("predicts", ["eps", "x0", "score", "v", "velocity", "residual"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "edm", "flow"])
def test_every_prediction_along_every_schedule_is_the_same_estimate(small, predicts, schedule):
    machine, network = pyels.IS(small), perfect(small, predicts, schedule)
    for alpha, sigma in LEVELS:
        x = noisy(small, alpha, sigma, batch=2)
        # Where alpha is small, x0 from eps has the rounding of x over alpha. Worst seen: 0.08 of this.
        tolerance = 2e-4 + 2e-5 * sigma / alpha
        torch.testing.assert_close(
            network.denoise(x, alpha, sigma), machine.denoise(x, alpha, sigma), atol=tolerance, rtol=0
        )


def test_a_batch_of_levels_is_each_level_alone(small):
    network = perfect(small, "v", "cosine")
    x = noisy(small, 0.6, 0.8, batch=3)
    alpha, sigma = torch.tensor([0.6, 0.8, 0.28]), torch.tensor([0.8, 0.6, 0.96])
    together = network.denoise(x, alpha, sigma)
    for i in range(3):
        alone = network.denoise(x[i : i + 1], float(alpha[i]), float(sigma[i]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_times_are_those_of_the_schedule():
    seen = []
    schedule = pyels.make_schedule("cosine")
    network = NetworkDenoiser(lambda x, t, labels: (seen.append(float(t[0])), x)[1])
    for i in range(1, 21):
        network.denoise(torch.zeros(1, 1, 4, 4), schedule.alpha(i / 20), schedule.sigma(i / 20))
    assert seen == pytest.approx([i / 20 for i in range(1, 21)], abs=1e-7)


def test_pyels_networks_do_not_depend_on_the_scale_of_alpha_and_sigma():
    torch.manual_seed(0)
    denoiser = from_pyels(pyels.ResNet(width=8, depth=2))
    x = torch.randn(3, 1, 9, 9)
    torch.testing.assert_close(denoiser.denoise(x, 0.6, 0.8), denoiser.denoise(5 * x, 3.0, 4.0), atol=1e-5, rtol=1e-5)


def test_estimates_are_differentiable_where_the_query_asks_for_it():
    torch.manual_seed(0)
    denoiser = from_pyels(pyels.ResNet(width=8, depth=2))
    x = torch.randn(2, 1, 9, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="a derivative was asked for"):
        denoiser.denoise(x, 0.6, 0.8).sum().backward()
    query = denoiser.query(x.detach(), torch.tensor([0.6, 0.3]), 0.8)
    assert not denoiser.estimate(query).requires_grad
    query.x.requires_grad_(True)
    denoiser.estimate(query)[0, 0, 4, 4].backward()
    assert float(query.x.grad[0].abs().sum()) > 0
    assert float(query.x.grad[1].abs().sum()) == 0
    with pytest.raises(NotDifferentiable, match="no gradient with respect to its input"):
        NetworkDenoiser(lambda x, t, labels: x.detach()).estimate(query)


def test_edm_denoisers_get_sigma_at_alpha_1(small):
    machine = pyels.ELS(small, 3)
    network = from_edm(lambda x, sigma, labels: machine.denoise(x, 1.0, sigma.double(), labels))
    for alpha, sigma in LEVELS:
        x = noisy(small, alpha, sigma, batch=2)
        torch.testing.assert_close(
            network.denoise(x, alpha, sigma), machine.denoise(x, alpha, sigma), atol=1e-4, rtol=0
        )


def test_labels_reach_class_conditional_networks_only(small):
    seen = []
    x = torch.zeros(2, 1, 9, 8)
    for classes in (None, 3):
        network = NetworkDenoiser(lambda x, t, labels: (seen.append(labels), x)[1], num_classes=classes)
        network.denoise(x, 0.6, 0.8, labels=torch.tensor([2, 0]))
    assert seen[0] is None
    assert seen[1].tolist() == [2, 0]


def fails(x, t, labels):
    raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, r"failed on images of shape \(1, 1, 4, 4\): RuntimeError: shapes do not fit"),
        (lambda x, t, labels: torch.cat([x, x, x], dim=1), r"returned shape \(1, 3, 4, 4\) for images of shape"),
        (lambda x, t, labels: None, "returned NoneType"),
        (lambda x, t, labels: x * math.nan, "returned NaN or infinite values at t"),
    ],
)
def test_bad_outputs_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        NetworkDenoiser(function).denoise(torch.zeros(1, 1, 4, 4), 0.6, 0.8)


def test_bad_arguments():
    identity = NetworkDenoiser(lambda x, t, labels: x, channels=3, schedule="linear")
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sigma / alpha = 0\.001 is outside what the network's schedule reaches"):
        perfect(make_bank(3, (3, 4, 4)), "eps", "edm").denoise(x, 1.0, 0.001)
    with pytest.raises(ValueError, match="has 1 channels, but the network takes 3"):
        identity.denoise(x[:, :1], 0.6, 0.8)
    with pytest.raises(ValueError, match="patch_size 3 was given"):
        identity.denoise(x, 0.6, 0.8, patch_size=3)
    with pytest.raises(ValueError, match="nothing of x0 at alpha = 0"):
        NetworkDenoiser(lambda x, t, labels: x, schedule="flow").denoise(x, 0.0, 1.0)
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, score, v, velocity, residual"):
        NetworkDenoiser(lambda x, t, labels: x, predicts="noise")
    with pytest.raises(TypeError, match="must be callable"):
        NetworkDenoiser("net.pt")
    with pytest.raises(TypeError, match="from_pyels"):
        NetworkDenoiser(pyels.ResNet(width=4, depth=1))
