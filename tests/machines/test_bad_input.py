"""What the contract says of bad input, one case at a time: the argument, what was given, what is allowed."""

import numpy as np
import pytest
import torch
from helpers import make_bank

import pyels

X = torch.zeros(2, 1, 9, 8)


def spoilt(value):
    x = X.clone()
    x[1, 0, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.denoise(spoilt(torch.nan), 0.6, 0.8), ValueError, "x holds NaN or infinite"),
        (lambda m: m.denoise(spoilt(torch.inf), 0.6, 0.8), ValueError, "x holds NaN or infinite"),
        (lambda m: m.denoise(spoilt(1e9), 0.6, 0.8), ValueError, "x reaches 1e[+]09; allowed is up to 1e[+]06"),
        (lambda m: m.denoise(X.double(), 0.6, 0.8), TypeError, "x must be float32, got torch.float64"),
        (lambda m: m.denoise(X.numpy(), 0.6, 0.8), TypeError, "x must be a torch.Tensor, got ndarray"),
        (lambda m: m.denoise(X[0], 0.6, 0.8), ValueError, r"x must have shape \(B, C, H, W\), got \(1, 9, 8\)"),
        (lambda m: m.denoise(X[..., :-1], 0.6, 0.8), ValueError, r"\(1, 9, 7\), but the bank's are \(1, 9, 8\)"),
        (lambda m: m.denoise(X.expand(2, 3, 9, 8), 0.6, 0.8), ValueError, r"\(3, 9, 8\), but the bank's are"),
        (lambda m: m.denoise(X, 0.6, 0.0), ValueError, "sigma must be positive, got 0"),
        (lambda m: m.denoise(X, 0.6, -1.0), ValueError, "sigma must be positive, got -1"),
        (lambda m: m.denoise(X, 0.6, float("nan")), ValueError, "sigma must be finite"),
        (lambda m: m.denoise(X, -0.1, 0.8), ValueError, "alpha must not be negative, got -0.1"),
        (lambda m: m.denoise(X, float("inf"), 0.8), ValueError, "alpha must be finite"),
        (lambda m: m.denoise(X, torch.ones(3), 0.8), ValueError, r"alpha must be a number or have shape \(2,\)"),
        (lambda m: m.denoise(X, "0.6", 0.8), TypeError, "alpha must be a number or a tensor"),
        (lambda m: m.denoise(X, 1e20, 0.8), ValueError, "alpha must be at most 1e[+]06, got 1e[+]20"),
        (lambda m: m.denoise(X, 0.6, 1e-12), ValueError, "sigma must be at least 1e-09, got 1e-12"),
        (lambda m: m.denoise(X.to("meta"), 0.6, 0.8), ValueError, "x must be in CPU memory, got device meta"),
        (lambda m: m.denoise(X, 0.6, 0.8, labels=["a", "b"]), TypeError, "labels must be integers"),
        (lambda m: m.denoise(X, None, 0.8), TypeError, "alpha must be a number or a tensor"),
        (lambda m: m.denoise(X, 0.6, 0.8, labels=torch.tensor([0, 9])), ValueError, "label 9: no images of this class"),
        (lambda m: m.denoise(X, 0.6, 0.8, labels=torch.tensor([0])), ValueError, r"labels must have shape \(2,\)"),
        (lambda m: m.denoise(X, 0.6, 0.8, labels=torch.tensor([0.0, 1.0])), TypeError, "labels must be integers"),
        (lambda m: m.denoise(X, 0.6, 0.8, patch_size=4), ValueError, "patch_size must be odd and positive, got 4"),
        (lambda m: m.denoise(X, 0.6, 0.8, patch_size=-3), ValueError, "patch_size must be odd and positive, got -3"),
        (lambda m: m.denoise(X, 0.6, 0.8, patch_size=0), ValueError, "patch_size must be odd and positive, got 0"),
        (lambda m: m.denoise(X, 0.6, 0.8, patch_size=3.0), TypeError, "patch_size must be an int, got float"),
    ],
)
@pytest.mark.parametrize("method", ["denoise", "posterior", "eps", "score"])
def test_calls(small, call, error, message, method):
    machine = pyels.ELS(small, 3)

    class Redirect:
        denoise = getattr(machine, method)

    with pytest.raises(error, match=message):
        call(Redirect)


@pytest.mark.parametrize("boundary", ["circular", "interior"])
def test_wrapping_boundaries_refuse_windows_larger_than_the_image(small, boundary):
    with pytest.raises(ValueError, match="patch_size 9 is larger than the 9x8 image"):
        pyels.ELS(small, 9, boundary)
    with pytest.raises(ValueError, match="patch_size 9 is larger"):
        pyels.ELS(small, 3, boundary).denoise(X, 0.6, 0.8, patch_size=9)
    pyels.ELS(small, 9, "zeros").denoise(X, 0.6, 0.8)
    pyels.LS(small, 101).denoise(X, 0.6, 0.8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda b: pyels.ELS(b, 3, boundary="reflect"),
            ValueError,
            "boundary must be one of zeros, circular, interior",
        ),
        (lambda b: pyels.ELS(b, 3, engine="fast"), ValueError, "engine must be one of auto, reference, cpu"),
        (lambda b: pyels.ELS(b, 3, engine="cuda"), ImportError, "engine 'cuda' is not available"),
        (lambda b: pyels.ELS(b, 3, threads=0), ValueError, "threads must be between 1 and 4096, got 0"),
        (lambda b: pyels.ELS(b, 3, threads=1.5), TypeError, "threads must be an int"),
        (lambda b: pyels.ELS(b.images, 3), TypeError, "bank must be a pyels.PatchBank"),
        (lambda b: pyels.ELS(b).denoise(X, 0.6, 0.8), ValueError, "patch_size is missing"),
        (
            lambda b: pyels.IS(b).denoise(X, 0.6, 0.8, patch_size=3),
            ValueError,
            "patch_size 3 was given, but IS has none",
        ),
    ],
)
def test_machines(small, make, error, message):
    with pytest.raises(error, match=message):
        make(small)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (np.zeros((0, 1, 4, 4), np.uint8), None, ValueError, "the bank is empty"),
        (np.zeros((2, 0, 4, 4), np.uint8), None, ValueError, "the bank is empty"),
        (np.zeros((2, 4, 4), np.uint8), None, ValueError, r"images must have shape \(N, C, H, W\), got \(2, 4, 4\)"),
        (np.zeros((2, 1, 4, 4)), None, TypeError, "images must be uint8 .* got torch.float64"),
        (np.zeros((2, 1, 4, 4), np.int64), None, TypeError, "images must be uint8"),
        (np.full((2, 1, 4, 4), np.nan, np.float32), None, ValueError, "NaN or infinite pixels, first in image 0"),
        (np.full((2, 1, 4, 4), 200, np.float32), None, ValueError, r"must lie in \[-1, 1\], but reach 200"),
        ("images", None, TypeError, "images must be a torch tensor or a numpy array, got str"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0], ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0.5, 1.0], TypeError, "labels must be integers"),
    ],
)
def test_banks(images, labels, error, message):
    with pytest.raises(error, match=message):
        pyels.PatchBank(images, labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
        (dict(steps="ten"), TypeError, "steps must be a number of steps"),
        (dict(steps=[0.5, 1.5]), ValueError, r"times must lie in \(0, 1\]"),
        (dict(steps=3, patch_sizes=[3, 3]), ValueError, "patch_sizes has 2 entries for 3 steps"),
        (dict(steps=2, patch_sizes="35"), TypeError, "patch_sizes must be a sequence"),
        (dict(steps=2, patch_sizes=[3.9, 5]), TypeError, "patch_size must be an int, got float"),
        (dict(steps=2, patch_sizes=[3, 4]), ValueError, "patch_size must be odd and positive, got 4"),
        (dict(schedule="sine"), ValueError, "schedule must be one of cosine"),
        (dict(schedule=3), TypeError, "schedule must be a name or an object"),
        (dict(solver="rk4"), ValueError, "solver must be one of ddim, euler, heun"),
        (dict(eta=2.0), ValueError, r"eta must lie in \[0, 1\]"),
        (dict(eta=0.5, solver="heun"), ValueError, "eta is an option of solver 'ddim'"),
        (dict(labels=torch.tensor([5, 5])), ValueError, "label 5: no images"),
    ],
)
def test_sampling(small, options, error, message):
    with pytest.raises(error, match=message):
        pyels.sample(pyels.LS(small, 3), X, **options)


def test_sampling_needs_a_denoiser_and_finite_noise(small):
    with pytest.raises(TypeError, match="denoiser must be a machine"):
        pyels.sample(lambda x: x, X)
    with pytest.raises(ValueError, match="NaN"):
        pyels.sample(pyels.LS(small, 3), spoilt(torch.nan))


def test_empty_batch_gives_an_empty_answer(small):
    assert pyels.ELS(small, 3).denoise(X[:0], 0.6, 0.8).shape == (0, 1, 9, 8)


def test_input_is_never_changed(small):
    x = torch.randn(2, 1, 9, 8)
    before, images = x.clone(), small.images.clone()
    pyels.sample(pyels.ELS(small, 3), x, 3)
    pyels.ELS(small, 3).posterior(x, 0.6, 0.8)
    assert torch.equal(x, before)
    assert torch.equal(small.images, images)


def test_non_contiguous_input_is_as_good(small):
    x = torch.randn(2, 1, 8, 9).transpose(2, 3)
    assert not x.is_contiguous()
    assert torch.equal(pyels.ELS(small, 3).denoise(x, 0.6, 0.8), pyels.ELS(small, 3).denoise(x.contiguous(), 0.6, 0.8))
    bank = pyels.PatchBank(make_bank(12, (1, 9, 8)).images.transpose(2, 3).contiguous().transpose(2, 3))
    assert bank.images.is_contiguous()
