"""The cpu engine against the float64 oracle in C++, and that against the one in Python."""

import pytest
import torch
from helpers import ALPHAS, BOUNDS, COSINE, MACHINES, SIGMAS, TIMES, WRAPPING, check, make_bank, noisy

import pyels
from pyels import _core
from pyels.engines import oracle as python


def sizes(kind, shape):
    """Patch sizes that straddle the image, where the boundary allows."""
    if kind in ("IS", "ES"):
        return [1]
    return [k for k in (1, 3, 5, 9, 17, 33) if kind not in WRAPPING or k <= min(shape[1:])]


def posteriors(kind, bank, k, x, alpha, sigma, labels=None):
    return (
        MACHINES[kind](bank, k).posterior(x, alpha, sigma, labels),
        MACHINES[kind](bank, k, engine="reference").posterior(x, alpha, sigma, labels),
    )


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 9, 11), (4, 13, 7)], ids=str)
def test_every_field_matches_oracle_at_all_noise_levels(kind, shape):
    bank = make_bank(17, shape, dtype=torch.float32 if shape[0] == 4 else torch.uint8)
    x = noisy(bank, ALPHAS, SIGMAS, batch=len(TIMES))
    for k in sizes(kind, shape):
        check(*posteriors(kind, bank, k, x, ALPHAS, SIGMAS))


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 15, 16, 17, 33])
def test_every_instruction_set_at_bank_sizes_across_its_lanes(monkeypatch, kind, n):
    bank = make_bank(n, (1, 8, 9))
    x = noisy(bank, ALPHAS, SIGMAS, batch=len(TIMES))
    for k in sizes(kind, (1, 8, 9)):
        oracle = MACHINES[kind](bank, k, engine="reference").posterior(x, ALPHAS, SIGMAS)
        for isa in _core.available_isas():
            monkeypatch.setenv("PYELS_ISA", isa)
            assert _core.isa_in_use() == isa
            check(MACHINES[kind](bank, k).posterior(x, ALPHAS, SIGMAS), oracle)


def test_several_sizes_at_once_are_each_as_alone(small):
    x, sizes = noisy(small, 0.6, 0.8, batch=2), (3, 7, 5)
    machine = pyels.ELS(small)
    means = machine.denoise_over_sizes(x, 0.6, 0.8, sizes)
    posteriors = machine.posterior_over_sizes(x, 0.6, 0.8, sizes)
    assert means.shape == (3, *x.shape)
    for k, mean, posterior in zip(sizes, means, posteriors, strict=True):
        assert torch.equal(mean, machine.denoise(x, 0.6, 0.8, patch_size=k))
        assert torch.equal(posterior.source, machine.posterior(x, 0.6, 0.8, patch_size=k).source)
    for bad in ([], [3, 4]):
        with pytest.raises(ValueError, match=r"sizes is empty|odd"):
            machine.denoise_over_sizes(x, 0.6, 0.8, bad)
    with pytest.raises(ValueError, match="patch_size"):
        pyels.IS(small).posterior_over_sizes(x, 0.6, 0.8, [3])


def test_unknown_instruction_set_is_refused(monkeypatch, small):
    monkeypatch.setenv("PYELS_ISA", "pentium")
    with pytest.raises(ValueError, match="PYELS_ISA is 'pentium'"):
        pyels.IS(small).denoise(noisy(small, 0.6, 0.8), 0.6, 0.8)


@pytest.mark.parametrize("kind", MACHINES)
def test_real_images_batch_of_16_with_mixed_labels(fashion, kind):
    bank = fashion[:60]
    generator = torch.Generator().manual_seed(1)
    labels = bank.labels[torch.randint(60, (16,), generator=generator)]
    times = torch.linspace(0.05, 1, 16).tolist()
    alpha = torch.tensor([COSINE.alpha(t) for t in times])
    sigma = torch.tensor([COSINE.sigma(t) for t in times])
    x = noisy(bank, alpha, sigma, batch=16)
    some = slice(None, None, 4)  # the oracle takes seconds for each
    ours, oracle = posteriors(kind, bank, 7, x[some], alpha[some], sigma[some], labels[some])
    check(ours, oracle)
    assert (bank.labels[ours.source[..., 0]] == labels[some, None, None]).all()
    # Batch composition does not matter, to the last bit.
    together = MACHINES[kind](bank, 7).denoise(x, alpha, sigma, labels)
    for b in range(16):
        alone = MACHINES[kind](bank, 7).denoise(x[b : b + 1], alpha[b], sigma[b], labels[b : b + 1])
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("sigma", [1e-3, 1e3])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_extreme_noise(kind, sigma, alpha):
    bank = make_bank(20, (1, 10, 10))
    x = noisy(bank, alpha, sigma, batch=2)
    for k in (3, 7):
        check(*posteriors(kind, bank, k, x, alpha, sigma))


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("sigma", [0.03, 1e-3, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("size", [1, 1000], ids=["near", "far"])
def test_queries_far_from_every_patch(kind, sigma, size):
    """Log-weights of 1e3 .. 1e24 nats, where float32 has no digit left: the nearest patch by the exact distance."""
    bank = make_bank(30, (3, 9, 10))
    x = size * torch.randn((2, 3, 9, 10), generator=torch.Generator().manual_seed(0))
    for k in (3, 7):
        machine, oracle = MACHINES[kind](bank, k), MACHINES[kind](bank, k, engine="reference")
        ours, expected = machine.posterior(x, 1.0, sigma), oracle.posterior(x, 1.0, sigma)
        assert float((ours.mean - expected.mean).abs().max()) < BOUNDS["mean"]
        assert float((machine.denoise(x, 1.0, sigma) - expected.mean).abs().max()) < BOUNDS["mean"]
        assert float((ours.source_weight - expected.source_weight).abs().max()) < BOUNDS["source_weight"]
        torch.testing.assert_close(ours.log_evidence.double(), expected.log_evidence, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["LS", "ELS-interior", "ELS-zeros"])
@pytest.mark.parametrize(("k", "t", "times"), [(21, 0.5, 0.0), (25, 1.0, 1.4), (33, 0.9, 1.4)])
def test_windows_too_large_for_sums_in_float32(kind, k, t, times):
    """Log-weights of 660, 940 and 1630 nats more or less than expected: sums, and single distances, in double."""
    bank = make_bank(5, (3, 34, 35))
    alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
    x = noisy(bank, alpha, times * sigma)
    ours, oracle = posteriors(kind, bank, k, x, alpha, sigma)
    check(ours, oracle)
    assert float((MACHINES[kind](bank, k).denoise(x, alpha, sigma) - oracle.mean).abs().max()) < BOUNDS["mean"]


@pytest.mark.parametrize("kind", [kind for kind in MACHINES if kind not in ("IS", "ES")])
@pytest.mark.parametrize(
    ("shape", "k"), [((6, 13, 14), 13), ((3, 19, 20), 19), ((2, 24, 23), 23), ((1, 33, 32), 31), ((3, 13, 11), 33)]
)
def test_distances_less_by_what_noise_makes(kind, shape, k):
    """Windows of more than 900 values, around a border too; of queries with no noise, and with more than is said."""
    k = min(k, *shape[1:]) if kind in WRAPPING else k
    if kind == "ELS-circular" and k > 19:
        pytest.skip("the oracle takes a minute")
    bank = make_bank(3, shape)
    for t, times in ((0.1, 1.0), (0.6, 0.0), (0.95, 1.6)):
        alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
        x = noisy(bank, alpha, times * sigma)
        ours, oracle = posteriors(kind, bank, k, x, alpha, sigma)
        check(ours, oracle)
        assert float((MACHINES[kind](bank, k).denoise(x, alpha, sigma) - oracle.mean).abs().max()) < BOUNDS["mean"]


def test_many_equal_patches_far_from_the_query():
    """Equal weights must not err together: two-valued images, thousands of nats away, every displacement a tie."""
    for seed in range(5):
        bank = pyels.PatchBank(torch.where(torch.arange(11) < 5, -1.0, 1.0).view(1, 1, 1, 11))
        x = 10 * torch.randn((1, 1, 1, 11), generator=torch.Generator().manual_seed(seed))
        for nats in (1e3, 1e4, 9.5e4, 1e6):
            sigma = (float(x.square().sum()) / 2 / nats) ** 0.5
            for kind, k in (("ES", 1), ("ELS-circular", 1)):
                ours = MACHINES[kind](bank, k).denoise(x, 0.0, sigma)
                oracle = MACHINES[kind](bank, k, engine="reference").denoise(x, 0.0, sigma)
                assert float((ours - oracle).abs().max()) < BOUNDS["mean"]  # worst seen 1.5e-6


def test_error_is_at_most_twice_that_of_plain_float32_torch(fashion):
    """IS and LS, whose plain evaluation is a few lines, at the lowest noise level."""
    bank, k = fashion[:500], 9
    alpha, sigma = COSINE.alpha(0.05), COSINE.sigma(0.05)
    x = noisy(bank, alpha, sigma, batch=4)
    images = bank.read(slice(None))

    def plain_ls(dtype):
        difference = (x.to(dtype)[:, None] - alpha * images.to(dtype)[None]).square()  # (B, N, 1, H, W)
        kernel = torch.ones(1, 1, k, k, dtype=dtype)
        distance = torch.nn.functional.conv2d(difference.flatten(0, 1), kernel, padding=k // 2).unflatten(0, (4, 500))
        return (torch.softmax(-distance / (2 * sigma**2), dim=1) * images.to(dtype)).sum(dim=1)

    def plain_is(dtype):
        difference = (x.to(dtype)[:, None] - alpha * images.to(dtype)[None]).square().sum(dim=(2, 3, 4))
        return torch.einsum("bn,nchw->bchw", torch.softmax(-difference / (2 * sigma**2), dim=1), images.to(dtype))

    for machine, plain in ((pyels.LS(bank, k), plain_ls), (pyels.IS(bank), plain_is)):
        exact = plain(torch.float64)
        ours = float((machine.denoise(x, alpha, sigma) - exact).abs().max())
        theirs = float((plain(torch.float32) - exact).abs().max())
        assert ours <= 2 * theirs + 2e-7  # seen: LS 3e-6 against 6e-6, IS 2e-8 against 2e-8


def test_long_sums_keep_their_digits():
    """2.6 million patches that weigh alike: the mean is the bank's."""
    images = (torch.rand(10_000, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    bank = pyels.PatchBank(images)
    mean = pyels.ELS(bank, 3, "circular").denoise(torch.zeros(1, 1, 16, 16), 1.0, 1e3)
    expected = bank.read(slice(None)).double().mean()
    assert float((mean - expected).abs().max()) < 2e-6  # worst seen 3e-7


@pytest.mark.parametrize("kind", MACHINES)
def test_oracle_in_cpp_matches_oracle_in_python(kind):
    bank = make_bank(6, (2, 7, 6), labels=[0, 0, 0, 1, 1, 1])
    labels = torch.tensor([1, 0])
    x = noisy(bank, 0.6, 0.8, batch=2)
    for k in sizes(kind, (2, 7, 6)):
        machine = MACHINES[kind](bank, k, engine="reference")
        cpp = machine.posterior(x, 0.6, 0.8, labels)
        slow = python.posterior(machine.definition, bank, x, 0.6, 0.8, labels)
        for field in ("mean", "log_evidence", "entropy", "source_weight"):
            assert float((getattr(cpp, field) - getattr(slow, field)).abs().max()) < 1e-11  # worst seen 1e-13
        assert torch.equal(cpp.source, slow.source)


@pytest.mark.parametrize("kind", [kind for kind in MACHINES if kind != "ES"])
def test_ties_go_to_the_first(kind):
    """Identical images, each the same everywhere: all weights are equal.

    Not so for ES, where every displacement sums the same squares in another order, and rounding decides.
    """
    bank = pyels.PatchBank(torch.full((40, 1, 6, 7), 90, dtype=torch.uint8), labels=[1] * 20 + [0] * 20)
    labels = torch.tensor([0, 1])
    x = noisy(bank, 0.6, 0.8, batch=2)
    cpu, oracle = posteriors(kind, bank, 3, x, 0.6, 0.8, labels)
    slow = python.posterior(MACHINES[kind](bank, 3).definition, bank, x, 0.6, 0.8, labels)
    assert torch.equal(cpu.source, oracle.source)
    assert torch.equal(cpu.source, slow.source)
    assert set(cpu.source[0, ..., 0].flatten().tolist()) == {20}
    assert set(cpu.source[1, ..., 0].flatten().tolist()) == {0}


@pytest.mark.parametrize("kind", MACHINES)
def test_of_equal_images_the_first_is_the_source(kind):
    """Whatever stands beside it: 40 images of which i and i + 20 are equal."""
    half = make_bank(20, (1, 8, 9)).images
    bank = pyels.PatchBank(torch.cat([half, half]))
    for seed in range(20):
        sigma = 0.05 * 1.2**seed
        x = noisy(bank, 0.6, sigma, batch=2, seed=seed)
        assert int(MACHINES[kind](bank, 5).posterior(x, 0.6, sigma).source[..., 0].max()) < 20


def test_reference_engine_keeps_float64(small):
    machine = pyels.ELS(small, 3, engine="reference")
    x = noisy(small, 0.6, 0.8)
    assert machine.denoise(x, 0.6, 0.8).dtype == torch.float64
    assert machine.eps(x, 0.6, 0.8).dtype == torch.float64
    assert pyels.sample(machine, x, steps=2).dtype == torch.float32


def test_operator_passes_torch_opcheck(small, monkeypatch):
    from pyels.engines import operator

    partial_posterior = operator.partial_posterior
    machine = pyels.ELS(small, 3, threads=2)
    query = machine.query(noisy(small, 0.6, 0.8, batch=2), 0.6, 0.8, torch.tensor([1, 0]))
    for want in (pyels.Want.MEAN, pyels.Want.POSTERIOR):
        with monkeypatch.context() as patch:
            given = []
            patch.setattr(operator, "partial_posterior", lambda *a: given.append(a) or partial_posterior(*a))  # noqa: B023
            machine.partial(query, want)
        torch.library.opcheck(partial_posterior, given[0])


def test_eps_score_and_x0_are_consistent(small):
    machine = pyels.ELS(small, 3)
    alpha, sigma = torch.tensor([0.6, 0.9]), torch.tensor([0.8, 0.3])
    x = noisy(small, alpha, sigma, batch=2)
    x0, eps, score = machine.denoise(x, alpha, sigma), machine.eps(x, alpha, sigma), machine.score(x, alpha, sigma)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    torch.testing.assert_close(a * x0 + s * eps, x)
    torch.testing.assert_close(score, (a * x0 - x) / s**2)


@pytest.mark.parametrize("engine", ["cpu", "sampled"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", MACHINES)
def test_levels_beyond_float32_are_computed_in_double(name, dtype, engine):
    """Worst seen of 5,000 cases with alpha / sigma up to 1e9, but for exact ties: mean 4e-7, log-evidence 1.2e-5."""
    bank = make_bank(9, (2, 7, 8), dtype=dtype)
    machine, oracle = (MACHINES[name](bank, 3, engine=one) for one in ("cpu", "reference"))
    if engine == "sampled":  # none of these is searched for: no index is needed
        machine = MACHINES[name](bank, 3, engine=engine)
    generator = torch.Generator().manual_seed(0)
    for alpha, sigma, off in [
        (1, 9e-4, 1),
        (1, 1e-5, 1),
        (3e4, 1.0, 1),
        (1e5, 1e-9, 1),
        (1, 1e-6, 1e3),
        (10, 1e-6, 1e6),
    ]:
        noise = torch.randn((2, *bank.shape), generator=generator)
        x = (alpha * bank.read(slice(0, 2)).double() + sigma * off * noise).float()
        check(machine.posterior(x, alpha, sigma), oracle.posterior(x, alpha, sigma))
        assert torch.equal(machine.denoise(x, alpha, sigma)[1:], machine.denoise(x[1:], alpha, sigma))


@pytest.mark.needs(package="faiss")
def test_of_a_batch_the_sampled_engine_leaves_those_beyond_float32_to_the_exact_one(tmp_path):
    bank = make_bank(30, (1, 9, 8))
    sampled, cpu = pyels.ELS(bank, 3, engine="sampled", index=tmp_path), pyels.ELS(bank, 3)
    levels = torch.tensor([1e-5, 0.8, 1e-5]).double()
    x = noisy(bank, 1.0, levels, batch=3)
    together, exact = sampled.posterior(x, 1.0, levels), cpu.posterior(x, 1.0, levels)
    for b in range(3):
        alone = sampled.posterior(x[b : b + 1], 1.0, float(levels[b]))
        for ours, single in zip(together.tensors(), alone.tensors(), strict=True):
            assert torch.equal(ours[b], single[0])
    assert torch.equal(together.mean[::2], exact.mean[::2])
    assert together.certified[::2].all()
