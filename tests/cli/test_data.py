"""Data as people have them, from the command line."""

import json

import numpy as np
import pytest
from helpers import run_program as run
from PIL import Image

import pyels
from pyels.cli import program

READERS = ("sample", "encode", "train", "calibrate", "compare", "bench", "scaling", "info")
SHORT = ("--patch-size", 3, "--steps", 1, "--num", 1, "--threads", 1)


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures of two sizes and modes, and two more for tests."""
    for i, name in enumerate(("train/cat/a", "train/cat/b", "train/dog/a", "test/cat/a", "test/dog/a")):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if i == 1 else "RGB", (8 + i % 2, 6)).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize("name", READERS)
def test_every_command_that_reads_data_says_how(name):
    flags = {flag for one in program.get_command(None, name).params for flag in one.opts}
    assert {"--split", "--root", "--limit", "--size", "--crop", "--mode", "--skip-unreadable"} <= flags


def test_info_names_the_classes(folder, capsys):
    how = ("--dataset", folder, "--size", 5, "--crop", "--mode", "RGB")
    assert run("info", *how, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["images"], described["shape"]) == (3, [3, 5, 5])
    assert described["class_names"] == {"0": "cat", "1": "dog"}
    assert run("info", *how, "--split", "test", "--limit", 1) == 0
    assert "class_names       0: cat, 1: dog" in capsys.readouterr().out
    assert run("info", "--limit", 3, "--crop", "--size", 4) == 2
    assert "--limit, --size and --crop: nothing is read without --dataset" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_sample_of_pictures_of_several_sizes(folder, tmp_path, capsys):
    command = ("sample", "--dataset", folder, *SHORT, "--mode", "L", "--labels", "1", "--out", tmp_path / "out")
    assert run(*command) == 2
    assert "give a size to bring all to one" in capsys.readouterr().err
    (folder / "train/cat/c.png").write_bytes(b"-")
    assert run(*command, "--size", 8) == 2
    assert "c.png: not a readable image" in capsys.readouterr().err
    assert run(*command, "--size", 8, "--skip-unreadable", "--json") == 0
    told = capsys.readouterr()
    assert "pyels: warning: 1 of 4 pictures cannot be read and are left out" in told.err
    record = json.loads(told.out)
    assert [record[key] for key in ("size", "mode", "skip_unreadable")] == [8, "L", True]
    assert "split" not in record


def test_how_a_network_was_trained_is_how_it_is_compared(folder, tmp_path, capsys):
    run_it = ("--steps", 2, "--batch-size", 2, "--width", 4, "--depth", 1, "--threads", 1)
    how = ("--dataset", folder, "--split", "test", "--size", 6, "--mode", "L")
    assert run("train", *how, *run_it, "--out", tmp_path / "network") == 0
    run_it = ("--num", 1, "--steps", 2, "--sizes", "3,5", "--threads", 1)
    command = ("calibrate", "--network", tmp_path / "network", *run_it)
    assert run(*command, "--out", tmp_path / "sizes") == 0
    data = json.loads((tmp_path / "sizes" / "run.json").read_text())["data"]
    assert (data["split"], data["size"], data["mode"], data["bank"]["images"]) == ("test", 6, "L", 2)
    capsys.readouterr()
    assert run(*command, "--split", "train", "--out", tmp_path / "others") == 0
    data = json.loads((tmp_path / "others" / "run.json").read_text())["data"]
    assert (data["split"], data["bank"]["images"]) == ("train", 3)


@pytest.mark.parametrize("ids", [[7_000_000_000, 3], [-1, 5], [40_000, 3]])
def test_labels_that_are_identifiers(tmp_path, capsys, ids):
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8)).astype(np.uint8)
    pyels.PatchBank(images, ids * 3).save(tmp_path / "ids.npz")
    assert (
        run("sample", "--dataset", tmp_path / "ids.npz", *SHORT, f"--labels={ids[0]}", "--out", tmp_path / "out") == 0
    )
    command = ("train", "--dataset", tmp_path / "ids.npz", "--steps", 1, "--batch-size", 2, "--width", 4, "--depth", 1)
    capsys.readouterr()
    assert run(*command, "--out", tmp_path / "net") == 2
    assert "number the classes 0 to 1" in capsys.readouterr().err
    assert run(*command, "--unconditional", "--out", tmp_path / "net") == 0


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_any_number_of_channels(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (8, channels, 8, 8)).astype(np.uint8)
    images[:, -1] = 0  # which is no opacity
    np.savez(tmp_path / "bank.npz", images=images)
    assert run("sample", "--dataset", tmp_path / "bank.npz", *SHORT, "--out", tmp_path / "out") == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "samples.png").convert("L"))
    assert (picture < 250).mean() > 0.3
