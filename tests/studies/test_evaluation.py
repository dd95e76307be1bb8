import json

import numpy as np
import pytest
import torch
from helpers import make_bank, run_program

import pyels
from pyels.files import read_tensors
from pyels.sampling import Level
from pyels.studies import evaluation
from pyels.studies.resumable import noise_of_seed


class Silent:
    def step(self, step):
        """Nobody looks."""

    skip = step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An npz file with both splits; the bank holds two of the held-out images."""
    folder = tmp_path_factory.mktemp("data")
    train, test = make_bank(40, (1, 12, 12), labels=[0, 1] * 20), make_bank(8, (1, 12, 12), labels=[0, 1] * 4, seed=1)
    images = test.images.clone()
    images[[2, 5]] = train.images[[4, 9]]
    of_both = {"train_images": train.images, "train_labels": [0, 1] * 20, "test_images": images}
    np.savez(folder / "data.npz", **of_both, test_labels=[0, 1] * 4)
    return folder / "data.npz"


def arguments(data, out, *more):
    options = ("--machines", "els,is", "--patch-sizes", "3,3,5,7", "--levels", 3, "--num", 6, "--seed", 5)
    return ("evaluate", "--dataset", data, *options, "--out", out, *more)


def test_errors_are_those_of_denoise(tmp_path):
    bank, images = make_bank(20, (1, 8, 8)), make_bank(3, (1, 8, 8), seed=1)
    levels = [Level(1.0, 0.5, 0.9, {"patch_size": 5}), Level(0.5, 0.9, 0.4, {"patch_size": 3})]
    blind = pyels.NetworkDenoiser(lambda x: 0 * x, "x0", schedule=0.4 / 0.9)  # for the second level alone
    plain = [Level(one.t, one.alpha, one.sigma) for one in levels]
    contenders = {"els": (pyels.ELS(bank), levels), "wiener": (pyels.Wiener(bank), plain), "zero": (blind, plain)}
    errors = evaluation.evaluate(contenders, images, None, [4, 5, 6], tmp_path, {}, Silent())
    assert errors.shape == (3, 2, 3)
    x0 = images.read(slice(None))
    for i in range(3):
        for j, level in enumerate(levels):
            x = level.alpha * x0[i : i + 1] + level.sigma * noise_of_seed(4 + i, bank.shape)
            own = pyels.ELS(bank).denoise(x, level.alpha, level.sigma, patch_size=level.patch_size) - x0[i : i + 1]
            assert float(errors[i, j, 0]) == pytest.approx(float(own.square().mean()), rel=1e-5)
    assert torch.isnan(errors[:, 0, 2]).all()
    torch.testing.assert_close(errors[:, 1, 2], x0.double().square().mean((1, 2, 3)))
    rows = evaluation.report(errors, list(contenders), levels)
    assert rows[0]["ratio"]["zero"] is rows[0]["interval_95"]["zero"] is rows[0]["error"]["zero"] is None
    assert rows[1]["ratio"]["wiener"] == 1
    assert rows[1]["interval_95"]["wiener"] == [1, 1]
    low, high = rows[1]["interval_95"]["els"]
    assert low <= rows[1]["ratio"]["els"] == float(errors[:, 1, 0].mean() / errors[:, 1, 1].mean()) <= high
    assert low < high


def test_intervals_of_a_ratio_cover_it():
    """Errors that go together: the interval is of pairs, and much narrower than of each by itself."""
    generator = torch.Generator().manual_seed(0)
    missed, widths = 0, []
    for _ in range(100):
        common = torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
        own = common * (1.2 + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64))
        rows = evaluation.report(torch.stack([own, common], 1)[:, None], ["is", "wiener"], [Level(1.0, 0.0, 1.0)])
        low, high = rows[0]["interval_95"]["is"]
        missed += not low <= 1.2 <= high
        widths.append(high - low)
    assert 1 <= missed <= 14
    assert max(widths) < 0.12


def test_evaluate_command(data, tmp_path, capsys):
    out = tmp_path / "held out"
    assert run_program(*arguments(data, out, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.png",
        "evaluation.safetensors",
        "report.json",
        "run.json",
    ]
    assert (report["of"], report["held_by_bank"]) == ("pixels", [2, 5])
    assert [row["t"] for row in report["levels"]] == [1.0, 0.5, 0.25]  # of 4 steps
    assert list(report["levels"][0]["ratio"]) == ["els", "is", "wiener"]
    errors = read_tensors(out / "evaluation.safetensors")["errors"]
    assert errors.shape == (6, 3, 3)
    assert float(errors[[2, 5], 2, 1].max()) < 1e-6 < float(errors[[0, 1, 3, 4], 2, 1].min())  # IS remembers
    assert run_program(*arguments(data, out)) == 0
    said = capsys.readouterr().out
    assert "the bank holds 2 of the 6 images, which are no test: 2, 5" in said
    assert "IS is worse than the linear filter" in said or "ELS" in said


def test_a_network_is_told_the_classes(data, tmp_path, capsys):
    net = tmp_path / "net"
    options = ("--width", 4, "--depth", 1, "--steps", 5, "--batch-size", 4, "--out", net)
    assert run_program("train", "--dataset", data, *options) == 0
    capsys.readouterr()
    held_out = ("--network", net, "--held-out", data, "--json")
    assert run_program(*arguments(data, tmp_path / "out", *held_out)) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["levels"][0]["ratio"]) == ["network", "els", "is", "wiener"]
    assert report["held_by_bank"] == [0, 1, 2, 3, 4, 5]  # the training images themselves, as was asked for
    assert json.loads((tmp_path / "out" / "run.json").read_text())["labels"] == [0, 1] * 3
    assert run_program(*arguments(data, tmp_path / "machines", "--held-out", data)) == 0  # which are told none
    beside, alone = (read_tensors(tmp_path / one / "evaluation.safetensors")["errors"] for one in ("out", "machines"))
    torch.testing.assert_close(beside[..., 1:], alone, rtol=1e-6, atol=0)
    assert run_program(*arguments(data, tmp_path / "machines", "--held-out", data, "--schedule", "flow")) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--held-out", "no-such-file"), "no-such-file"),
        (("--split", "test"), "--held-out is needed where the bank is a test split itself"),
        (("--levels", 0), "--levels must be at least 1"),
        (("--num", 0), "num must be at least 1"),
        (("--patch-sizes", "3,4"), "patch_size must be"),
        (("--machines", "els,nothing"), "--machines must be of"),
    ],
    ids=str,
)
def test_bad_options_are_one_line_and_leave_nothing(data, tmp_path, capsys, more, message):
    assert run_program(*arguments(data, tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "out").exists()


def test_a_bank_without_a_test_split_needs_images(tmp_path, capsys):
    assert run_program(*arguments("fashion-mnist-6000", tmp_path / "out")) == 2
    assert "--held-out is needed, images that the bank does not hold" in capsys.readouterr().err
