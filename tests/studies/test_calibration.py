"""Calibration by all images and by a share of them; its command is tested beside the comparisons."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import make_bank, run_program
from torch.nn.functional import interpolate

import pyels
from pyels.adapters import NetworkDenoiser, from_pyels
from pyels.files import read_tensors
from pyels.sampling import Level
from pyels.studies.calibration import calibrate, centre_gradient, fitting, share

SIZES, STEPS, SIDE = (3, 5, 7, 9), 4, 12


# ---- by all images


def test_calibration_finds_the_size_of_a_machine_in_disguise(fashion):
    """The 'network' is an ELS machine of size 5: calibration must say 5 at every step."""
    bank = fashion[:30]
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = calibrate(pyels.ELS(bank, 5), pyels.ELS(bank), noise, sizes=(3, 5, 7, 9), steps=4)
    assert found.best == found.best_by_mse == [5, 5, 5, 5]
    for schedule in ("edm", "flow"):
        other = calibrate(pyels.ELS(bank, 5), pyels.ELS(bank), noise, sizes=(3, 5), steps=2, schedule=schedule)
        assert float(other.mse[:, 1].max()) == 0
    assert found.times == [0.25, 0.5, 0.75, 1.0]
    assert found.cosine.shape == found.mse.shape == (4, 4)
    assert float(found.mse[:, 1].max()) == 0
    assert found.gradients is None


@pytest.mark.parametrize("parameter", ["threshold", "width", "mass"])
def test_calibration_finds_other_parameters_too(small, parameter):
    maps = torch.rand(9, 8, 9, 8, generator=torch.Generator().manual_seed(0)) ** 4
    make, own, sizes = {
        "threshold": (lambda value: pyels.PCALocality(small, value), 0.2, (0.02, 0.2, 0.6)),
        "width": (lambda value: pyels.LS(small, window=pyels.Gaussian(value)), 1.0, (0.5, 1.0, 2.0)),
        "mass": (lambda value: pyels.PSPC(small, heatmaps=maps, mass=value), 0.5, (0.3, 0.5, 0.9)),
    }[parameter]
    noise = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    found = calibrate(make(own), make(sizes[0]), noise, sizes=sizes, steps=3)
    assert found.best == found.best_by_mse == [own] * 3
    assert found.record()["parameter"] == parameter
    assert found.record()["values"] == [own] * 3
    with pytest.raises(ValueError, match="Wiener has none of patch_size, threshold, width, mass"):
        calibrate(make(own), pyels.Wiener(small), noise)
    assert fitting(pyels.ELS(small, boundary="circular"), range(3, 13, 2)) == [3, 5, 7]


def test_calibration_takes_each_sample_by_itself(small):
    torch.manual_seed(0)
    network = from_pyels(pyels.ResNet(width=4, depth=1))
    noise, labels = torch.randn(5, 1, 9, 8), torch.tensor([0, 1, 2, 0, 1])
    together = calibrate(network, pyels.ELS(small), noise, labels, (3, 5), 3)
    for i in range(5):
        alone = calibrate(network, pyels.ELS(small), noise[i : i + 1], labels[i : i + 1], (3, 5), 3)
        torch.testing.assert_close(together.cosines[i], alone.cosines[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.mses[i], alone.mses[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.gradients[i], alone.gradients[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(together.cosine, together.cosines.sort(dim=0).values[2])
    assert together.record()["patch_sizes"] == together.best


def test_centre_gradient_is_that_of_finite_differences():
    """A network that blurs: its gradient is the blur's kernel around the centre, in eps by way of x0."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [2.0, 4.0, 2.0], [0.0, 1.0, 0.0]]) / 10
    network = NetworkDenoiser(
        lambda x, t, labels: torch.nn.functional.conv2d(x, kernel.expand(2, 1, 3, 3), padding=1, groups=2), "eps"
    )
    schedule = pyels.make_schedule("cosine")
    level = Level(0.5, schedule.alpha(0.5), schedule.sigma(0.5))
    found = centre_gradient(network, torch.randn(2, 2, 8, 6), level)
    expected = torch.zeros(2, 8, 6)
    expected[:, 3:6, 2:5] = kernel / 2  # of two channels of input, one counts
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ---- by a share of them


@pytest.fixture(scope="module")
def garments(fashion):
    """1,200 images of 12x12 in two classes."""
    images = interpolate(fashion.read(torch.arange(1200)), SIDE, mode="area")
    return pyels.PatchBank(images, torch.arange(1200) % 2)


def noises(count, seed=0):
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


class Both(pyels.Denoiser):
    """Estimates the mean of what two sizes do, so that one in between may be worse than both."""

    def __init__(self, bank):
        self.machine = pyels.ELS(bank)

    def estimate(self, query):
        return sum(self.machine.estimate(replace(query, patch_size=k)) for k in (3, 7)) / 2


NETWORKS = {"els": lambda bank: pyels.ELS(bank[:700], 5), "wiener": pyels.Wiener, "both": lambda bank: Both(bank[:700])}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_share_finds_what_all_images_find(name, seed, garments):
    network, labels = NETWORKS[name](garments), torch.tensor([0, 1, 0])
    options = (network, pyels.ELS(garments), noises(3, seed), labels, SIZES, STEPS)
    full, found = calibrate(*options), calibrate(*options, images=300, seed=seed)
    assert not torch.equal(found.cosine, full.cosine)
    if name != "both":
        assert found.best == full.best
    # What knows more than half of the images by heart agrees with large windows as far as these know them too.
    lost = [float(row.max() - row[SIZES.index(best)]) for row, best in zip(full.cosine, found.best, strict=True)]
    assert max(lost) < 1e-2  # worst seen: 4.4e-3
    if (name, seed) == ("both", 1):  # a search that goes from size to size while it gets better would be misled
        falls = full.cosine.diff(dim=1) < 0
        assert (falls[:, :-1] & ~falls[:, 1:]).any()


def test_a_share_is_of_the_samples_class_and_seed(garments):
    labels = torch.tensor([0, 1])
    both = share(garments, labels, 2, 100, seed=7)
    drawn = [images for _, images, _ in both.sets()]
    for b, images in enumerate(drawn):
        assert len(images) == len(images.unique()) == 100
        assert (images % 2 == b).all()
        ((_, alone, _),) = share(garments, labels[b : b + 1], 1, 100, seed=7 + b).sets()
        assert torch.equal(alone, images)
    ((_, of_all, _),) = share(garments, None, 1, 100, seed=7).sets()
    assert len(of_all) == 100
    assert 20 < (of_all % 2).sum() < 80
    assert share(garments, labels, 2, 99, seed=7).names != share(garments, labels, 2, 99, seed=8).names
    assert share(garments, labels, 2, 600, seed=7).names == garments.select(labels).names  # there are no more


def test_of_few_images_all_are_looked_at(small):
    noise, labels = torch.randn(3, 1, 9, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    options = (pyels.Wiener(small), pyels.ELS(small), noise, labels, (3, 5), 2)
    assert torch.equal(calibrate(*options, images=5).cosines, calibrate(*options).cosines)
    fewer = calibrate(*options, images=4, seed=3)  # of class 0 alone there are more
    alone = calibrate(*options[:2], noise[:1], labels[:1], (3, 5), 2, images=4, seed=3)
    torch.testing.assert_close(fewer.cosines[0], alone.cosines[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(fewer.cosines[1:], calibrate(*options).cosines[1:], atol=1e-6, rtol=0)


# ---- From the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("pyels.cli.calibrate"), "check_wiring", lambda network, bank: [])
    make_bank(30, (1, 8, 8), labels=[0, 1, 1] * 10).save(tmp_path / "bank.npz")
    (tmp_path / "net.py").write_text(
        f"import pyels\ndef build(): return pyels.Wiener(pyels.datasets.load({str(tmp_path / 'bank.npz')!r}))\n"
    )
    data = ("--network", f"{tmp_path / 'net.py'}:build", "--dataset", tmp_path / "bank.npz")
    return ("calibrate", *data, "--sizes", "3,5", "--steps", 2, "--num", 2, "--jobs", 1)


def test_calibrate_says_of_how_many_images_its_sizes_are(arguments, tmp_path, capsys):
    for name, options, images, of in (
        ("all", ("--images", 0), 0, None),
        ("share", ("--images", 12), 12, 30),
        ("classes", ("--images", 12, "--labels", "0,1"), 12, 20),
        ("enough", (), 2000, None),
    ):
        assert run_program(*arguments, *options, "--out", tmp_path / name) == 0
        printed = capsys.readouterr().out
        said = f"by {images} images at random, of up to {of} that a trajectory draws on; --images 0: by all\n"
        assert (said in printed) == ("at random" in printed) == (of is not None)
        scales = json.loads((tmp_path / name / "scales.json").read_text())
        assert scales["images"] == images
        assert scales["drawn"] == (None if of is None else {"images": images, "of": of})
    cosines = {
        name: read_tensors(tmp_path / name / "calibration.safetensors")["cosines"]
        for name in ("all", "enough", "share")
    }
    assert torch.equal(cosines["all"], cosines["enough"])
    assert not torch.equal(cosines["all"], cosines["share"])


def test_a_calibration_that_was_interrupted_goes_on(arguments, tmp_path, monkeypatch, capsys):
    arguments = (*arguments, "--images", 12)
    assert run_program(*arguments, "--out", tmp_path / "whole") == 0
    out = tmp_path / "out"

    def interrupted(*given):
        if given[-1] == 1_000_001:
            raise KeyboardInterrupt
        return calibrate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(import_module("pyels.cli.calibrate"), "calibrate", interrupted)
        assert run_program(*arguments, "--out", out) == 130
    capsys.readouterr()
    assert run_program(*arguments, "--images", 13, "--out", out) == 2
    assert "holds an unfinished run with images = 12, now 13" in capsys.readouterr().err
    assert run_program(*arguments, "--out", out) == 0
    whole, resumed = (read_tensors(folder / "calibration.safetensors") for folder in (tmp_path / "whole", out))
    assert torch.equal(resumed["cosines"], whole["cosines"])
    capsys.readouterr()
    assert run_program(*arguments, "--images", 0, "--out", out) == 2
    assert "holds finished results with images = 12, now 0" in capsys.readouterr().err


def test_a_share_is_taken_where_all_images_take_long(arguments, tmp_path, capsys):
    assert run_program(*arguments, "--machine", "ls", "--out", tmp_path / "ls") == 0
    assert json.loads((tmp_path / "ls" / "scales.json").read_text())["images"] == 0
    rule = ("calibrate", *arguments[3:], "--rule", "sure")
    assert run_program(*rule, "--out", tmp_path / "rule") == 0
    assert json.loads((tmp_path / "rule" / "scales.json").read_text())["images"] is None
    capsys.readouterr()
    for options, message in (
        ((*rule, "--images", 5), "--images 5 is for --rule network and exact engines"),
        ((*arguments, "--engine", "sampled", "--images", 5), "--images 5 is for --rule network and exact engines"),
        ((*arguments, "--images", -1), "--images must be at least 0, got -1"),
    ):
        assert run_program(*options, "--out", tmp_path / "none") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
