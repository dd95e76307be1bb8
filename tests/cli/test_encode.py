"""Latents, the whole way: encoded, learned, calibrated, compared, drawn, decoded; and what does not belong together."""

import json

import numpy as np
import pytest
from helpers import make_bank, run_program, save_toy_autoencoder
from PIL import Image

import pyels
from pyels.files import read_tensors

SHORT = ("--num", 2, "--steps", 2, "--threads", 1)
TRAINED = ("--steps", 2, "--batch-size", 4, "--width", 4, "--depth", 1, "--threads", 1)


@pytest.fixture
def latents(tmp_path, bank_file, monkeypatch):
    """Of the bank, in a folder of our own; and what is said of a command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = save_toy_autoencoder(tmp_path)
    assert run_program("encode", "--autoencoder", source, "--dataset", bank_file, "--half", "--threads", 1) == 0
    return tmp_path / "latents.npz"


@pytest.fixture
def refused(capsys):
    def call(*arguments):
        capsys.readouterr()
        assert run_program(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("pyels: error: ")
        return line

    return call


def test_the_whole_way(tmp_path, latents, capsys, refused):
    with Image.open(tmp_path / "latents.png") as picture:
        assert picture.size[0] > 100
    assert np.load(latents)["images"].dtype == np.float16
    assert run_program("train", "--dataset", latents, *TRAINED, "--out", "network") == 0
    record = json.loads((tmp_path / "network" / "run.json").read_text())["data"]["bank"]["latents"]
    assert record == pyels.PatchBank.load(latents).latents.record()
    assert run_program("calibrate", "--network", "network", "--sizes", "1,3", *SHORT, "--out", "sizes") == 0
    how = ("--patch-size", 3, *SHORT, "--machines", "els,is")
    capsys.readouterr()
    assert run_program("compare", "--network", "network", *how, "--out", "theory") == 0
    assert "latents of each machine against the network's" in capsys.readouterr().out
    report = json.loads((tmp_path / "theory" / "report.json").read_text())
    assert report["of"] == "latents"
    assert read_tensors(tmp_path / "theory" / "comparison.safetensors")["els"].shape == (2, 4, 4, 4)
    assert run_program("sample", "--dataset", latents, "--patch-size", 3, *SHORT, "--out", "drawn") == 0
    drawn = read_tensors(tmp_path / "drawn" / "samples.safetensors")
    assert (drawn["samples"].shape, drawn["pictures"].shape) == ((2, 4, 4, 4), (2, 1, 8, 8))
    capsys.readouterr()
    assert run_program("info", "--dataset", latents) == 0
    assert "toy.py:Toy" in capsys.readouterr().out

    (tmp_path / "toy.py").rename(tmp_path / "moved.py")
    again = ("sample", "--dataset", latents, "--patch-size", 3, *SHORT, "--out", "again")
    assert "toy.py: no such file (the bank is of latents: say where their autoencoder is" in refused(*again)
    assert "no such file" in refused("compare", "--network", "network", *how, "--out", "again")
    assert not (tmp_path / "again").exists()
    assert run_program(*again, "--autoencoder", "moved.py:Toy") == 0


def test_pictures_and_latents_are_not_mixed(tmp_path, latents, bank_file, refused, capsys):
    make_bank(20, (4, 4, 4), labels=[0, 1] * 10).save(tmp_path / "pictures.npz")
    source = save_toy_autoencoder(tmp_path)
    given = ("--autoencoder", source, "--dataset", bank_file, "--limit", 7, "--threads", 1)
    assert run_program("encode", *given, "--out", "others.npz") == 0
    for name in ("pictures.npz", "latents.npz"):
        assert run_program("train", "--dataset", name, *TRAINED, "--out", name.removesuffix(".npz")) == 0
    how = ("--patch-size", 3, *SHORT, "--out", "out")
    said = refused("compare", "--network", "pictures", "--dataset", latents, *how)
    assert "the network was trained on pictures, but the data set holds latents of" in said
    for name, held in (("pictures.npz", "pictures"), ("others.npz", "latents of"), (bank_file, "pictures")):
        said = refused("compare", "--network", "latents", "--dataset", name, *how)
        assert "the network was trained on latents of" in said
        assert f"but the data set holds {held}" in said
    said = refused("sample", "--network", "latents", "--dataset", "pictures.npz", *SHORT, "--out", "out")
    assert "but the data set holds pictures" in said
    other = ("--like", latents, "--dataset", bank_file, "--limit", 7, "--threads", 1, "--out", "new/like.npz", "--json")
    capsys.readouterr()
    assert run_program("encode", *other) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["shape"], told["bank"]["images"], told["out"]) == ([4, 4, 4], 7, "new/like.npz")
    assert told["latents"] == pyels.PatchBank.load(latents).latents.record()
    (tmp_path / "new" / "like.npz").rename(tmp_path / "like.npz")
    assert run_program("compare", "--network", "latents", "--dataset", "like.npz", *how) == 0
    held_out = ("evaluate", "--dataset", latents, "--machines", "is", *SHORT, "--out", "error", "--held-out")
    assert "the bank holds latents of" in refused(*held_out, "others.npz")
    assert "but the held-out images are pictures" in refused(*held_out, "pictures.npz")
    assert run_program(*held_out, "like.npz") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "bank.npz"], "--autoencoder is needed, or --like"),
        (["--autoencoder", "toy.py:Toy", "--dataset", "latents.npz"], "these are latents already"),
        (["--autoencoder", "toy.py:Toy", "--out", "latents.npz"], "latents.npz is there already"),
        (["--autoencoder", "toy.py:Toy", "--out", "folder"], "--out must be an npz file, such as folder.npz"),
        (["--autoencoder", "toy.py:Toy", "--like", "bank.npz"], "--like bank.npz is no bank of latents"),
        (["--like", "latents.npz", "--as-is"], "give either --like or --as-is"),
        (["--autoencoder", "toy.py:Toy", "--dataset", "bank.npz", "--size", 7], "cannot encode images of 1x7x7"),
    ],
)
def test_what_is_not_encoded(latents, refused, arguments, message):
    out = () if "--out" in arguments else ("--out", "other.npz")
    assert message in refused("encode", *arguments, *out)
    assert not (latents.parent / "other.npz").exists()


def test_an_autoencoder_for_pictures_is_refused(latents, refused, bank_file):
    how = ("--patch-size", 3, *SHORT, "--autoencoder", "toy.py:Toy", "--out", "out")
    assert "--autoencoder is for banks of latents" in refused("sample", "--dataset", bank_file, *how)
