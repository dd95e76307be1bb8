"""How a denoiser may be called: levels and labels in any form, and derivatives."""

from decimal import Decimal

import numpy as np
import pytest
import torch

import pyels

X = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
METHODS = ("denoise", "eps", "score", "posterior")


def of(machine, method):
    """The method, or of a posterior one of its fields."""
    if method == "posterior":
        return lambda *arguments, **named: machine.posterior(*arguments, **named).entropy
    return getattr(machine, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda two: np.array(two, np.float32).astype(">f8"),
        lambda two: np.array(two)[::-1][::-1],
        lambda two: torch.tensor(two, dtype=torch.float64).requires_grad_(),
        lambda two: [np.float64(one) for one in two],
        lambda two: [torch.tensor(one, dtype=torch.float64) for one in two],
    ],
)
def test_levels_are_taken_in_any_form(small, method, form):
    machine, two = pyels.ELS(small, 3), [0.75, 0.5]
    expected = of(machine, method)(X, torch.tensor(two), torch.tensor(two))
    assert torch.equal(of(machine, method)(X, form(two), form(two)), expected)
    one = of(machine, method)(X, 0.75, 0.5)
    for number in (np.float32, np.float64, torch.tensor, np.array, lambda v: torch.tensor(v, dtype=torch.bfloat16)):
        assert torch.equal(of(machine, method)(X, number(0.75), number(0.5)), one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "level",
    [
        True,
        np.array([True, False]),
        torch.tensor([True, False]),
        1j,
        torch.tensor([1j, 1j]),
        "0.5",
        ["a", "b"],
        [[0.5], [1, 2]],
        Decimal("0.5"),
    ],
)
def test_what_is_no_number_is_no_level(small, method, level):
    with pytest.raises(TypeError, match="alpha must be a number or a tensor, list or array"):
        of(pyels.ELS(small, 3), method)(X, level, 0.5)
    with pytest.raises(TypeError, match="eta must be a number"):
        pyels.sample(pyels.ELS(small, 3), X, 2, eta=level)
    with pytest.raises(TypeError, match="tolerance must be a number"):
        pyels.ELS(small, 3, tolerance=level)


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_taken_in_any_form(small, method):
    call, classes = of(pyels.ELS(small, 3), method), [1, 2]
    expected = call(X, 0.5, 0.5, labels=torch.tensor(classes))
    arrays = [np.array(classes, dtype) for dtype in (np.uint8, np.uint16, ">i4", np.int64)]
    tensors = [torch.tensor(classes, dtype=dtype) for dtype in (torch.uint8, torch.int32)]
    for labels in (classes, tuple(classes), range(1, 3), *arrays, *tensors, list(arrays[0])):
        assert torch.equal(call(X, 0.5, 0.5, labels=labels), expected)


def test_read_only_levels_are_taken_without_a_warning(small):
    level = np.array([0.5, 0.75])
    level.flags.writeable = False
    pyels.LS(small, 3).eps(X, level, level)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor, int])
def test_a_tolerance_is_taken_in_any_form(small, number):
    assert pyels.ELS(small, 3, engine=pyels.engines.Sampled(tolerance=number(1))).engine.tolerance == 1.0
    pyels.ELS(small, 3).denoise(X, 0.5, 0.5, tolerance=number(1))


def test_times_and_sizes_are_taken_in_any_form(small):
    machine, times, sizes = pyels.ELS(small), [0.25, 0.5, 1.0], [1, 3, 5]
    expected = pyels.sample(machine, X, times, patch_sizes=sizes, labels=[1, 2])
    for form in (tuple, np.array, torch.tensor):
        drawn = pyels.sample(machine, X, form(times), patch_sizes=form(sizes), labels=form([1, 2]))
        assert torch.equal(drawn, expected)
    expected = pyels.sample(machine, X, 3, patch_sizes=sizes)
    for form in (np.int64, np.uint8, torch.tensor, np.array):
        assert torch.equal(pyels.sample(machine, X, form(3), patch_sizes=sizes), expected)
    for steps in (2.0, np.float32(2), torch.tensor(2.0), True, [], np.zeros((1, 2)), "ab"):
        with pytest.raises(TypeError, match="steps must be a number of steps or a sequence of times"):
            pyels.sample(machine, X, steps, patch_sizes=sizes)
    for times in ([0.5, float("nan"), 0.75], np.array([0.0, 0.5, 1.0]), torch.tensor([0.5, 1.0, 1.5])):
        with pytest.raises(ValueError, match="times must lie in"):
            pyels.sample(machine, X, times, patch_sizes=sizes)


def derivatives(f, x):
    """Everything by which torch finds a derivative of f at x."""
    ones = torch.ones_like(x)
    yield lambda: f(x.clone().requires_grad_()).sum().backward()
    yield lambda: torch.autograd.functional.jacobian(f, x)
    yield lambda: torch.func.jacrev(f)(x)
    yield lambda: torch.func.jacfwd(f)(x)
    yield lambda: torch.func.grad(lambda v: f(v).sum())(x)
    yield lambda: torch.func.hessian(lambda v: f(v).sum())(x)
    yield lambda: torch.func.jvp(f, (x,), (ones,))
    yield lambda: torch.func.vjp(f, x)[1](f(x))
    yield lambda: forward_mode(f, x, ones)


def forward_mode(f, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, tangent))


def differentiable(small):
    machine = pyels.ELS(small, 3, engine="reference")
    for name in ("denoise", "eps", "score"):
        yield lambda v, name=name: getattr(machine, name)(v, 0.6, 0.8)
    yield lambda v: pyels.sample(machine, v, 2)
    yield lambda v: machine.denoise_over_sizes(v, 0.6, 0.8, [1, 3])


def underived(small):
    machine = pyels.ELS(small, 3)
    network = pyels.NetworkDenoiser(lambda x, t, labels: torch.sin(x))
    for name in ("denoise", "eps", "score"):
        yield lambda v, name=name: getattr(network, name)(v, 0.6, 0.8)
    yield lambda v: pyels.sample(network, v, 2)
    for field in ("mean", "log_evidence", "entropy", "source_weight", "variance"):
        yield lambda v, field=field: getattr(machine.posterior(v, 0.6, 0.8), field)
    yield lambda v: machine.posterior_over_sizes(v, 0.6, 0.8, [1, 3])[1].entropy
    yield lambda v: machine.estimate(machine.query(v, 0.6, 0.8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # which torch itself uses
def test_what_has_no_derivative_refuses_it(small):
    for f in underived(small):
        for derivative in derivatives(f, X):
            with pytest.raises(RuntimeError, match=r"a derivative was asked for|not computed"):
                derivative()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_machines_are_differentiated_once_and_backward(small):
    generator = torch.Generator().manual_seed(0)
    x, along = (torch.randn(X.shape, generator=generator) for _ in range(2))
    for f in differentiable(small):
        cotangent = torch.randn(f(x).shape, generator=generator)
        leaf = x.clone().requires_grad_()
        (f(leaf) * cotangent).sum().backward()
        step = 1e-3  # of a float32 x, through float64; samples are float32
        slope = float(((f(x + step * along) - f(x - step * along)).double() * cotangent).sum()) / (2 * step)
        assert abs(float((leaf.grad * along).sum()) - slope) < 1e-3 * (1 + abs(slope)) + 1e-2 * leaf.grad.abs().max()
        torch.testing.assert_close(torch.func.vjp(f, x)[1](cotangent.to(f(x).dtype))[0], leaf.grad)
    f, x = next(differentiable(small)), X[:1]
    jacobian = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.func.jacrev(f)(x), jacobian)
    for derivative in (
        lambda: torch.func.jacfwd(f)(x),
        lambda: torch.func.hessian(lambda v: f(v).sum())(x),
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: forward_mode(f, x, x),
        lambda: torch.autograd.functional.hessian(lambda v: f(v).sum(), x),
    ):
        with pytest.raises(RuntimeError, match="not computed"):
            derivative()


def test_derivatives_in_the_levels_are_refused(small):
    level = torch.tensor(0.6, requires_grad=True)
    for method in METHODS:
        for levels in ((level, 0.8), (0.6, level)):
            with pytest.raises(RuntimeError, match="a derivative was asked for"):
                of(pyels.ELS(small, 3), method)(X, *levels).sum().backward()


def test_vmap_is_refused_in_words(small):
    for f in [*differentiable(small), *underived(small)][:-1]:
        with pytest.raises(RuntimeError, match="give it the whole batch"):
            torch.vmap(lambda v, f=f: f(v[None]))(X)


def test_results_are_the_same_whether_x_could_have_a_derivative_or_not(small):
    x = torch.nn.Parameter(X)
    for f in [*differentiable(small), *underived(small)][:-1]:
        expected = f(X)
        assert not expected.requires_grad
        assert torch.equal(f(x.detach()), expected)
        assert torch.equal(f(x).detach(), expected)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert torch.equal(f(x), expected)
                assert not f(x).requires_grad


def test_a_denoiser_or_a_callback_that_works_in_place_leaves_the_sampler_its_image():
    class InPlace(pyels.Denoiser):
        def estimate(self, query):
            return query.x.mul_(0.5)

    class Careful(pyels.Denoiser):
        def estimate(self, query):
            return query.x * 0.5

    def spoil(step):
        step.to.zero_()

    expected = pyels.sample(Careful(), X, 3, "flow")
    assert torch.equal(pyels.sample(InPlace(), X, 3, "flow"), expected)
    assert torch.equal(pyels.sample(Careful(), X, 3, "flow", callback=spoil), expected)


def test_an_estimate_of_ones_own_may_work_in_place_and_is_checked():
    class InPlace(pyels.Denoiser):
        def estimate(self, query):
            return query.x.mul_(0.5)

    class OneForAll(pyels.Denoiser):
        def estimate(self, query):
            return query.x[:1]

    x = X.clone()
    torch.testing.assert_close(InPlace().denoise(x, 0.6, 0.8), 0.5 * X)
    torch.testing.assert_close(x, X)
    with pytest.raises(ValueError, match=r"estimate of OneForAll gave shape \(1, .*, but the images are \(2, "):
        OneForAll().denoise(X, 0.6, 0.8)
    with pytest.raises(ValueError, match="a InPlace cannot be moved there"):
        InPlace().to("cuda")
