import itertools
import math

import pytest
import torch
from helpers import make_bank

import pyels
from pyels.denoiser import Denoiser
from pyels.sampling import noise_levels
from pyels.schedules import SCHEDULES, Cosine, Discrete, make_schedule


class Gaussian(Denoiser):
    """The exact denoiser of data from N(0, 0.5^2): a probability flow with a known solution."""

    def denoise(self, x, alpha, sigma, labels=None, patch_size=None):
        return x * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)


def flow_end(x, schedule):
    """Where the ODE leads: x keeps its quantile of N(0, 0.25 alpha^2 + sigma^2)."""
    return x * 0.5 / math.sqrt(0.25 * schedule.alpha(1) ** 2 + schedule.sigma(1) ** 2)


@pytest.mark.parametrize("name", ["cosine", "cosine-offset", "linear", "flow"])
@pytest.mark.parametrize("solver", ["ddim", "euler", "heun"])
def test_solvers_converge_to_the_probability_flow_at_their_order(name, solver):
    x = torch.full((1, 1, 2, 2), 1.5)
    exact = flow_end(x, make_schedule(name))
    errors = [float((pyels.sample(Gaussian(), x, n, name, solver=solver) - exact).abs().max()) for n in (40, 80, 160)]
    order = math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])
    # Where sigma grows like sqrt(t), the last step, from sigma to 0, holds Heun's method below second order.
    second = solver == "heun" and name in ("cosine", "flow")
    assert min(order) > (1.65 if second else 0.65), (errors, order)


def test_euler_is_ddim_without_noise(small):
    noise = torch.randn(2, 1, 9, 8)
    for schedule in SCHEDULES:
        a = pyels.sample(pyels.ELS(small, 3), noise, 7, schedule, solver="ddim")
        b = pyels.sample(pyels.ELS(small, 3), noise, 7, schedule, solver="euler")
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_ddim_is_the_formula(small):
    """Written out, with patch_sizes[i-1] used at t = i/n."""
    machine, sizes, n = pyels.ELS(small), [1, 3, 5, 7], 4
    noise = torch.randn(2, 1, 9, 8)
    x = noise
    for i in range(n, 0, -1):
        alpha, sigma = math.cos(i / n / 1.008 * math.pi / 2), math.sin(i / n / 1.008 * math.pi / 2)
        x0 = machine.denoise(x, alpha, sigma, patch_size=sizes[i - 1])
        eps = (x - alpha * x0) / sigma
        t = (i - 1) / n / 1.008 * math.pi / 2
        x = math.cos(t) * x0 + math.sin(t) * eps
    torch.testing.assert_close(pyels.sample(machine, noise, n, patch_sizes=sizes), x)


def test_one_image_is_drawn_by_every_machine_schedule_and_solver():
    bank = make_bank(1, (3, 8, 8))
    noise = torch.randn(1, 3, 8, 8)
    for schedule in SCHEDULES:
        for solver in ("ddim", "euler", "heun"):
            out = pyels.sample(pyels.IS(bank), noise, 4, schedule, solver=solver)
            torch.testing.assert_close(out, bank.read(slice(None)), atol=1e-4, rtol=0)


def test_ancestral_sampling_needs_its_generator_to_repeat(small):
    noise, machine = torch.randn(1, 1, 9, 8), pyels.LS(small, 3)

    def draw(seed):
        return pyels.sample(machine, noise, 6, eta=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_ancestral_sampling_keeps_the_distribution():
    """eta = 1 from the right marginal ends in N(0, 0.5^2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 200, generator=generator)
    out = pyels.sample(Gaussian(), x, 200, eta=1.0, generator=generator)
    assert abs(float(out.std()) - 0.5) < 0.02  # 0.489 seen: 200 steps are first order


def test_callback_sees_every_step_and_can_stop(small):
    seen = []
    pyels.sample(pyels.LS(small, 3), torch.randn(1, 1, 9, 8), 5, callback=seen.append)
    assert [s.index for s in seen] == [0, 1, 2, 3, 4]
    assert [round(s.level.t, 6) for s in seen] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert torch.equal(seen[-1].x0, seen[-1].to)
    assert all(torch.equal(a.to, b.x) for a, b in itertools.pairwise(seen))

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pyels.sample(pyels.LS(small, 3), torch.randn(1, 1, 9, 8), 5, callback=stop)


def test_samples_of_a_batch_are_those_drawn_alone(small):
    noise, labels = torch.randn(3, 1, 9, 8), torch.tensor([0, 1, 2])
    together = pyels.sample(pyels.ELS(small, 3), noise, 5, labels=labels)
    for i in range(3):
        alone = pyels.sample(pyels.ELS(small, 3), noise[i : i + 1], 5, labels=labels[i : i + 1])
        assert torch.equal(together[i], alone[0])


def test_steps_may_say_a_threshold(small):
    machine, noise, seen = pyels.PCALocality(small), torch.randn(2, 1, 9, 8), []
    drawn = pyels.sample(machine, noise, 2, per_step={"threshold": [0.3, 0.1]}, callback=seen.append)
    assert [step.level.told for step in seen] == [{"threshold": 0.1}, {"threshold": 0.3}]
    for step in seen:
        of_step = pyels.PCALocality(small, **step.level.told)
        assert torch.equal(of_step.denoise(step.x, step.level.alpha, step.level.sigma), step.x0)
    assert torch.equal(seen[-1].to, drawn)
    sizes = pyels.sample(pyels.ELS(small), noise, 2, patch_sizes=[3, 5])
    assert torch.equal(pyels.sample(pyels.ELS(small), noise, 2, per_step={"patch_size": [3, 5]}), sizes)
    for wrong, what in [
        ({"threshold": [0.1]}, r"per_step\['threshold'\] has 1 entries for 2 steps"),
        ({"threshold": 0.1}, r"per_step\['threshold'\] must be a sequence"),
        ({"threshold": [0.1, 2]}, r"threshold must lie in \[0, 1\], got 2"),
        ({"patch_size": [3, 3]}, "patch_size 3 was given, but PCALocality has none"),
        ({"width": [1, 2]}, "PCALocality has no argument 'width'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=what):
            pyels.sample(machine, noise, 2, per_step=wrong)


def test_released_stepping_starts_late_and_reads_the_next_size():
    name = "fashion-mnist-resnet-zeros"
    sizes = pyels.presets.PATCH_SIZES[name]
    arguments = pyels.presets.kamb2025(name)
    levels = noise_levels(arguments["steps"], Cosine(), arguments["patch_sizes"])
    assert [round(level.t * 20) for level in levels] == list(range(19, 0, -1))
    assert [level.patch_size for level in levels] == [sizes[i] for i in range(19, 0, -1)]


def test_settings_of_other_denoisers_are_arguments(small):
    for machine, of_data in pyels.presets.SETTINGS.items():
        for data in of_data:
            getattr(pyels, machine)(small, **pyels.presets.settings(machine, data))
    assert len(pyels.presets.PSPC_SIDES) == len(pyels.presets.PSPC_MASSES) == 18
    with pytest.raises(ValueError, match="published settings are of PCALocality, SmoothedIS, got 'IS'"):
        pyels.presets.settings("IS", "mnist")
    with pytest.raises(ValueError, match="of mnist, cifar10, got 'faces'"):
        pyels.presets.settings("SmoothedIS", "faces")


def test_presets_stretch_to_other_numbers_of_steps():
    sizes = pyels.presets.PATCH_SIZES["cifar10-resnet-zeros"]
    assert pyels.presets.patch_sizes("cifar10-resnet-zeros") == list(sizes)
    assert pyels.presets.patch_sizes("cifar10-resnet-zeros", 10) == list(sizes[1::2])
    assert pyels.presets.patch_sizes("cifar10-resnet-zeros", 40) == [s for s in sizes for _ in range(2)]
    assert all(len(s) == 20 and all(k % 2 for k in s) for s in pyels.presets.PATCH_SIZES.values())


# ---- Schedules -----------------------------------------------------------------------------------------------------


def test_schedules_are_the_published_ones():
    assert make_schedule("cosine").alpha(0.6) ** 2 == pytest.approx(1 - 0.6473775872054521, abs=1e-12)  # released code
    offset = make_schedule("cosine-offset")
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 0.3)]
    assert offset.alpha(0.3) ** 2 == pytest.approx(f[1] / f[0], abs=1e-12)
    linear = make_schedule("linear")
    product = 1.0
    for i in range(250):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert linear.alpha(0.25) ** 2 == pytest.approx(product, rel=1e-9)
    assert make_schedule("edm").sigma(1) == pytest.approx(80)
    assert make_schedule("edm").sigma(0) == pytest.approx(0.002)
    flow = make_schedule("flow")
    assert (flow.alpha(0.3), flow.sigma(0.3)) == (0.7, 0.3)


@pytest.mark.parametrize("name", ["cosine", "cosine-offset", "linear"])
def test_variance_preserving_schedules_preserve_variance(name):
    schedule = make_schedule(name)
    for i in range(101):
        assert schedule.alpha(i / 100) ** 2 + schedule.sigma(i / 100) ** 2 == pytest.approx(1, abs=1e-12)
    assert schedule.alpha(0) == 1


def test_schedule_from_alphas_cumprod_and_own_objects(small):
    values = torch.linspace(0.99, 0.01, 50).numpy()
    schedule = Discrete(values)
    assert schedule.alpha(10 / 50) ** 2 == pytest.approx(values[9], rel=1e-6)
    noise = torch.randn(1, 1, 9, 8)
    assert torch.isfinite(pyels.sample(pyels.LS(small, 3), noise, 4, schedule)).all()

    class Own:
        def alpha(self, t):
            return 1 - t / 2

        def sigma(self, t):
            return t

    assert torch.isfinite(pyels.sample(pyels.LS(small, 3), noise, 4, Own())).all()
