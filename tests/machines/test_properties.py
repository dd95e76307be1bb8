"""Properties that hold for every machine, bank and query."""

import pytest
import torch
from helpers import MACHINES, make_bank, noisy, partial
from hypothesis import given, settings
from hypothesis import strategies as st

import pyels

PROFILE = settings(max_examples=25, deadline=None, derandomize=True)
kinds = st.sampled_from(list(MACHINES))
seeds = st.integers(0, 10_000)
noise_levels = st.floats(0.03, 0.999)
patch_sizes = st.sampled_from([1, 3, 5, 7])


def level(sigma):
    return (1 - sigma**2) ** 0.5, sigma


@PROFILE
@given(kinds, seeds, noise_levels, patch_sizes)
def test_permuting_the_bank_changes_nothing(kind, seed, sigma, k):
    bank = make_bank(19, (1, 8, 9), seed=seed)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(seed))
    shuffled = pyels.PatchBank(bank.images[order])
    x = noisy(bank, *level(sigma), seed=seed)
    ours = MACHINES[kind](bank, k).posterior(x, *level(sigma))
    other = MACHINES[kind](shuffled, k).posterior(x, *level(sigma))
    torch.testing.assert_close(ours.mean, other.mean, atol=5e-6, rtol=0)  # sums in another order
    torch.testing.assert_close(ours.entropy, other.entropy, atol=5e-5, rtol=0)
    clear = ours.source_weight > 0.51
    assert torch.equal(ours.source[clear][:, 0], order[other.source[clear][:, 0]])


@PROFILE
@given(kinds, seeds, noise_levels, patch_sizes, st.integers(1, 18))
def test_split_and_merge_equals_the_whole(kind, seed, sigma, k, cut):
    bank = make_bank(19, (1, 8, 9), seed=seed)
    x = noisy(bank, *level(sigma), seed=seed)
    whole = partial(MACHINES[kind](bank, k), x, *level(sigma))
    head = partial(MACHINES[kind](bank[:cut], k), x, *level(sigma))
    tail = partial(MACHINES[kind](bank[cut:], k), x, *level(sigma))
    # A source number counts from the start of its own bank.
    moved = pyels.PartialPosterior(tail.m, tail.s, tail.y, tail.count, tail.e, tail.top, tail.source + cut * 8 * 9)
    merged = head.merge(moved)
    assert torch.equal(merged.count, whole.count)
    assert torch.equal(merged.source, whole.source)
    ours, expected = merged.finish(torch.float64), whole.finish(torch.float64)
    for field in ("mean", "log_evidence", "entropy", "source_weight"):
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), atol=5e-5, rtol=1e-6)
    assert float((ours.mean - expected.mean).abs().max()) < 5e-6  # worst seen 4e-7


@PROFILE
@given(seeds, noise_levels, patch_sizes)
def test_merging_is_a_monoid(seed, sigma, k):
    bank = make_bank(9, (1, 7, 7), seed=seed)
    x = noisy(bank, *level(sigma), seed=seed)
    a, b, c = (partial(pyels.ELS(bank[i : i + 3], k), x, *level(sigma)) for i in (0, 3, 6))
    neutral = pyels.PartialPosterior(
        torch.full_like(a.m, -torch.inf),
        torch.zeros_like(a.s),
        torch.zeros_like(a.y),
        torch.zeros_like(a.count),
        torch.zeros_like(a.s),
        torch.full_like(a.m, -torch.inf),
        torch.full_like(b.source, -1),
    )
    left, right = a.merge(b).merge(c).finish(), a.merge(b.merge(c)).finish()
    for field in ("mean", "log_evidence", "entropy", "source", "source_weight"):
        torch.testing.assert_close(getattr(left, field), getattr(right, field))
        for same in (a.merge(neutral), neutral.merge(a)):
            assert torch.equal(getattr(same.finish(), field), getattr(a.finish(), field))


@PROFILE
@given(
    st.sampled_from(["ES", "ELS-circular", "ELS-interior"]), seeds, noise_levels, st.integers(0, 7), st.integers(0, 8)
)
def test_translating_the_input_translates_the_output(kind, seed, sigma, dy, dx):
    bank = make_bank(10, (1, 8, 9), seed=seed)
    x = noisy(bank, *level(sigma), seed=seed)
    machine = MACHINES[kind](bank, 5)
    moved = machine.denoise(torch.roll(x, (dy, dx), (2, 3)), *level(sigma))
    expected = torch.roll(machine.denoise(x, *level(sigma)), (dy, dx), (2, 3))
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)  # worst seen 9e-7


@PROFILE
@given(kinds, seeds, noise_levels, st.integers(2, 9), st.integers(1, 60))
def test_any_number_of_threads_gives_the_same_bits(kind, seed, sigma, threads, n):
    bank = make_bank(n, (1, 8, 9), seed=seed)
    x = noisy(bank, *level(sigma), seed=seed, batch=3)
    one = partial(MACHINES[kind](bank, 3, threads=1), x, *level(sigma))
    many = partial(MACHINES[kind](bank, 3, threads=threads), x, *level(sigma))
    for field in ("m", "s", "y", "e", "top", "source"):
        assert torch.equal(getattr(one, field), getattr(many, field))


@PROFILE
@given(kinds, seeds, noise_levels, patch_sizes)
def test_weights_sum_to_one(kind, seed, sigma, k):
    """A bank of constant images: any weighted mean that is normalised gives the constant back."""
    value = seed % 256
    bank = pyels.PatchBank(torch.full((7, 1, 8, 9), value, dtype=torch.uint8))
    x = noisy(bank, *level(sigma), seed=seed)
    posterior = MACHINES[kind](bank, k).posterior(x, *level(sigma))
    torch.testing.assert_close(posterior.mean, torch.full_like(x, value / 127.5 - 1), atol=1e-6, rtol=0)
    bank = make_bank(7, (1, 8, 9), seed=seed)
    posterior = MACHINES[kind](bank, k).posterior(x, *level(sigma))
    assert float(posterior.mean.abs().max()) <= 1 + 1e-6
    assert (posterior.source_weight <= 1).all()
    assert (posterior.entropy >= 0).all()


@PROFILE
@given(seeds, noise_levels)
def test_window_over_everything_turns_els_into_ls(seed, sigma):
    bank = make_bank(11, (1, 6, 7), seed=seed)
    x = noisy(bank, *level(sigma), seed=seed)
    for k in (13, 15, 1001):
        els = pyels.ELS(bank, k, "zeros").denoise(x, *level(sigma))
        ls = pyels.LS(bank, k).denoise(x, *level(sigma))
        assert torch.equal(els, ls)
        ideal = pyels.IS(bank).denoise(x, *level(sigma))
        torch.testing.assert_close(ls, ideal, atol=1e-5, rtol=0)


def converge(machine, seed):
    """A sample followed to the limit alpha = 1, sigma -> 0, or None if it does not come to rest.

    Half of the pixels move at a time: all at once, neighbours that depend on each other swing for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    x = pyels.sample(machine, torch.randn((1, 1, 28, 28), generator=generator), steps=30)
    for _ in range(250):
        x0 = machine.denoise(x, 1.0, 1e-3)
        moving = (x0 - x).abs() > 1e-6
        if not moving.any():
            return x
        x = torch.where(moving & (torch.rand(x.shape, generator=generator) < 0.5), x0, x)
    return None


@pytest.mark.parametrize(("kind", "k"), [("LS", 5), ("ELS-zeros", 5), ("ELS-circular", 3), ("ELS-interior", 3)])
def test_theorem_converged_samples_consist_of_closest_patches(fashion, kind, k):
    """Section 4 of the paper: as sigma goes to zero, every pixel of the sample equals the centre of the patch of S(p)
    that is closest to the sample's own window around the pixel."""
    bank = fashion[:20]
    converged = (converge(MACHINES[kind](bank, k), seed) for seed in range(10))
    x = next((x for x in converged if x is not None), None)
    assert x is not None, "no sample converged"
    # The closest patch by the float64 oracle, whose heaviest source is the one with the smallest distance.
    oracle = MACHINES[kind](bank, k, engine="reference").posterior(x, 1.0, 1e-3)
    image, row, column = oracle.source.unbind(-1)
    centres = bank.read(slice(None))[image, 0, row, column]
    assert float((centres - x[:, 0]).abs().max()) < 1e-5
    # And the sample is none of the training images.
    distances = (x[:, None] - bank.read(slice(None))[None]).abs().amax(dim=(2, 3, 4))
    assert float(distances.min()) > 0.5
