import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import run_program as run

import pyels
from pyels.cli.machines import LOCAL
from pyels.files import read_tensors
from pyels.machines import MACHINES


def sample_arguments(bank_file, out, *more):
    return ("sample", "--dataset", bank_file, "--patch-size", 3, "--steps", 4, "--num", 3, "--out", out, *more)


def test_sample_writes_what_repeats_it(bank_file, tmp_path, capsys):
    assert run(*sample_arguments(bank_file, tmp_path / "a", "--labels", "0,1", "--seed", 5, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert printed == record
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["run.json", "samples.png", "samples.safetensors"]
    assert record["labels"] == [0, 1, 0]
    assert record["patch_sizes"] == [3, 3, 3, 3]
    assert record["pairs"] == 3 * 4 * 10 * sum((6 if 0 < i < 7 else 1) for i in range(8)) ** 2
    tensors = read_tensors(tmp_path / "a" / "samples.safetensors")
    assert tensors["labels"].tolist() == [0, 1, 0]
    bank = pyels.PatchBank.load(record["dataset"])
    machine = pyels.ELS(bank, boundary=record["boundary"])
    again = pyels.sample(
        machine, tensors["noise"], record["steps"], record["schedule"], record["patch_sizes"], tensors["labels"]
    )
    assert torch.equal(again, tensors["samples"])
    noise = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(6))
    assert torch.equal(tensors["noise"][1], noise)
    assert (tmp_path / "a" / "samples.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_draws(bank_file, tmp_path, capsys, machine):
    sizes = ("--patch-size", 3) if machine in LOCAL else ()
    options = ("--num", 1, "--steps", 2, "--labels", "1", "--out", tmp_path / "o", "--json")
    assert run("sample", "--dataset", bank_file, "--machine", machine, *options, *sizes) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["boundary"] == ("zeros" if machine in ("els", "asels") else None)
    assert record.get("engine") == (None if machine == "wiener" else "cpu")
    assert torch.isfinite(read_tensors(tmp_path / "o" / "samples.safetensors")["samples"]).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--machine", "is"),
        ("--machine", "es", "--solver", "heun"),
        ("--machine", "ls", "--patch-sizes", "3,3,5,7"),
        ("--machine", "els", "--boundary", "circular", "--patch-size", "5", "--schedule", "flow"),
        (
            "--machine",
            "els",
            "--boundary",
            "interior",
            "--patch-size",
            "3",
            "--schedule",
            "edm",
            "--engine",
            "reference",
        ),
        ("--patch-sizes", "mnist-resnet-zeros", "--steps", "5"),
        ("--patch-sizes", "kamb2025:mnist-resnet-zeros"),
    ],
)
def test_every_machine_boundary_solver_and_preset(bank_file, tmp_path, arguments):
    steps = () if "--patch-sizes" in arguments else ("--steps", "4")
    code = run("sample", "--dataset", bank_file, "--num", 1, "--out", tmp_path / "o", *steps, *arguments)
    assert code == 0
    samples = read_tensors(tmp_path / "o" / "samples.safetensors")["samples"]
    assert torch.isfinite(samples).all()
    assert float(samples.abs().max()) < 1.5


BAD = [
    (("--patch-size", 4), "patch_size must be odd and positive, got 4"),
    (("--patch-size", 9, "--boundary", "circular"), "patch_size 9 is larger than the 8x8 image"),
    (("--patch-sizes", "3,3"), "give either --patch-size or --patch-sizes"),
    (("--labels", "0,7"), "label 7: no images of this class"),
    (("--labels", "a"), "--labels must be integers"),
    (("--num", 0), "num must be at least 1"),
    (("--seed", -1), "seed must be between 0 and"),
    (("--seed", 10**20), "seed must be between 0 and"),
    (("--steps", 0), "--steps must be at least 1"),
    (("--machine", "vae"), "'vae' is not one of"),
    (("--machine", "ls", "--boundary", "zeros"), "only els and asels have one"),
    (("--machine", "is"), "have no size to be said: leave out --patch-size"),
    (("--machine", "wiener", "--engine", "cpu"), "machine wiener needs none"),
    (("--threads", 0), "threads must be between 1 and 4096"),
    (("--engine", "cuda"), "engine 'cuda' is not available"),
    (("--limit", 0), "limit must be at least 1"),
    (("--dataset", "nowhere"), "'nowhere' is neither one of"),
    (("--frobnicate",), "No such option"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=str)
def test_bad_input_is_one_line_and_status_2(bank_file, tmp_path, capsys, extra, message):
    assert run(*sample_arguments(bank_file, tmp_path / "out", *extra)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("pyels: error: ")
    assert message in lines[0]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_patch_size_is_asked_for_where_no_preset_fits(bank_file, capsys):
    assert run("sample", "--dataset", bank_file) == 2
    assert "--patch-size or --patch-sizes is needed" in capsys.readouterr().err
    assert run("sample", "--patch-sizes", "3,x") == 2
    assert "--patch-sizes must be integers" in capsys.readouterr().err
    assert run("sample", "--patch-sizes", "3,3,5", "--steps", "2") == 2
    assert "--patch-sizes has 3 entries for 2 steps" in capsys.readouterr().err
    assert run("sample", "--patch-sizes=-3,5") == 2
    assert "patch_size must be odd and positive, got -3" in capsys.readouterr().err
    for name in ("mnist-resnet-zeros:junk", "kamb2025:junk", ""):
        assert run("sample", "--patch-sizes", name) == 2
        assert "preset must be one of" in capsys.readouterr().err
    assert run("sample", "--patch-sizes", "nothing") == 2
    assert "preset must be one of" in capsys.readouterr().err


def test_default_sizes_are_the_data_sets_preset(tmp_path):
    assert run("sample", "--limit", 20, "--num", 1, "--out", tmp_path / "o") == 0
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["patch_sizes"] == list(pyels.presets.PATCH_SIZES["fashion-mnist-resnet-zeros"])
    assert record["steps"] == 20


def test_truncated_data_file(bank_file, tmp_path, capsys):
    bank_file.write_bytes(bank_file.read_bytes()[:700])
    assert run(*sample_arguments(bank_file, tmp_path / "out")) == 2
    assert re.search(r"error: .*bank\.npz: truncated: image 8 of 20 is cut off", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_cannot_be_made(bank_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(*sample_arguments(bank_file, tmp_path / "file" / "out")) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_full_disk_is_one_line_and_leaves_no_half_written_file(bank_file, tmp_path):
    """A limit on the size of files stands in for the full disk: writing beyond it fails in the same place."""
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from pyels.cli import main; main(sys.argv[1:])"
    )
    arguments = [str(a) for a in sample_arguments(bank_file, out, "--num", 12)]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "pyels: error: " in ended.stderr.splitlines()[-1]
    assert re.search(r"File too large: '.*samples\.safetensors'", ended.stderr.splitlines()[-1])
    assert "Traceback" not in ended.stderr
    left = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert left == [f"unfinished/{i:06d}.safetensors" for i in range(12)] + ["unfinished/settings.json"]
    # With room again, the same command goes on and finishes.
    assert run(*arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["run.json", "samples.png", "samples.safetensors"]


def test_npz_without_labels_and_npy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    np.save(tmp_path / "x.npy", images)
    for name in ("x.npz", "x.npy"):
        arguments = sample_arguments(tmp_path / name, tmp_path / ("out" + name))
        assert run(*arguments) == 0
