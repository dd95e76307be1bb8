"""What definitions beyond the paper's say: mirror images, responses, precision, folds, and the second pass."""

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

import pyels
from pyels.engines.oracle import Oracle

LEVELS = 0.8, 0.6
DEFINITIONS = {
    "els": pyels.Definition(pyels.Square(3)),
    "circular": pyels.Definition(pyels.Square(3), "circular"),
    "mirror": pyels.Definition(pyels.Square(3), "interior", mirror=True),
    "gaussian": pyels.Definition(pyels.Gaussian(0.8, 3)),
    "fold": pyels.Definition(pyels.Square(3), fold=pyels.Fold(0.5)),
    "inside": pyels.Definition(pyels.Square(3, inside=True), "same_position", fold="uniform", mirror=True),
    "is": pyels.Definition(pyels.WholeImage(), "same_position"),
    "es": pyels.Definition(pyels.WholeImage(), "circular", mirror=True),
}
ENGINES = {"cpu": 1e-4, "reference": 1e-9}


@pytest.fixture(scope="module")
def bank():
    return make_bank(9, (2, 5, 6), labels=[0, 1, 1, 0, 1, 2, 1, 0, 1])


@pytest.fixture(scope="module")
def x(bank):
    return noisy(bank, *LEVELS, batch=2)


def everything(machine, x, labels=None):
    """All that a machine can be asked, but for the heaviest sources."""
    leaf = x.clone().requires_grad_()
    mean = machine.denoise(leaf, *LEVELS, labels)
    told = {"mean": mean.detach(), "influence": machine.influence(x, *LEVELS, labels)}
    if machine.definition.fold is None:
        told["variance"] = machine.posterior(x, *LEVELS, labels).variance
        (mean * torch.linspace(-1, 1, mean.numel()).reshape(mean.shape)).sum().backward()
        told["derivative"] = leaf.grad
    return told


def assert_same(told, expected, bound):
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max())) if name == "derivative" else 1.0
        assert float((told[name] - value).abs().max()) < bound * scale, name


@pytest.mark.parametrize("name", DEFINITIONS)
def test_engines_agree(bank, x, name):
    for labels in (None, torch.tensor([1, 0])):
        ours, slow = (everything(pyels.Machine(bank, DEFINITIONS[name], engine), x, labels) for engine in ENGINES)
        assert_same(ours, slow, 1e-4)


@pytest.mark.parametrize(
    ("sources", "shape", "k"),
    [("zeros", (3, 19, 20), 19), ("same_position", (3, 11, 12), 19), ("circular", (19, 7, 8), 7)],
)
def test_engines_agree_on_windows_of_many_values(sources, shape, k):
    bank, definition = make_bank(3, shape), pyels.Definition(pyels.Square(k), sources)
    for times in (0, 2):  # as much noise as is said
        x = noisy(bank, LEVELS[0], times * LEVELS[1])
        ours, slow = (everything(pyels.Machine(bank, definition, engine), x) for engine in ENGINES)
        assert_same(ours, slow, 1e-4)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_reference_agrees_with_the_oracle(bank, x, name):
    labels = torch.tensor([1, 0])
    for responses, precision in ((None, None), (make_bank(9, (2, 5, 6), seed=5), torch.rand(2, 1, 5, 6) + 0.5)):
        machine = pyels.Machine(bank, DEFINITIONS[name], "reference", responses=responses)
        oracle = Oracle(machine.definition, bank, x, *LEVELS, labels, precision)
        posterior = machine.posterior(x, *LEVELS, labels, precision=precision)
        slow, second = oracle.posterior(), oracle.second(torch.linspace(-1, 1, x.numel()).reshape(x.shape))
        for field in ("mean", "log_evidence", "entropy", "source_weight"):
            torch.testing.assert_close(getattr(posterior, field), getattr(slow, field), atol=1e-10, rtol=1e-10)
        assert torch.equal(posterior.source, slow.source)
        influence = machine.influence(x, *LEVELS, labels, precision=precision)
        torch.testing.assert_close(influence, torch.from_numpy(second.influence), atol=1e-10, rtol=0)
        if machine.definition.fold is None:
            torch.testing.assert_close(posterior.variance, torch.from_numpy(second.variance), atol=1e-10, rtol=0)
            leaf = x.clone().requires_grad_()
            mean = machine.denoise(leaf, *LEVELS, labels, precision=precision)
            (mean * torch.linspace(-1, 1, mean.numel()).reshape(mean.shape)).sum().backward()
            torch.testing.assert_close(leaf.grad.double(), torch.from_numpy(second.derivative), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.02, 0.005, 0.002])
@pytest.mark.parametrize("name", [name for name, definition in DEFINITIONS.items() if definition.fold is None])
def test_derivatives_keep_their_digits_at_little_noise(bank, name, sigma):
    """Of images that are about as alike as the noise is large; worst error seen 5e-6."""
    alpha, generator = (1 - sigma**2) ** 0.5, torch.Generator().manual_seed(3)
    for apart in (0.3, 1.0, 3.0):
        noise = torch.randn((11, 2, 5, 6), generator=generator)
        images = 0.5 * bank.read(slice(0, 1)) + apart * sigma * noise[:9]
        near = pyels.PatchBank(torch.cat([images.clamp(-0.9, 0.9), torch.ones(1, 2, 5, 6)]))
        x = (alpha * near.read(slice(0, 2)) + sigma * noise[9:]).requires_grad_()
        cotangent = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        exact = Oracle(DEFINITIONS[name], near, x.detach(), alpha, sigma, None, None).second(cotangent).derivative
        (pyels.Machine(near, DEFINITIONS[name], "cpu").denoise(x, alpha, sigma) * cotangent).sum().backward()
        error = (x.grad.double() - torch.from_numpy(exact)).abs().max()
        assert float(error) < 1e-4 * max(1e-6, np.abs(exact).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_streamed_bank_and_any_number_of_threads_give_the_same(bank, x, name, engine, tmp_path):
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * bank[:1].nbytes)
    whole = everything(pyels.Machine(bank, DEFINITIONS[name], engine), x)
    assert_same(everything(pyels.Machine(streamed, DEFINITIONS[name], engine), x), whole, 2e-6)
    if engine == "cpu":
        for key, value in everything(pyels.Machine(bank, DEFINITIONS[name], engine, threads=3), x).items():
            assert torch.equal(value, whole[key]), key
        alone = everything(pyels.Machine(bank, DEFINITIONS[name], engine), x[1:])
        assert torch.equal(alone["mean"], whole["mean"][1:])
        assert torch.equal(alone["influence"], whole["influence"][1:])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_all_weights_sum_to_one(bank, x, name, engine):
    machine = pyels.Machine(bank, DEFINITIONS[name], engine)
    influence = machine.influence(x, *LEVELS)
    assert influence.shape == (2, len(bank))
    torch.testing.assert_close(influence.sum(1), torch.ones(2, dtype=influence.dtype), atol=1e-5, rtol=0)
    every = 2 * len(bank) * 30
    heaviest = machine.sources(x, *LEVELS, top=every)
    some = torch.zeros(2, 5, 6, dtype=torch.bool)
    some[:, 1:-1, 1:-1] = True
    weight = heaviest.weight.sum(-1)
    has_window = some if name == "inside" else torch.ones_like(some)
    torch.testing.assert_close(weight, has_window.to(weight.dtype), atol=1e-5, rtol=0)
    assert (heaviest.weight.diff(dim=-1) <= 0).all()
    # Image by image they are the influence, and what is not there is no source.
    assert ((heaviest.image >= 0) | (heaviest.weight == 0)).all()
    shares = torch.zeros(2, len(bank), dtype=weight.dtype)
    shares.scatter_add_(1, heaviest.image.clamp(min=0).flatten(1), heaviest.weight.flatten(1))
    torch.testing.assert_close(shares / has_window[0].sum(), influence, atol=1e-5, rtol=0)


def test_heaviest_sources_make_the_mean(bank, x):
    machine = pyels.Machine(bank, DEFINITIONS["mirror"])
    pixels = [[0, 0], [4, 5], [2, 3]]
    heaviest = machine.sources(x, *LEVELS, top=2 * len(bank) * 30, pixels=pixels)
    assert heaviest.image.shape == (2, 3, 2 * len(bank) * 30)
    images = bank.read(slice(None)).double()
    centres = images[heaviest.image.clamp(min=0), :, heaviest.row.clamp(min=0), heaviest.column.clamp(min=0)]
    mean = (heaviest.weight[..., None] * centres).sum(2)
    rows, columns = torch.tensor(pixels).T
    expected = machine.denoise(x, *LEVELS)[:, :, rows, columns]
    torch.testing.assert_close(mean.transpose(1, 2).float(), expected, atol=1e-5, rtol=0)
    posterior = machine.posterior(x, *LEVELS)
    top = torch.stack([heaviest.image, heaviest.row, heaviest.column], -1)[:, :, 0]
    assert torch.equal(posterior.source[:, rows, columns], top)


def test_mirror_images_are_as_if_they_were_in_the_bank(bank, x):
    images = bank.images
    both = pyels.PatchBank(torch.cat([images, images.flip(-1)]))
    for window, sources in ((pyels.Square(3), "zeros"), (pyels.WholeImage(), "same_position")):
        ours = pyels.Machine(bank, pyels.Definition(window, sources, mirror=True)).posterior(x, *LEVELS)
        expected = pyels.Machine(both, pyels.Definition(window, sources)).posterior(x, *LEVELS)
        for field in ("mean", "log_evidence", "entropy", "source_weight"):
            torch.testing.assert_close(getattr(ours, field), getattr(expected, field), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_image_left_out_is_a_bank_without_it(bank, x, engine):
    machine = pyels.ELS(bank, 3, engine=engine)
    rest = pyels.ELS(pyels.PatchBank(bank.images[1:]), 3, engine=engine)
    left = bank.select(without=[0])
    torch.testing.assert_close(machine.denoise(x, *LEVELS, selection=left), rest.denoise(x, *LEVELS), atol=1e-6, rtol=0)
    influence = machine.influence(x, *LEVELS, selection=left)
    assert (influence[:, 0] == 0).all()
    torch.testing.assert_close(influence[:, 1:], rest.influence(x, *LEVELS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_responses_answer_in_place_of_the_images(bank, x, engine):
    others = pyels.PatchBank(torch.rand(9, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    machine = pyels.Machine(bank, DEFINITIONS["els"], engine, responses=others)
    mean = machine.denoise(x, *LEVELS)
    assert mean.shape == (2, 3, 5, 6)
    heaviest = pyels.Machine(bank, DEFINITIONS["els"], "reference").sources(x, *LEVELS, top=9 * 30)
    answers = others.images[heaviest.image.clamp(min=0), :, heaviest.row.clamp(min=0), heaviest.column.clamp(min=0)]
    expected = (heaviest.weight[..., None] * answers).sum(3).permute(0, 3, 1, 2)
    torch.testing.assert_close(mean.double(), expected, atol=1e-5, rtol=0)
    assert machine.posterior(x, *LEVELS).variance.shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match="imply neither noise nor score"):
        machine.eps(x, *LEVELS)
    for wrong in (others[:8], make_bank(9, (1, 5, 5))):
        with pytest.raises(ValueError, match="one for each of the bank"):
            pyels.Machine(bank, DEFINITIONS["els"], engine, responses=wrong)


def test_precision_says_what_is_known_of_a_query(bank, x):
    """Unknown values may be anything, and known ones count as often as is said."""
    known = (torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    for engine in ENGINES:
        for name in ("els", "circular", "is", "gaussian"):
            machine = pyels.Machine(bank, DEFINITIONS[name], engine)
            mean = machine.denoise(x, *LEVELS, precision=known)
            other = torch.where(known > 0, x, torch.randn(x.shape))
            assert torch.equal(machine.denoise(other, *LEVELS, precision=known), mean)
            finer = machine.denoise(x, LEVELS[0], LEVELS[1] / 2)
            assert_same({"mean": machine.denoise(x, *LEVELS, precision=torch.tensor(4.0))}, {"mean": finer}, 1e-5)
            leaf = x.clone().requires_grad_()
            machine.denoise(leaf, *LEVELS, precision=known).sum().backward()
            assert (leaf.grad[:, :, known[0, 0] == 0] == 0).all()
            assert (leaf.grad != 0).any()
    for wrong, error in (
        (-known, ValueError),
        (known / 0, ValueError),
        ("all", TypeError),
        (torch.ones(7), ValueError),
    ):
        with pytest.raises(error, match="precision must"):
            machine.denoise(x, *LEVELS, precision=wrong)
    with pytest.raises(ValueError, match=r"engine 'sampled' takes no precision"):
        pyels.ELS(bank, 3, engine="sampled").denoise(x, *LEVELS, precision=known)


def test_what_cannot_be_asked_is_refused_in_words(bank, x):
    folded = pyels.Machine(bank, DEFINITIONS["fold"])
    with pytest.raises(ValueError, match="a fold has many"):
        _ = folded.posterior(x, *LEVELS).variance
    with pytest.raises(RuntimeError, match="a derivative was asked for"):
        folded.denoise(x.clone().requires_grad_(), *LEVELS).sum().backward()
    machine = pyels.ELS(bank, 3)
    for pixels, error in (
        ([[5, 0]], ValueError),
        ([[0, -1]], ValueError),
        ([1, 2], TypeError),
        ([[0.5, 1]], TypeError),
    ):
        with pytest.raises(error, match="pixels must"):
            machine.sources(x, *LEVELS, pixels=pixels)
    for top, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="top must"):
            machine.sources(x, *LEVELS, top=top)
    with pytest.raises(ValueError, match="no window of 7 x 7 pixels lies inside"):
        pyels.Machine(bank, pyels.Definition(pyels.Square(7, inside=True), "same_position", fold="uniform"))
    with pytest.raises(ValueError, match="no window answers for pixel"):
        pyels.Machine(
            bank, pyels.Definition(pyels.Square(3), "same_position", fold=pyels.Fold(taps=[1, 0, 0]))
        ).denoise(x, *LEVELS)
