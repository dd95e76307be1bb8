"""What networks of other people are like: each of their conventions gives the same estimate, or is refused in words."""

import pytest
import torch
from helpers import noisy
from torch import nn

import pyels
from pyels.adapters import NetworkDenoiser, NoiseLevel, from_edm
from pyels.schedules import Discrete, make_schedule

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PREDICTIONS = ("eps", "x0", "score", "v", "velocity", "residual")


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_network_may_do_with_its_arguments_what_it_likes(predicts):
    def in_place(x, t, labels):
        t.zero_(), labels.zero_()
        return x.mul_(0.3)

    labels = torch.tensor([1, 2])
    ours, theirs = (
        NetworkDenoiser(f, predicts, num_classes=3).denoise(X, 0.6, 0.8, labels)
        for f in (lambda x, t, labels: 0.3 * x, in_place)
    )
    assert torch.equal(ours, theirs)
    assert labels.tolist() == [1, 2]


def test_a_network_may_answer_from_the_same_memory_at_every_call():
    memory = torch.empty(2, 1, 8, 8)
    network = NetworkDenoiser(lambda x, t, labels: memory.copy_(x), "x0")
    first = network.denoise(X, 0.6, 0.8)
    kept = first.clone()
    network.denoise(-X, 0.6, 0.8)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
@pytest.mark.parametrize("convert", [lambda t: t.long(), lambda t: t.round().long(), lambda t: t.int()])
def test_every_step_arrives_however_it_is_converted(steps, convert):
    schedule, some = (
        Discrete(torch.linspace(0.9999, 1e-4, steps).double().numpy()),
        range(1, steps + 1, 1 + steps // 600),
    )
    x, levels = torch.zeros(len(some), 1, 2, 2), levels_of(schedule, [j / steps for j in some])
    for timesteps in (None, steps):
        for alpha, sigma in (levels, levels.float()):
            seen = []
            network = NetworkDenoiser(lambda x, t: (seen.append(t), x)[1], schedule=schedule, timesteps=timesteps)  # noqa: B023
            network.denoise(x, alpha, sigma)
            assert (seen[0] if timesteps else convert(steps * seen[0] - 1)).tolist() == [j - 1 for j in some]


def levels_of(schedule, times):
    """alpha and sigma (2, T) at times (T,)."""
    return torch.tensor([[f(t) for t in times] for f in (schedule.alpha, schedule.sigma)], dtype=torch.float64)


def test_times_along_schedules_without_steps_are_never_below():
    seen = []
    network = NetworkDenoiser(lambda x, t: (seen.extend(int(1000 * time) for time in t), x)[1], schedule="cosine")
    network.denoise(torch.zeros(999, 1, 2, 2), *levels_of(make_schedule("cosine"), [j / 1000 for j in range(1, 1000)]))
    assert seen == list(range(1, 1000))


def test_integer_steps_are_those_of_the_table():
    table = nn.Embedding(100, 1)
    network = NetworkDenoiser(lambda x, t, labels: x * table(t)[:, :, None, None], "eps", "linear", timesteps=100)
    network.denoise(X, 0.9999, 0.0141)
    network.denoise(X, 0.01, 0.99995)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("pixels", [(0, 1), (-1, 2), (-1, 1)])
def test_networks_of_other_pixel_ranges(predicts, pixels):
    """They know the images in their own units, and their noise too."""
    low, high = pixels
    half = (high - low) / 2
    truth = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    schedule = make_schedule("linear")

    def perfect(x, t):
        a, s = (torch.tensor([f(v) for v in t.tolist()])[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        x0 = half * (truth + 1) + low
        eps = (x - a * x0) / s
        known = {"eps": eps, "x0": x0, "score": -eps / s, "v": a * eps - s * x0}
        return {**known, "velocity": eps - x0, "residual": x - x0}[predicts]

    found = NetworkDenoiser(perfect, predicts, "linear", pixel_range=pixels).denoise(0.6 * truth + 0.8 * X, 0.6, 0.8)
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=0)


def test_time_that_runs_the_other_way():
    class Reversed:
        def alpha(self, t):
            return t

        def sigma(self, t):
            return 1 - t

    seen = []
    function = lambda x, t: (seen.append(float(t[0])), x)[1]  # noqa: E731
    NetworkDenoiser(function, "x0", Reversed()).denoise(X, 0.75, 0.25)
    NetworkDenoiser(lambda x, t: function(x, 1 - t), "x0", "flow").denoise(X, 0.75, 0.25)
    assert seen == pytest.approx([0.75, 0.75], abs=1e-6)
    with pytest.raises(ValueError, match="outside what the network's schedule reaches"):
        NetworkDenoiser(function, "x0", _Part()).denoise(X, 0.01, 0.99)


class _Part:
    def alpha(self, t):
        return 0.5 + t / 2

    def sigma(self, t):
        return 0.5 - t / 2


def test_networks_without_time_and_for_one_noise_level():
    blind = NetworkDenoiser(lambda x: 0.1 * x, "residual", "edm")
    torch.testing.assert_close(blind.denoise(X, 2.0, 1.0), 0.9 * X / 2)
    only = NetworkDenoiser(nn.Identity(), "residual", 25.0, pixel_range=(0, 255))
    sigma = 25 / 127.5
    torch.testing.assert_close(only.denoise(X, 1.0, sigma), torch.full_like(X, -1.0))
    with pytest.raises(ValueError, match=r"for sigma / alpha = 25 alone.*ask for denoise there"):
        only.denoise(X, 1.0, 0.5)
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="the only sigma of a network"):
            NetworkDenoiser(lambda x: x, "x0", wrong)


def test_noise_levels_as_times():
    seen = []
    network = NetworkDenoiser(lambda x, sigma: (seen.append(sigma.tolist()), -x)[1], "score", NoiseLevel())
    network.denoise(X, 0.5, torch.tensor([0.5, 2.0]))
    assert seen[0] == pytest.approx([1.0, 4.0])


def test_learned_variances_are_left_out():
    plain, twice = (
        NetworkDenoiser(f, "eps").denoise(X, 0.6, 0.8)
        for f in (lambda x, t: 0.2 * x, lambda x, t: torch.cat([0.2 * x, 99 + x], 1))
    )
    assert torch.equal(plain, twice)


def test_v_where_the_variance_is_not_preserved_is_said():
    for schedule in ("flow", "edm", NoiseLevel()):
        with pytest.warns(UserWarning, match="for the eps - x0 of flow matching, say predicts='velocity'"):
            NetworkDenoiser(lambda x, t: x, "v", schedule)
    for schedule in ("cosine", "cosine-offset", "linear"):
        NetworkDenoiser(lambda x, t: x, "v", schedule)


def test_functions_take_what_they_take():
    for function in (lambda x: x, lambda x, t: x, lambda x, t, labels=None: x, lambda *given: given[0], nn.Identity()):
        assert torch.equal(
            NetworkDenoiser(function, "x0").denoise(X, 1.0, 1.0),
            NetworkDenoiser(lambda x, t, labels: x, "x0").denoise(X, 1.0, 1.0),
        )
    seen = []
    NetworkDenoiser(lambda x, t, y=None: (seen.append(y), x)[1], "x0", num_classes=3).denoise(
        X, 1.0, 1.0, torch.tensor([0, 2])
    )
    assert seen[0].tolist() == [0, 2]
    with pytest.raises(TypeError, match="takes 2 arguments, but with num_classes or null_label it is given x, t and"):
        NetworkDenoiser(lambda x, t: x, num_classes=3)


def test_the_label_of_no_class():
    seen = []
    network = NetworkDenoiser(lambda x, t, y: (seen.append(y.tolist()), x)[1], num_classes=10, null_label=10)
    network.denoise(X, 0.6, 0.8)
    network.denoise(X, 0.6, 0.8, torch.tensor([3, 10]))
    assert seen == [[10, 10], [3, 10]]
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        network.denoise(X, 0.6, 0.8, torch.tensor([3, 11]))
    NetworkDenoiser(lambda x, t, y: x, null_label=-1).denoise(X, 0.6, 0.8, torch.tensor([0, 500]))


def test_clipping(small):
    network = NetworkDenoiser(lambda x, t: 3 * x, "x0", clip=1.0)
    x0 = network.denoise(X, 0.6, 0.8)
    assert float(x0.abs().max()) == 1
    torch.testing.assert_close(network.eps(X, 0.6, 0.8), (X - 0.6 * x0) / 0.8)
    assert float(pyels.sample(network, X, 4).abs().max()) <= 1
    query = network.query(X, 0.6, 0.8)
    assert float(network.estimate(query).abs().max()) > 1  # where gradients and guidance begin
    machine = pyels.IS(small)
    machine.clip = 0.5
    assert float(machine.denoise(noisy(small, 0.6, 0.8), 0.6, 0.8).abs().max()) <= 0.5
    for clip in (0, -1, "1", float("nan")):
        with pytest.raises((TypeError, ValueError), match=r"clip must be (positive|a number)"):
            NetworkDenoiser(lambda x: x, clip=clip)


@pytest.mark.parametrize("pixels", [(1, 0), (0, float("inf")), 3, (0, 1, 2)])
def test_bad_pixel_ranges(pixels):
    with pytest.raises((TypeError, ValueError), match="pixel_range must be two"):
        NetworkDenoiser(lambda x: x, pixel_range=pixels)


def test_devices_are_checked_before_they_are_used():
    if not torch.cuda.is_available():
        for make in (
            lambda: NetworkDenoiser(lambda x: x, device="cuda"),
            lambda: NetworkDenoiser(nn.Conv2d(1, 1, 1)).to("cuda"),
        ):
            with pytest.raises(ValueError, match=r"device must be cpu or cuda .*got 'cuda'; torch (is built|sees)"):
                make()
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        NetworkDenoiser(lambda x: x, device="gpu")

    def asks_for_cuda(x):
        raise AssertionError("Torch not compiled with CUDA enabled")

    with pytest.raises(ValueError, match="torch is built without CUDA here: leave it on the CPU"):
        NetworkDenoiser(asks_for_cuda).denoise(X, 0.6, 0.8)


@pytest.mark.gpu
def test_queries_stay_where_the_network_is(monkeypatch):
    network = NetworkDenoiser(nn.Conv2d(1, 1, 3, padding=1).cuda(), "velocity", "flow", null_label=3)
    expected = network.denoise(X, 0.6, 0.8)
    assert expected.device.type == "cpu"
    monkeypatch.setattr(torch.Tensor, "cpu", None)  # nothing of the images is brought there
    found = network.denoise(X.cuda(), 0.6, 0.8)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.to("cpu"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("alphas", "message"), [([0.9, 0.95], "falling"), ([], "falling"), ([0.9, 0.0, 0.0], "falling"), ([1.1], "falling")]
)
def test_schedules_that_are_none(alphas, message):
    with pytest.raises(ValueError, match=message):
        Discrete(alphas)


def test_zero_terminal_snr():
    schedule = Discrete([0.9, 0.5, 0.1, 0.0])
    assert (schedule.alpha(1.0), schedule.sigma(1.0)) == (0.0, 1.0)
    assert schedule.alpha(0.75) == pytest.approx(0.1**0.5)
    for t in (0.8, 0.9, 0.999):
        assert 0 < schedule.alpha(t) < 0.1**0.5
        assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1)
    found = NetworkDenoiser(lambda x, t: -x, "v", schedule).denoise(X, 0.0, 1.0)
    torch.testing.assert_close(found, X)


def test_edm_denoisers_keep_their_conventions():
    network = from_edm(lambda x, sigma: x / (1 + sigma[:, None, None, None]), pixel_range=(0, 1), clip=1.0)
    assert network.pixel_range == (0, 1)
    assert float(network.denoise(9 * X, 1.0, 0.1).abs().max()) == 1
