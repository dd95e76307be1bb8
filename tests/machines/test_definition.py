"""Machines as declarations: any definition in one line, evaluated, or refused in words."""

import itertools

import numpy as np
import pytest
import torch
from helpers import check, make_bank, noisy

import pyels
from pyels.engines import oracle


def same(a, b):
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in vars(a))


def masks_of(machine, shape, k):
    """The windows of a machine at the same position, as masks (H*W, H, W)."""
    height, width = shape
    rows, columns = np.indices(shape)
    inside = [(abs(rows - p // width) <= k // 2) & (abs(columns - p % width) <= k // 2) for p in range(height * width)]
    return torch.from_numpy(np.stack(inside)).double()


@pytest.mark.parametrize("sources", pyels.ELS.boundaries)
def test_els_is_its_definition(small, sources):
    x = noisy(small, 0.6, 0.8, batch=2)
    machine = pyels.Machine(small, pyels.Definition(window=pyels.Square(5), sources=sources))
    assert same(machine.posterior(x, 0.6, 0.8), pyels.ELS(small, 5, boundary=sources).posterior(x, 0.6, 0.8))


def test_named_machines_are_their_definitions(small):
    x, labels = noisy(small, 0.6, 0.8, batch=2), torch.tensor([2, 0])
    for named, definition in (
        (pyels.IS(small), pyels.Definition(pyels.WholeImage(), "same_position")),
        (pyels.ES(small), pyels.Definition(pyels.WholeImage(), "circular")),
        (pyels.LS(small, 3), pyels.Definition(pyels.Square(3), "same_position")),
        (pyels.ELS(small, 3), pyels.Definition(pyels.Square(3))),
    ):
        assert named.definition == definition
        machine = pyels.Machine(small, definition, threads=2)
        assert same(machine.posterior(x, 0.6, 0.8, labels), named.posterior(x, 0.6, 0.8, labels))
    assert "Square(k=3)" in repr(machine)
    assert repr(named).endswith("patch_size=3, engine='cpu')")


def test_windows_folds_and_mirror_images_of_named_machines(small):
    x = noisy(small, 0.6, 0.8, batch=2)
    for window, fold, mirror in (
        (pyels.Square(5, inside=True), "uniform", True),
        (pyels.Gaussian(1.0), None, True),
        (pyels.Gaussian(1.0, 5), pyels.Fold(0.5), False),
    ):
        parts = {"window": window, "fold": fold, "mirror": mirror}
        local = pyels.Definition(sources="same_position", **parts)
        assert pyels.LS(small, **parts).definition == local
        machine = pyels.Machine(small, pyels.Definition(sources="circular", **parts))
        named = pyels.ELS(small, boundary="circular", **parts)
        assert torch.equal(machine.denoise(x, 0.6, 0.8), named.denoise(x, 0.6, 0.8))
    with pytest.raises(ValueError, match=r"patch_size 3 and window Square\(k=5\) were given"):
        pyels.ELS(small, 3, window=pyels.Square(5))
    with pytest.raises(TypeError, match="window must be Square"):
        pyels.LS(small, window=pyels.WholeImage())


def test_size_may_come_with_the_call(small):
    x = noisy(small, 0.6, 0.8)
    machine = pyels.Machine(small, pyels.Definition(sources="circular"))
    with pytest.raises(ValueError, match="patch_size is missing"):
        machine.denoise(x, 0.6, 0.8)
    mean = machine.denoise(x, 0.6, 0.8, patch_size=7)
    assert torch.equal(mean, pyels.ELS(small, 7, "circular").denoise(x, 0.6, 0.8))
    assert machine.patch_size is None


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 5, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_squares_as_masks_are_ls(shape, k):
    bank = make_bank(9, shape, labels=[0, 0, 1] * 3)
    x, labels = noisy(bank, 0.8, 0.6, batch=3), torch.tensor([1, 0, 1])
    definition = pyels.Definition(pyels.Masks(masks_of(bank, shape[1:], k)), "same_position")
    machine = pyels.Machine(bank, definition, "reference")
    check(pyels.Machine(bank, definition, "cpu").posterior(x, 0.8, 0.6, labels), machine.posterior(x, 0.8, 0.6, labels))
    ours, ls = machine.posterior(x, 0.8, 0.6, labels), pyels.LS(bank, k, "reference").posterior(x, 0.8, 0.6, labels)
    for field in ("mean", "entropy", "log_evidence", "source_weight"):
        torch.testing.assert_close(getattr(ours, field), getattr(ls, field), rtol=0, atol=1e-11)  # worst seen 2e-14
    assert torch.equal(ours.source, ls.source)


def test_sets_are_weights_of_one_and_a_temperature_divides_them():
    bank = make_bank(40, (2, 6, 5))
    sets = torch.rand(30, 2, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.6
    x = noisy(bank, 0.6, 0.8)
    for temperature in (1.0, 2.5):
        as_sets, as_weights = (
            pyels.Definition(window, "same_position", fold="uniform")
            for window in (pyels.Masks(sets, temperature=temperature), pyels.Masks(sets.double() / temperature))
        )
        oracle = pyels.Machine(bank, as_weights, "reference").posterior(x, 0.6, 0.8)
        check(pyels.Machine(bank, as_sets, "cpu").posterior(x, 0.6, 0.8), oracle)
        same = pyels.Machine(bank, as_sets, "reference").posterior(x, 0.6, 0.8)
        torch.testing.assert_close(same.mean, oracle.mean, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        pyels.Masks(sets, temperature=-1)


def test_masks_of_every_value_and_noise_level():
    """Weights of each channel that change with the noise: a batch of several levels is as each by itself."""
    bank = make_bank(7, (2, 4, 5))
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(20, 2, 4, 5, generator=generator) * (torch.rand(20, 2, 4, 5, generator=generator) > 0.6)
    asked = []

    def weights(alpha, sigma):
        asked.append((alpha, sigma))
        return base * (1 + sigma)

    machine = pyels.Machine(bank, pyels.Definition(pyels.Masks(weights), "same_position"), engine="reference")
    alpha, sigma = torch.tensor([0.8, 0.3, 0.8]), torch.tensor([0.6, 0.9, 0.6])
    x = noisy(bank, alpha, sigma, batch=3)
    together = machine.posterior(x, alpha, sigma)
    assert len(asked) == 2
    for b in range(3):
        a, s = float(alpha[b]), float(sigma[b])
        alone = machine.posterior(x[b : b + 1], a, s)
        slow = oracle.posterior(machine.definition, bank, x[b : b + 1], a, s)
        for field in ("mean", "entropy", "log_evidence", "source_weight"):
            torch.testing.assert_close(getattr(alone, field), getattr(slow, field), rtol=0, atol=1e-11)
            torch.testing.assert_close(getattr(together, field)[b : b + 1], getattr(alone, field), rtol=0, atol=1e-6)
        assert torch.equal(alone.source, slow.source)


def test_masks_of_a_streamed_bank_and_an_empty_batch(tmp_path):
    bank, asked = make_bank(9, (1, 4, 5)), []
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=40)
    definition = pyels.Definition(
        pyels.Masks(lambda *level: asked.append(level) or torch.ones(20, 4, 5)), "same_position"
    )
    x = noisy(bank, 0.6, 0.8)
    mean = pyels.Machine(streamed, definition, engine="reference").denoise(x, 0.6, 0.8)
    torch.testing.assert_close(mean, pyels.IS(bank, "reference").denoise(x, 0.6, 0.8), rtol=0, atol=1e-12)
    assert len(asked) == 1
    assert pyels.Machine(bank, definition).denoise(x[:0], 0.6, 0.8).shape == (0, 1, 4, 5)


def test_empty_windows_weigh_all_images_alike():
    bank = make_bank(6, (1, 3, 4))
    definition = pyels.Definition(pyels.Masks(torch.zeros(12, 3, 4)), "same_position")
    mean = pyels.Machine(bank, definition, "reference").denoise(noisy(bank, 0.6, 0.8), 0.6, 0.8)
    torch.testing.assert_close(mean[0], bank.read(slice(None)).double().mean(0), rtol=0, atol=1e-6)


def test_what_an_engine_cannot_do_is_refused_in_words(small):
    masks = pyels.Definition(pyels.Masks(torch.ones(72, 9, 8)), "same_position")
    for engine in ("sampled", "faiss"):
        with pytest.raises(ValueError, match=r"engine '.*' takes windows WholeImage, Square, not Masks; use .*cpu"):
            pyels.Machine(small, masks, engine=engine)
    for definition, why in (
        (pyels.Definition(pyels.Square(3), fold="uniform"), "does not fold windows"),
        (pyels.Definition(pyels.Square(3), mirror=True), "does not look at mirror images"),
        (pyels.Definition(pyels.Square(3), responses=small), "lets no other images answer"),
        (pyels.Definition(pyels.Gaussian(1.0)), "takes windows WholeImage, Square, not Gaussian"),
    ):
        with pytest.raises(ValueError, match=why):
            pyels.Machine(small, definition, engine="sampled")


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (torch.ones(72, 9, 9), r"must have shape \(72, 9, 8\) or \(72, 1, 9, 8\)"),
        (-torch.ones(72, 9, 8), "finite and not negative"),
        (torch.full((72, 9, 8), torch.nan), "finite and not negative"),
        (lambda alpha, sigma: torch.ones(3), "must have shape"),
    ],
)
def test_bad_masks(small, weights, why):
    with pytest.raises(ValueError, match=why):  # of a tensor when the machine is made, of a function when it is used
        pyels.Machine(small, pyels.Definition(pyels.Masks(weights), "same_position")).denoise(
            noisy(small, 0.6, 0.8), 0.6, 0.8
        )


def test_bad_definitions(small):
    for given, error, why in (
        ({"window": 5}, TypeError, r"window must be Square\(k\), Gaussian\(width\), WholeImage\(\) or Masks"),
        ({"sources": "torus"}, ValueError, "sources must be one of 'same_position', 'circular', 'interior', 'zeros'"),
        ({"window": pyels.WholeImage(), "sources": "zeros"}, ValueError, "with WholeImage, got 'zeros'"),
        ({"window": pyels.Masks(torch.ones(1)), "sources": "circular"}, ValueError, "'same_position' with Masks"),
        ({"fold": "mean"}, ValueError, "fold must be None, 'uniform' or Fold"),
        ({"window": pyels.WholeImage(), "sources": "circular", "fold": "uniform"}, ValueError, "leave out fold"),
        (
            {"window": pyels.Masks(torch.ones(1)), "sources": "same_position", "fold": pyels.Fold(0.2)},
            ValueError,
            "masks have no places along an axis",
        ),
        ({"window": pyels.Square(3, inside=True)}, ValueError, "leaves border pixels without a window"),
    ):
        with pytest.raises(error, match=why):
            pyels.Definition(**given)
    with pytest.raises(TypeError, match=r"must be a pyels\.Definition, got int"):
        pyels.Machine(small, 5)
    for k, sources in itertools.product((4, 11), ("circular", "interior")):
        with pytest.raises(ValueError, match="patch_size"):
            pyels.Machine(small, pyels.Definition(pyels.Square(k), sources))


def test_a_call_may_say_the_width_of_a_gaussian(small):
    x = noisy(small, 0.8, 0.6)
    for make in (pyels.LS, pyels.ELS):
        machine = make(small, window=pyels.Gaussian(1.0))
        assert machine.parameter == "width"
        wide = make(small, window=pyels.Gaussian(1.4)).denoise(x, 0.8, 0.6)
        assert torch.equal(machine.denoise(x, 0.8, 0.6, width=1.4), wide)
        assert not torch.equal(machine.denoise(x, 0.8, 0.6), wide)
        with pytest.raises(ValueError, match="width of a Gaussian window must be positive and finite, got 0"):
            machine.denoise(x, 0.8, 0.6, width=0)
    with pytest.raises(ValueError, match="patch_size 13 is larger than the 9x8 image"):
        pyels.ELS(small, boundary="circular", window=pyels.Gaussian(1.0)).denoise(x, 0.8, 0.6, width=2)
    with pytest.raises(TypeError, match="ELS has no argument 'width'; beyond patch_size it has tolerance"):
        pyels.ELS(small, 3).denoise(x, 0.8, 0.6, width=2)


def test_a_gaussian_keeps_the_size_that_was_given():
    assert pyels.Gaussian(1.0, k=5).of(2.0) == pyels.Gaussian(2.0, k=5)
    assert pyels.Gaussian(1.0).of(2.0) == pyels.Gaussian(2.0)


def test_masks_have_a_parameter_that_they_are_told():
    with pytest.raises(ValueError, match="parameter of Masks must be 'threshold' or 'mass', or None, got 'width'"):
        pyels.Masks(lambda alpha, sigma, width: torch.ones(4, 2, 2), "width")
    with pytest.raises(ValueError, match="Masks with a threshold need a function"):
        pyels.Masks(torch.ones(4, 2, 2), "threshold")
