"""Windows that follow the data or a network, against the formulas in a few lines of float64."""

import pickle

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

import pyels

LEVELS = [(0.99, 0.05), (0.8, 0.6), (0.1, 0.995)]
SHAPES = [(1, 6, 7), (3, 5, 4)]
ENGINES = [("reference", 1e-9), ("cpu", 1e-4)]


def values_of(bank):
    images = bank.images.numpy()
    return (images / 127.5 - 1 if images.dtype == np.uint8 else images.astype(np.float64)).reshape(len(bank), -1)


def masks_of(bank, alpha, sigma, threshold, by="matrix"):
    """M[n, m]."""
    s = np.cov(values_of(bank).T)
    w = alpha**2 * s @ np.linalg.inv(alpha**2 * s + sigma**2 * np.eye(len(s)))
    w[np.diag_indices(len(w))] = np.where(np.abs(w.diagonal()) < 1e-6, 1, w.diagonal())
    r = np.abs(w / (w.diagonal()[:, None] if by == "matrix" else w.diagonal()[None, :]))
    return r >= threshold * r.max()


def pca_mean(bank, x, alpha, sigma, masks, temperature=1.0, images=None):
    phi, x = values_of(bank)[slice(None) if images is None else images], x.double().numpy().ravel()
    log_w = -((x - alpha * phi) ** 2) @ masks / (2 * sigma**2 * temperature)
    w = np.exp(log_w - log_w.max(0))
    return ((w / w.sum(0)) * phi).sum(0)


@pytest.mark.parametrize(("engine", "bound"), ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["matrix", "output"])
def test_pca_is_the_formula(shape, by, engine, bound):
    for n in (25, 60):  # fewer images than values, and more
        bank = make_bank(n, shape, dtype=torch.float32 if n == 60 else torch.uint8)
        machine = pyels.PCALocality(bank, 0.1, temperature=1.5, by=by, engine=engine)
        for alpha, sigma in LEVELS:
            masks = masks_of(bank, alpha, sigma, 0.1, by)
            windows = machine.windows(alpha, sigma).reshape(masks.shape)
            assert (windows.T.numpy() == masks).all()
            x = noisy(bank, alpha, sigma)
            ours = machine.denoise(x, alpha, sigma)[0].double().numpy().ravel()
            assert np.abs(ours - pca_mean(bank, x, alpha, sigma, masks, 1.5)).max() < bound


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_pca_of_several_levels_classes_and_a_streamed_bank(engine, tmp_path):
    bank = make_bank(40, (3, 5, 4), labels=torch.arange(40) % 3)
    machine = pyels.PCALocality(bank, 0.05, engine=engine)
    alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in zip(*LEVELS, strict=True))
    x, labels = noisy(bank, alpha, sigma, 3), torch.tensor([2, 0, 1])
    together = machine.denoise(x, alpha, sigma, labels)
    for b, (a, s) in enumerate(LEVELS):
        masks, images = masks_of(bank, a, s, 0.05), np.arange(40) % 3 == int(labels[b])
        expected = pca_mean(bank, x[b], a, s, masks, images=images)
        assert np.abs(together[b].double().numpy().ravel() - expected).max() < 1e-4
        assert torch.equal(machine.denoise(x[b : b + 1], a, s, labels[b : b + 1])[0], together[b])
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=bank.nbytes // 4)
    assert streamed.streamed
    for other in (pyels.PCALocality(streamed, 0.05, engine=engine), pickle.loads(pickle.dumps(machine))):
        assert float((other.denoise(x, alpha, sigma, labels) - together).abs().max()) < 1e-6


def test_pca_is_quick_again_and_draws():
    machine = pyels.PCALocality(make_bank(30, (3, 6, 6)), threads=2)
    out = pyels.sample(machine, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)), steps=4)
    assert torch.isfinite(out).all()
    assert len(machine._kept) == 4
    assert machine.windows(*next(iter(machine._kept))).data_ptr() == next(iter(machine._kept.values())).data_ptr()


def test_what_pca_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr("pyels.machines.locality.KEPT_BYTES", 3 * 36**2)
    machine = pyels.PCALocality(make_bank(30, (1, 6, 6)))
    for sigma in (0.1, 0.2, 0.3, 0.4, 0.5):
        machine.windows(0.5, sigma)
    assert [level[1] for level in machine._kept] == [0.3, 0.4, 0.5]


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pca_has_a_derivative(shape, engine):
    bank = make_bank(25, shape)
    machine, oracle = (pyels.PCALocality(bank, 0.05, engine=e) for e in (engine, "reference"))
    for alpha, sigma in LEVELS:
        x = noisy(bank, alpha, sigma, seed=4)
        g, direction = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in (5, 6))
        x.requires_grad_()
        (machine.denoise(x, alpha, sigma) * g).sum().backward()
        step = 1e-2 * sigma
        ends = [x.detach() + sign * step * direction for sign in (1, -1)]
        ahead, behind = ((oracle.denoise(end, alpha, sigma) * g).sum() for end in ends)
        distance = (ends[0].double() - ends[1].double()).norm() / direction.double().norm()
        expected = float((ahead - behind) / distance)
        along = float((x.grad.double() * direction.double()).sum())
        scale = float(x.grad.double().norm() * direction.double().norm())
        assert abs(along - expected) < 2e-3 * max(scale, 1e-2 * alpha / sigma**2)


def test_the_posterior_of_a_channel():
    grey, colour = (pyels.PCALocality(make_bank(30, shape)) for shape in SHAPES)
    oracle = pyels.PCALocality(grey.bank, engine="reference")
    x = noisy(grey.bank, 0.8, 0.6)
    ours, theirs = grey.posterior(x, 0.8, 0.6), oracle.posterior(x, 0.8, 0.6)
    assert float((ours.entropy - theirs.entropy).abs().max()) < 1e-4
    assert float((ours.variance - theirs.variance).abs().max()) < 1e-4
    assert float((grey.influence(x, 0.8, 0.6) - oracle.influence(x, 0.8, 0.6)).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="3 channels of a pixel"):
        colour.posterior(noisy(colour.bank, 0.8, 0.6), 0.8, 0.6)


def composite_mean(images, x, alpha, sigma, windows):
    """The mean over windows, each a bool (H, W), of their means of images (n, C, H, W)."""
    total, cover = np.zeros(images.shape[1:]), np.zeros(images.shape[2:])
    for window in windows:
        log_w = -(((x - alpha * images) ** 2) * window).sum((1, 2, 3)) / (2 * sigma**2)
        w = np.exp(log_w - log_w.max())
        total += window * ((w / w.sum())[:, None, None, None] * images).sum(0)
        cover += window
    return total / cover


def squares(height, width, k):
    for i in range(height - k + 1):
        for j in range(width - k + 1):
            window = np.zeros((height, width), dtype=bool)
            window[i : i + k, j : j + k] = True
            yield window


def sensitive(heatmap, mass):
    order = np.argsort(-heatmap.ravel(), kind="stable")
    held = heatmap.ravel()[order]
    window = np.zeros(heatmap.size, dtype=bool)
    window[order[np.cumsum(held) - held <= mass * held.sum()]] = True
    return window.reshape(heatmap.shape)


@pytest.mark.parametrize(("engine", "bound"), ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mirror", [False, True])
def test_pspc_is_the_formula(shape, mirror, engine, bound):
    bank = make_bank(20, shape)
    _, height, width = shape
    images = values_of(bank).reshape(20, *shape)
    both = np.concatenate([images, images[..., ::-1]]) if mirror else images
    heatmaps = np.random.default_rng(0).random((height, width, height, width)) ** 4
    ways = [
        (pyels.PSPC(bank, 3, mirror=mirror, engine=engine), list(squares(height, width, 3))),
        (
            pyels.PSPC(bank, heatmaps=heatmaps, mass=0.6, mirror=mirror, engine=engine),
            [sensitive(heatmaps[i, j], 0.6) for i in range(height) for j in range(width)],
        ),
    ]
    for machine, windows in ways:
        for alpha, sigma in LEVELS:
            x = noisy(bank, alpha, sigma)
            expected = composite_mean(both, x[0].double().numpy(), alpha, sigma, windows)
            assert np.abs(machine.denoise(x, alpha, sigma)[0].double().numpy() - expected).max() < bound


def test_all_of_the_mass_is_the_whole_image():
    bank = make_bank(20, (1, 5, 6))
    heatmaps = torch.rand(5, 6, 5, 6, generator=torch.Generator().manual_seed(0))
    x = noisy(bank, 0.8, 0.6)
    whole = pyels.PSPC(bank, heatmaps=heatmaps, mirror=False).denoise(x, 0.8, 0.6)
    assert float((whole - pyels.IS(bank).denoise(x, 0.8, 0.6)).abs().max()) < 1e-5


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_call_may_say_the_threshold_and_the_mass(engine):
    maps = torch.rand(5, 4, 5, 4, generator=torch.Generator().manual_seed(0))
    bank = make_bank(30, (3, 5, 4))
    x = noisy(bank, 0.8, 0.6, 2)
    for make, name in [
        (lambda value: pyels.PCALocality(bank, value, engine=engine), "threshold"),
        (lambda value: pyels.Golden(pyels.PCALocality(bank, value, engine=engine)), "threshold"),
        (lambda value: pyels.PSPC(bank, heatmaps=maps, mass=value, engine=engine), "mass"),
    ]:
        machine = make(0.9)
        assert machine.parameter == name
        for value in (0.5, 0.7, 0.5):
            assert torch.equal(machine.denoise(x, 0.8, 0.6, **{name: value}), make(value).denoise(x, 0.8, 0.6))
        assert torch.equal(machine.denoise(x, 0.8, 0.6), make(0.9).denoise(x, 0.8, 0.6))
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got 3"):
            machine.denoise(x, 0.8, 0.6, **{name: 3})
        with pytest.raises(ValueError, match="patch_size 3 was given"):
            machine.denoise(x, 0.8, 0.6, patch_size=3)


def test_what_is_refused():
    bank = make_bank(12, (1, 5, 6))
    maps = torch.rand(5, 6, 5, 6)
    for refused, what in [
        (lambda: pyels.PCALocality(bank, 1.5), r"threshold must lie in \[0, 1\], got 1.5"),
        (lambda: pyels.PCALocality(bank, temperature=0), "temperature must be positive and finite, got 0"),
        (lambda: pyels.PCALocality(bank, by="rows"), "by must be one of 'matrix', 'output', got 'rows'"),
        (lambda: pyels.PCALocality(bank[:1]), "at least 2 images"),
        (lambda: pyels.PCALocality(make_bank(2, (3, 65, 64))), "12480 values, too many for their covariance"),
        (lambda: pyels.PCALocality(bank, engine="sampled"), "takes windows"),
        (lambda: pyels.PSPC(bank, 3, maps), "patch_size and heatmaps were given"),
        (lambda: pyels.PSPC(bank, heatmaps=maps[:4]), r"heatmaps must be \(H, W, H, W\), got \(4, 6, 5, 6\)"),
        (lambda: pyels.PSPC(bank, heatmaps=torch.rand(5, 5, 5, 5)), r"must have shape \(30, 5, 6\)"),
        (lambda: pyels.PSPC(bank, heatmaps=-maps), "heatmaps must be finite and not negative"),
        (lambda: pyels.PSPC(bank, heatmaps=maps, mass=2), r"mass must lie in \[0, 1\], got 2"),
        (lambda: pyels.PSPC(bank, 7).denoise(noisy(bank, 1.0, 1.0), 1.0, 1.0), "no window of 7 x 7"),
    ]:
        with pytest.raises(ValueError, match=what):
            refused()
    only_first = torch.zeros(5, 6, 5, 6)
    only_first[..., 0, 0] = 1
    with pytest.raises(ValueError, match=r"no window answers for pixel \(0, 1\)"):
        pyels.PSPC(bank, heatmaps=only_first, mass=0.5).denoise(noisy(bank, 1.0, 1.0), 1.0, 1.0)
