import json
import math

import pytest
import torch
from helpers import make_bank, run_program

import pyels
from pyels.sampling import noise_levels
from pyels.schedules import make_schedule
from pyels.studies import plots, rules
from pyels.studies.resumable import noise_of_seed


def silent(step):
    """Nobody looks."""


def test_the_value_that_counts():
    shares = torch.tensor([[0.99, 0.85, 0.7, 0.3], [0.95, 0.94, 0.93, 0.92], [0.5, 0.4, 0.3, 0.2]])
    assert rules.chosen("entropy", shares, 0.8).tolist() == [2, 3, 0]
    assert rules.chosen("entropy", shares.flip(1), 0.8).tolist() == [1, 0, 3]  # of thresholds the least is the widest
    assert rules.chosen("sure", torch.tensor([[-0.1, -0.3, 0.2]])).tolist() == [1]


def test_entropy_is_that_of_the_posteriors_along_the_way():
    bank = make_bank(20, (1, 8, 8), labels=[0, 1] * 10)
    machine, label, sizes, steps = pyels.ELS(bank), torch.tensor([1]), [3, 5, 7], 4
    score = rules.scores("entropy", machine, 3, label, sizes, steps, "cosine", silent)
    assert score.shape == (4, 3)
    own = [sizes[i] for i in rules.chosen("entropy", score).tolist()]
    seen = []
    pyels.sample(machine, noise_of_seed(3, bank.shape)[None], steps, "cosine", own, label, callback=seen.append)
    for row, step in zip(score, reversed(seen), strict=True):
        for k, share in zip(sizes, row.tolist(), strict=True):
            post = machine.posterior(step.x, step.level.alpha, step.level.sigma, label, k)
            most = math.log(10) + _positions(k, 8).log().mean()
            assert share == pytest.approx(float(post.entropy.double().mean() / most), rel=1e-4)
    assert (score[-1] > 0.99).all()  # noise alone says nothing


def test_entropy_is_that_of_the_windows_that_there_are():
    """Windows of PSPC lie wholly inside: at 7 on 8 x 8 there are four."""
    bank = make_bank(10, (1, 8, 8))
    machine, levels = pyels.PSPC(bank), noise_levels(1, make_schedule("cosine"))
    (share,) = rules.scores("entropy", machine, 3, None, [7], 1, "cosine", silent)[0].tolist()
    x = noise_of_seed(3, bank.shape)[None]
    entropy = machine.posterior(x, levels[0].alpha, levels[0].sigma, patch_size=7).entropy[0, 3:5, 3:5]
    assert share == pytest.approx(float(entropy.mean()) / math.log(20), rel=1e-5)


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_value_of_a_colour_has_its_threshold(rule):
    bank = make_bank(15, (3, 6, 6))
    score = rules.scores(rule, pyels.PCALocality(bank), 3, None, [0.01, 0.5], 2, "cosine", silent)
    assert score.shape == (2, 2)
    assert torch.isfinite(score).all()
    assert rule != "entropy" or float(score[0, 0]) < float(score[0, 1])  # the wider windows tell more


def _positions(k, side):
    """Of ELS with boundary zeros: the number of windows that overhang as that of each pixel does, (side, side)."""
    r = k // 2
    overhangs = [(max(0, r - p), max(0, p + r - side + 1)) for p in range(side)]
    along = torch.tensor([overhangs.count(one) for one in overhangs], dtype=torch.float64)
    return along[:, None] * along[None, :]


def test_validation_leaves_the_image_out():
    bank = make_bank(12, (1, 8, 8))
    machine = pyels.LS(bank)
    score = rules.scores("validation", machine, 3, None, [3, 7], 3, "cosine", silent)
    image = int(torch.randint(12, (1,), generator=torch.Generator().manual_seed(3)))
    x0, others = bank.read(slice(image, image + 1)), [i for i in range(12) if i != image]
    rest = pyels.PatchBank(bank.images[others])
    for row, level in zip(score, reversed(noise_levels(3, make_schedule("cosine"))), strict=True):
        x = level.alpha * x0 + level.sigma * noise_of_seed(3, bank.shape)[None]
        for k, error in zip((3, 7), row.tolist(), strict=True):
            found = pyels.LS(rest, k).denoise(x, level.alpha, level.sigma)
            assert error == pytest.approx(float((found - x0).square().mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["els", "gaussian", "pca"])
def test_sure_is_the_error_in_the_mean_over_noise(name):
    """Stein's estimate is unbiased: its mean over noise is that of the error itself, within four standard errors."""
    bank = make_bank(30, (1, 6, 6), dtype=torch.float32)
    machines = {
        "els": (lambda: pyels.ELS(bank), 3),
        "gaussian": (lambda: pyels.LS(bank, window=pyels.Gaussian(1.0)), 0.7),
        "pca": (lambda: pyels.PCALocality(bank), 0.1),
    }
    make, value = machines[name]
    machine, found = make(), {"sure": [], "validation": []}
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: image)
        patch.setattr(rules, "noise_levels", lambda *_: noise_levels([0.5], make_schedule("cosine")))
        patch.setattr(rules, "noise_of_seed", lambda seed, shape: torch.randn(shape, generator=generator))
        for rule, values in found.items():
            generator.manual_seed(0)
            for _ in range(200):
                values.append(rules.scores(rule, machine, 0, None, [value], 1, "cosine", silent)[0, 0])
    sure, error = (torch.stack(values) for values in found.values())
    difference = sure - error
    most = 4 * float(difference.std()) / math.sqrt(200)
    assert abs(float(difference.mean())) < most < float(error.mean()) / 2


@pytest.mark.parametrize("rule", rules.RULES)
def test_calibrate_command(rule, tmp_path, capsys):
    make_bank(30, (1, 8, 8), labels=[0, 1] * 15).save(tmp_path / "bank.npz")
    out = tmp_path / "sizes"
    options = ("--dataset", tmp_path / "bank.npz", "--rule", rule, "--sizes", "3,5,7", "--steps", 3, "--num", 4)
    assert run_program("calibrate", *options, "--labels", "0,1", "--out", out, "--json") == 0
    scales = json.loads((out / "scales.json").read_text())
    assert scales == json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in out.iterdir()) == [
        "calibration.png",
        "calibration.safetensors",
        "run.json",
        "scales.json",
    ]
    machine = pyels.ELS(pyels.datasets.load(tmp_path / "bank.npz"))
    each = [
        rules.scores(rule, machine, seed, torch.tensor([seed % 2]), [3, 5, 7], 3, "cosine", silent)
        for seed in scales["seeds"]
    ]
    torch.testing.assert_close(torch.stack(each).mean(0), torch.tensor(scales["score"]).double(), atol=1e-6, rtol=1e-6)
    sample = ("--dataset", tmp_path / "bank.npz", "--num", 1, "--patch-sizes", out, "--out", tmp_path / "s")
    assert run_program("sample", *sample) == 0


def test_calibrations_are_drawn_beside_each_other(tmp_path, capsys, monkeypatch):
    make_bank(30, (1, 8, 8)).save(tmp_path / "bank.npz")
    options = ("--dataset", tmp_path / "bank.npz", "--sizes", "3,5", "--num", 2)
    drawn, draw = [], plots.draw_calibration
    monkeypatch.setattr(plots, "draw_calibration", lambda *given: [drawn.append(given[-1]), draw(*given)])
    others = []
    for rule in rules.RULES:
        named = ("--rule", rule, "--steps", 3, "--out", tmp_path / rule)
        assert run_program("calibrate", *options, *named, *others) == 0
        others += ["--beside", tmp_path / rule]
    found = {rule: json.loads((tmp_path / rule / "scales.json").read_text())["patch_sizes"] for rule in rules.RULES}
    assert drawn[0] == {}
    assert drawn[-1] == {f"{rule} ({tmp_path / rule})": found[rule] for rule in rules.RULES[:2]}
    for more, message in (
        (("--steps", 2), "has a patch_size for each of 3 steps, but here are a patch_size and 2 steps"),
        (("--steps", 3, "--machine", "pca", "--sizes", ".1"), "3 steps, but here are a threshold and 3 steps"),
        (("--steps", 3, "--beside", tmp_path / "nowhere"), "nowhere"),
    ):
        arguments = (*options, *others[:2], "--rule", "sure", *more, "--out", tmp_path / "o")
        assert run_program("calibrate", *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--network is needed, or one of --rule entropy, validation, sure"),
        (("--rule", "sure"), "--dataset is needed"),
        (("--rule", "entropy", "--share", 0, "--dataset", "fashion-mnist-6000"), "--share must be in (0, 1]"),
        (("--rule", "sure", "--machine", "golden", "--dataset", "fashion-mnist-6000"), "golden has none"),
        (("--rule", "sure", "--machine", "pspc", "--dataset", "fashion-mnist-6000"), "which the fold of pspc mixes"),
        (("--rule", "sure", "--share", 0.7, "--dataset", "fashion-mnist-6000"), "--share 0.7 is for --rule entropy"),
        (("--rule", "sure", "--clip", "--dataset", "fashion-mnist-6000"), "--clip and --device are for --network"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    assert run_program("calibrate", *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
