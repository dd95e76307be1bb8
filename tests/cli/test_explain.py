"""`pyels explain`: a page, a trace and a report of a sample or of a picture."""

import json

import pytest
import torch
from helpers import make_bank, run_program
from PIL import Image

import pyels
from pyels.provenance import Trace

FILES = ["explained.png", "explorer.html", "report.json", "run.json", "trace.safetensors"]


@pytest.fixture
def data(tmp_path):
    make_bank(30, (1, 8, 8), labels=[0, 1] * 15).save(tmp_path / "bank.npz")
    pyels.ResNet(1, 8, 2, 2).eval().save(tmp_path / "net.safetensors")
    return tmp_path


def explain(data, *more):
    return run_program("explain", "--dataset", data / "bank.npz", "--out", data / "out", *more)


def test_of_a_network(data, capsys):
    """The sample is that of compare for the same seed, and the report says what the trace holds."""
    sizes = ("--network", data / "net.safetensors", "--patch-sizes", "3,5,7")
    assert explain(data, *sizes, "--seed", 3, "--json") == 0
    assert sorted(p.name for p in (data / "out").iterdir()) == FILES
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((data / "out" / "report.json").read_text())
    bank = pyels.datasets.load(data / "bank.npz")
    trace = Trace.load(data / "out" / "trace.safetensors", bank)
    network, _ = pyels.adapters.load(data / "net.safetensors")
    noise = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(3))[None]
    torch.testing.assert_close(trace.x[0], noise)
    sample = pyels.sample(network, noise, 3, labels=torch.tensor([1]))
    torch.testing.assert_close(trace.sample, sample, atol=1e-5, rtol=0)
    assert report["label"] == 1
    assert all(one["class"] == 1 for one in report["owed_to"])
    owed = pyels.provenance.attribute(trace)
    assert [one["image"] for one in report["owed_to"]] == owed.image[0].tolist()
    assert [row["patch_size"] for row in report["steps"]] == [7, 5, 3]
    last = pyels.ELS(bank).posterior(trace.x[-1], *(float(of[-1]) for of in (trace.alpha, trace.sigma)), [1], 3)
    assert report["steps"][-1]["entropy"] == pytest.approx(float(last.entropy.mean()), abs=1e-4)
    assert explain(data, *sizes, "--seed", 4) == 2  # results of other settings stay
    assert (data / "out" / "report.json").read_text() == json.dumps(report, indent=2) + "\n"


@pytest.mark.parametrize("machine", ["els", "els:fold", "ls:gaussian", "is", "els:circular"])
def test_of_a_machine(data, machine):
    told = {"is": (), "ls:gaussian": ("--scales", "width=1,2")}.get(machine, ("--patch-sizes", "3,5"))
    assert explain(data, "--machine", machine, "--steps", 2, *told) == 0
    report = json.loads((data / "out" / "report.json").read_text())
    assert report["label"] is None
    assert sum(row["counts"] for row in report["steps"]) == pytest.approx(1)


def test_of_a_picture(data):
    """An image of the bank itself, saved as a picture, is owed to itself, and its nearest image is it."""
    bank = pyels.datasets.load(data / "bank.npz")
    pixels = ((bank.read(slice(4, 5))[0, 0] + 1) * 127.5).round().byte()
    Image.fromarray(pixels.numpy()).save(data / "mine.png")
    assert explain(data, "--picture", data / "mine.png", "--time", 0.05, "--patch-sizes", "7,3") == 0
    report = json.loads((data / "out" / "report.json").read_text())
    assert report["owed_to"][0]["image"] == 4
    assert report["owed_to"][0]["share"] > 0.99
    assert report["nearest"]["image"] == 4
    assert [(row["t"], row["patch_size"]) for row in report["steps"]] == [(0.05, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", 7), "label 7: no images of this class"),
        (("--time", 0.5), "--time is for --picture"),
        (("--picture", "large.png"), "has 9x9 pixels, but the bank's images have 8x8"),
        (("--picture", "none.png"), "none.png: not a readable picture"),
        (("--picture", "large.png", "--time", 0), "--time must be in (0, 1]"),
        (("--picture", "large.png", "--steps", 2), "--steps is for samples"),
        (("--machine", "wiener"), "--machine must be one whose answers are weighted means of patches"),
        (("--machine", "els,ls"), "--machine must be one whose answers are weighted means of patches"),
        (("--machine", "no"), "no"),
        (("--clip",), "--clip and --device are for --network"),
        (("--engine", "sampled"), "second pass"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(data, monkeypatch, capsys, options, message):
    monkeypatch.chdir(data)
    Image.new("L", (9, 9)).save("large.png")
    sizes = () if "wiener" in options else ("--patch-sizes", "3,3")
    assert explain(data, *sizes, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(data.glob("out/*"))
