"""Images drawn at random in place of all, by engine "sampled" at high noise."""

import sys

import numpy as np
import pytest
import torch
from helpers import COSINE, make_bank, noisy, partial

import pyels
from pyels.engines import drawn
from pyels.engines.index.file import open_index
from pyels.posterior import Want

T1, T95 = ((COSINE.alpha(t), COSINE.sigma(t)) for t in (1.0, 0.95))


@pytest.fixture(scope="module", autouse=True)
def no_index():
    """Whatever would be searched for in an index fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyels.engines.sampled.open_index", lambda *_: pytest.fail("an index was opened"))
        yield


@pytest.fixture(scope="module")
def bank():
    return make_bank(6000, (1, 12, 12), labels=[i % 2 for i in range(6000)])


def drawn_of(machine, x, alpha, sigma, tolerance, want=Want.POSTERIOR, images=None, dice=0):
    name, images = ("all", range(len(machine.bank))) if images is None else ("some", images)
    query = machine.query(x, alpha, sigma)
    definition = machine.definition.of_size(None, *machine.bank.shape[1:])
    return drawn.draw(definition, machine.bank, name, images, query, want, tolerance, 1, dice)


@pytest.mark.parametrize(("boundary", "channels"), [("zeros", 1), ("zeros", 3), ("circular", 1), ("interior", 3)])
def test_intervals_hold(boundary, channels):
    bank = make_bank(6000, (channels, 10, 10))
    machine = pyels.ELS(bank, 5, boundary)
    missed, far = [], []
    for level in (T1, T95, (0.3, 0.95)):
        x = noisy(bank, *level)
        exact = machine.denoise(x, *level)
        for dice in range(5):
            found = drawn_of(machine, x, *level, 0.1, Want.MEAN, dice=dice)
            if found is None:
                assert level == (0.3, 0.95)
                continue
            error, certified = found.error()
            assert not certified.any()
            assert error.max() <= 0.1 + 2e-4
            off = (found.mean() - exact).abs().amax(1)
            missed.append((off > error).float().mean())
            far.append((off / error).max())
    assert torch.stack(missed).mean() <= 0.05
    assert torch.stack(far).max() < 5


def test_fashion_mnist(fashion):
    machine = pyels.ELS(fashion, 17)
    missed, far = [], []
    for i, (level, tolerance) in enumerate(((T1, 0.1), (T95, 0.15))):
        x = noisy(fashion, *level, seed=i)
        exact = machine.denoise(x, *level)
        for dice in range(4):
            found = drawn_of(machine, x, *level, tolerance, Want.MEAN, dice=dice)
            off, (error, _) = (found.mean() - exact).abs().amax(1), found.error()
            missed.append((off > error).float().mean())
            far.append((off / error).max())
    assert torch.stack(missed).mean() <= 0.05
    assert torch.stack(far).max() < 5


def test_all_fields_and_no_index(bank, tmp_path):
    x = noisy(bank, *T95)
    machine = pyels.ELS(bank, 5, engine="sampled", index=tmp_path / "index", tolerance=0.1)
    post, exact = machine.posterior(x, *T95), pyels.ELS(bank, 5).posterior(x, *T95)
    assert not post.certified.any()
    assert (post.log_evidence - exact.log_evidence).abs().max() < 0.1
    assert (post.entropy - exact.entropy).abs().max() < 0.2
    assert (post.source_weight <= 1).all()
    # The source is a patch of that weight, and none is heavier than the exact one.
    image, row, column = post.source[0, 6, 6]
    window = bank.read(image[None])[0, :, row - 2 : row + 3, column - 2 : column + 3]
    difference = x[0, :, 4:9, 4:9].double() - T95[0] * window.double()
    log_w = -difference.square().sum() / (2 * T95[1] ** 2)
    heaviest = post.source_weight.double().log() + post.log_evidence.double() + np.log(6000 * 64)
    assert heaviest[0, 6, 6] == pytest.approx(float(log_w), abs=1e-3)
    assert not (tmp_path / "index").exists()


def test_each_query_as_if_alone_any_threads_and_again(bank, tmp_path):
    alpha, sigma = (torch.tensor(v) for v in zip(T1, T95, T1, strict=True))
    x = noisy(bank, alpha, sigma, 3)
    machine = pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1, threads=1)
    together = machine.denoise(x, alpha, sigma)
    for i in range(3):
        assert torch.equal(machine.denoise(x[i : i + 1], alpha[i], sigma[i])[0], together[i])
    two = pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1, threads=2)
    assert torch.equal(two.denoise(x, alpha, sigma), together)


def test_the_mean_over_dice_is_nearer(bank, tmp_path):
    x, engine = noisy(bank, *T1), {"engine": "sampled", "index": tmp_path, "tolerance": 0.1}
    drawn_by = torch.stack([pyels.ELS(bank, 5, dice=dice, **engine).denoise(x, *T1) for dice in range(16)])
    assert torch.equal(drawn_by[0], pyels.ELS(bank, 5, **engine).denoise(x, *T1))
    off = drawn_by - pyels.ELS(bank, 5).denoise(x, *T1)
    assert off.mean(0).square().mean() < off.square().mean() / 8  # a sixteenth, were there more of them; 0.084 seen


def test_dice_0_draws_what_was_drawn_before_there_were_others():
    before, now = (np.random.default_rng(seed).permutation(9) for seed in ((1, 2), (1, 2, 0)))
    assert (before == now).all()


def test_classes(tmp_path):
    images = make_bank(10_400, (1, 10, 10)).images
    images[1::2] //= 2
    bank = pyels.PatchBank(images, [i % 2 for i in range(10_400)])
    machine, exact = pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1), pyels.ELS(bank, 5)
    labels = torch.tensor([1, 0, 1])
    x = noisy(bank, *T1, 3)
    post = machine.posterior(x, *T1, labels)
    assert ((post.mean - exact.denoise(x, *T1, labels)).abs().amax(1) > post.error).float().mean() <= 0.05
    assert torch.equal(bank.labels[post.source[..., 0]], labels[:, None, None].expand(-1, 10, 10))


def test_a_drawn_query_beside_one_that_is_searched(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    bank = make_bank(5000, (1, 8, 8))
    monkeypatch.setattr("pyels.engines.sampled.open_index", open_index)
    alpha, sigma = (torch.tensor(v) for v in zip((0.95, 0.3), T95, strict=True))
    x = noisy(bank, alpha, sigma, 2)
    machine = pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1)
    post = machine.posterior(x, alpha, sigma)
    exact = pyels.ELS(bank, 5).denoise(x, alpha, sigma)
    assert ((post.mean - exact).abs().amax(1) > post.error).float().mean() <= 0.07
    assert post.certified[0, 0, 0]  # which overhangs, and is exact in a search
    assert not post.certified[1].any()
    assert (tmp_path / "k5.safetensors").exists()


def test_parts_merge(bank, tmp_path):
    other = make_bank(200, (1, 12, 12), seed=1)
    both = pyels.ELS(pyels.PatchBank(torch.cat([bank.images, other.images])), 5)
    machine = pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1)
    missed = []
    for seed in range(1, 5):
        x = noisy(bank, *T95, seed=seed)
        merged = partial(machine, x, *T95).merge(partial(pyels.ELS(other, 5), x, *T95))
        missed.append(((merged.mean() - both.denoise(x, *T95)).abs().amax(1) > merged.error()[0]).float().mean())
    assert torch.stack(missed).mean() <= 0.05


@pytest.mark.parametrize(("alpha", "sigma", "k"), [(0.99, 0.1, 5), (0.7, 0.7, 5), (0.6, 0.8, 9), (0.5, 0.87, 11)])
def test_where_few_windows_carry_the_weight_nothing_is_drawn(bank, alpha, sigma, k, monkeypatch):
    x = noisy(bank, alpha, sigma)
    assert drawn_of(pyels.ELS(bank, k), x, alpha, sigma, 1.0) is None


@pytest.mark.parametrize("value", [20, None])
def test_a_single_image_of_another_kind_is_not_left_to_chance(bank, value, monkeypatch):
    """It carries the weight of a query made of it, and nothing in the others says so."""
    images = bank.images // 16 if value is None else torch.full_like(bank.images, value)
    images[77] = 255
    machine = pyels.ELS(pyels.PatchBank(images), 9)
    for alpha in (0.08, 0.16, 0.3, 0.95):
        sigma = (1 - alpha**2) ** 0.5
        x = alpha + sigma * torch.randn((1, 1, 12, 12), generator=torch.Generator().manual_seed(0))
        assert drawn_of(machine, x, alpha, sigma, 0.1) is None


def test_the_spread_of_weights_is_known_from_a_few_images(fashion, monkeypatch):
    """`ratio * sqrt(2 lost)` against the standard deviation of log w over all images, of a corner and of the middle."""
    seen = []
    to_trust = drawn._to_trust
    monkeypatch.setattr(drawn, "_to_trust", lambda spread, places: seen.append(spread) or to_trust(spread, places))
    for k, alpha in ((17, 0.01), (17, 0.09), (15, 0.16)):
        sigma = (1 - alpha**2) ** 0.5
        x, r = noisy(fashion, alpha, sigma), k // 2
        drawn_of(pyels.ELS(fashion, k), x, alpha, sigma, 0.1)
        images = fashion.read(torch.arange(2000))
        for at, of in (
            ((0, 0), images[:, 0, : r + 1, : r + 1]),
            ((14, 14), images[:, 0, 14 - r : 15 + r, 14 - r : 15 + r]),
        ):
            query = x[0, 0, max(0, at[0] - r) : at[0] + r + 1, max(0, at[1] - r) : at[1] + r + 1]
            if at == (14, 14):
                of = images[:, 0].unfold(1, k, 1).unfold(2, k, 1).flatten(0, 2)[::7]
            log_w = -((query - alpha * of) ** 2).sum((1, 2)) / (2 * sigma**2)
            measured = float(log_w.std())
            least = 0.5 * alpha / sigma * query.numel() ** 0.5
            assert float(seen[-1][at]) == pytest.approx(max(least, measured), rel=0.3)


def test_all_images_are_exact(bank, monkeypatch):
    monkeypatch.setattr(drawn, "SEARCH_SHARE", 1)
    bank, x = bank[:5120], noisy(bank, *T95)
    machine = pyels.ELS(bank, 5)
    post, exact = drawn_of(machine, x, *T95, 1e-6).finish(), machine.posterior(x, *T95)
    assert post.certified.all()
    for name in ("mean", "log_evidence", "entropy", "source_weight"):
        torch.testing.assert_close(getattr(post, name), getattr(exact, name), atol=2e-5, rtol=1e-5)
    assert torch.equal(post.source, exact.source)
    torch.testing.assert_close(post.error, exact.error)


def test_too_many_images_are_not_begun(bank, monkeypatch):
    monkeypatch.setattr(drawn, "BATCHES", 0)  # a first round would fail
    x = noisy(bank, *T1)
    assert drawn_of(pyels.ELS(bank, 5), x, *T1, 1e-3) is None
    monkeypatch.setattr(drawn, "evaluate", lambda *_: pytest.fail("an image was looked at"))
    assert drawn_of(pyels.ELS(bank, 5), x, *T1, 0.1, images=range(4999)) is None


def test_black_borders_are_not_taken_for_certain():
    """Where one image in thousands is white, and none of them drawn, the stated error leaves room for it."""
    images = torch.zeros((6000, 1, 12, 12), dtype=torch.uint8)
    images[:, :, 4:8, 4:8] = make_bank(6000, (1, 4, 4)).images
    images[::1500, :, 0] = 255
    machine = pyels.ELS(pyels.PatchBank(images), 5)
    x = noisy(machine.bank, *T1)
    found = drawn_of(machine, x, *T1, 0.1)
    assert ((found.mean() - machine.denoise(x, *T1)).abs().amax(1) <= found.error()[0]).float().mean() >= 0.95


def test_large_images_and_no_faiss(tmp_path, monkeypatch):
    """What an index would be refused for does not matter where none is needed."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank = make_bank(6000, (1, 12, 12))
    pyels.ELS(bank, 5, engine="sampled", index=tmp_path, tolerance=0.1).denoise(noisy(bank, *T1), *T1)
    assert not list(tmp_path.iterdir())


def test_weights_alone_and_what_takes_a_second_pass(bank):
    machine, x = pyels.ELS(bank, 5, engine="sampled", tolerance=0.1), noisy(bank, *T1)
    alone, whole = (machine.partial(machine.query(x, *T1), want) for want in (Want.WEIGHTS, Want.SECOND))
    assert alone.y.shape[1] == 0
    assert torch.equal(alone.s, whole.s)
    with pytest.raises(ValueError, match="sampled"):
        machine.influence(x, *T1)
