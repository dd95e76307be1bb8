"""Commands that are killed before their changes to the file system, and repeated.

The same results come out, and nothing is left behind. One process loads the package; every run is a fork of it.
"""

import os
import signal
import sys
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import KILLED_AT_EVERY, make_bank

import pyels
from pyels.engines.index.file import describe
from pyels.files import TensorFile, replacing
from pyels.studies.hardware import torch_threads

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMED = {"seconds", "working", "index_seconds", "index_bytes"}  # of scaling: differ from run to run
DATA = ("--dataset", "bank.npz", "--threads", "1")
NETWORK = ("--network", "network.safetensors", *DATA, "--num", "2")
SMALL = ("--num", "1", "--patch-sizes", "3,3")
COMMANDS = {
    "sample": (*DATA, "--patch-size", "3", "--steps", "2", "--num", "2"),
    "train": (*DATA, "--width", "4", "--depth", "1", "--steps", "2", "--batch-size", "2"),
    "calibrate": (*NETWORK, "--sizes", "3", "--steps", "2", "--jobs", "1"),
    "compare": (*NETWORK, "--machines", "els,is", "--patch-sizes", "3,3", "--jobs", "1"),
    "scaling": (*DATA, "--images", "12", "--tolerance", "1", "--subset", "none", "--top", "none", *SMALL),
}


def ended(run):
    """The exit status of a fork that runs it, -9 where it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            run()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(change, run, within):
    """Run it, and kill it before the change of this number within a folder."""
    done = 0

    def hook(event, arguments):
        nonlocal done
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            done += str(within) in str(arguments[0])
            if done == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run()


def contents(folder):
    """Its names, and of files of tensors what does not depend on the time that a run took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = None
        if path.suffix == ".safetensors":
            tensors = TensorFile.read(path).tensors
            found[name] = {key: value.tolist() for key, value in tensors.items() if key not in TIMED}
    return found


def check(tmp_path, run, again):
    """What it gives when it is killed at any place and then repeated is what it gives otherwise."""
    whole = tmp_path / "whole"
    run(whole)  # here, so that all that the first call loads is there in every fork
    expected = contents(whole)
    for change in range(1, 1000, KILLED_AT_EVERY):
        out = tmp_path / f"killed-{change}"
        code = ended(partial(killed_before, change, partial(run, out), out))
        assert code in (0, -9)
        if code == 0:
            assert contents(out) == expected
            return change - 1
        again(out)
        assert contents(out) == expected, change
    raise AssertionError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a bank and a network; pictures and a check of the network that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyels.networks.training._CHECKPOINT_SECONDS", -1)  # after every step
    monkeypatch.setattr("pyels.studies.plots._save", picture)
    for command in ("calibrate", "compare"):
        monkeypatch.setattr(import_module(f"pyels.cli.{command}"), "check_wiring", lambda network, bank: [])
    make_bank(12, (1, 8, 8), labels=[0, 1] * 6).save("bank.npz")
    torch.manual_seed(0)
    pyels.ResNet(width=4, depth=1).save("network.safetensors")
    with torch_threads(1):  # more would stay behind in this process
        yield tmp_path


def picture(figure, path, *_):
    with replacing(path) as temporary:
        Path(temporary).write_bytes(b"a picture")


@pytest.mark.parametrize(
    "command", ["sample", "train", *(pytest.param(name, marks=pytest.mark.slow) for name in list(COMMANDS)[2:])]
)
def test_commands(here, command):
    from pyels.cli import main

    def run(out, *more):
        with suppress(SystemExit) if out.name == "whole" else nullcontext():
            main([command, *COMMANDS[command], *more, "--out", str(out)])

    def again(out):
        finished = command == "train" and (out / "network.safetensors").exists() and not any(out.glob("check*"))
        code = ended(partial(run, out, *["--resume"] * (command == "train")))
        assert code == (2 if finished else 0)  # a finished network is not trained anew

    assert check(here, run, again) > 14


@pytest.mark.needs(package="faiss")
def test_building_an_index(here):
    bank, x = pyels.PatchBank.load(here / "bank.npz"), torch.zeros(1, 1, 8, 8)

    def run(folder):
        pyels.ELS(bank, 5, engine="sampled", index=folder).denoise(x, 0.6, 0.8)

    def again(folder):
        assert ended(partial(run, folder)) == 0

    assert check(here, run, again) >= 5
    assert describe(here / "whole")[0]["patch_size"] == 5
