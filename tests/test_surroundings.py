"""Nothing depends on how the rest of a program has set up torch, Python and the environment."""

import ast
import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_bank, run_program

import pyels

X = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
PACKAGE = Path(pyels.__file__).parent


def python(*arguments, **environment):
    """A Python of its own, that sees this pyels."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def everything(folder):
    """What programs do with pyels, from images on."""
    bank = make_bank(12, (1, 9, 8), labels=[0, 1, 2] * 4)
    bank.save(folder / "bank.npz")
    streamed = pyels.PatchBank.load(folder / "bank.npz", memory_limit=300)
    network = pyels.adapters.from_pyels(pyels.ResNet(1, 4, 1, padding="zeros", num_classes=None))
    results = []
    for machine in (pyels.ELS(bank, 3), pyels.IS(streamed), pyels.LS(bank, 3, engine="reference")):
        results += [machine.denoise(X, 0.6, [0.8, 0.5], labels=[0, 1]), machine.score(X, 0.6, 0.8)]
        results += machine.posterior(X, 0.6, 0.8, selection=bank.select(without=[1, 2])).tensors()
        results.append(pyels.sample(machine, X, [0.5, 1.0], labels=[0, 1]))
        results.append(pyels.sample(machine, X, 2, eta=1.0, generator=torch.Generator().manual_seed(0)))
    masks = pyels.Definition(pyels.Masks(lambda alpha, sigma: np.ones((72, 9, 8))), "same_position")
    results.append(pyels.Machine(bank, masks).denoise(X, 0.6, 0.8))
    results += [network.denoise(X, 0.6, 0.8) * 0, pyels.sample(network, X, 2) * 0]
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_plays_no_part(tmp_path, dtype):
    expected = everything(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        results = everything(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))


def test_the_default_device_plays_no_part(tmp_path):
    network = pyels.NetworkDenoiser(lambda x, t, labels: 0 * x, num_classes=3)
    machine = pyels.ELS(make_bank(12, (1, 9, 8), labels=[0, 1, 2] * 4), 3)
    expected = machine.denoise(X, 0.6, 0.8, labels=[0, 1])
    for inside in (lambda: torch.device("meta"), lambda: torch.utils._device.DeviceContext(torch.device("meta"))):
        with inside():
            assert torch.equal(machine.denoise(X, 0.6, [0.8, 0.8], labels=[0, 1]), expected)
            bank = make_bank(12, (1, 9, 8), labels=[0, 1, 2] * 4)
            bank.save(tmp_path / "bank.npz")
            streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=300)
            for one in (machine, pyels.ELS(bank, 3), pyels.ELS(streamed, 3), pyels.ELS(bank, 3, engine="reference")):
                one.posterior(X, 0.6, 0.8, selection=bank.select(images=[1, 2]))
                pyels.sample(one, X, 2, labels=[0, 1], eta=1.0)
            assert bank.read(torch.tensor([1], device="cpu")).device.type == "cpu"
            network.eps(X, 0.6, 0.8, labels=[0, 1])


def test_modes_that_change_nothing():
    bank = make_bank(12, (3, 9, 8))
    x = torch.randn(2, 3, 9, 8)
    machine = pyels.ELS(bank, 3)
    expected = machine.denoise(x, 0.6, 0.8)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(machine.denoise(inside, 0.6, 0.8), expected)
    assert torch.equal(machine.denoise(inside, 0.6, 0.8), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(machine.denoise(x, 0.6, 0.8), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(machine.denoise(x, 0.6, 0.8), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(machine.denoise(x.to(memory_format=torch.channels_last), 0.6, 0.8), expected)


@pytest.mark.parametrize("renew", [copy.copy, copy.deepcopy, lambda machine: pickle.loads(pickle.dumps(machine))])
def test_machines_are_copied_and_pickled_before_and_after_their_first_call(renew, tmp_path):
    bank = make_bank(12, (1, 9, 8), labels=[0, 1, 2] * 4)
    bank.save(tmp_path / "bank.npz")
    mapped = pyels.PatchBank.load(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=300)
    for make in (
        lambda: pyels.ELS(bank, 3),
        lambda: pyels.IS(mapped),
        lambda: pyels.LS(streamed, 3),
        lambda: pyels.Machine(bank, pyels.Definition(pyels.Masks(torch.ones(72, 9, 8)), "same_position")),
    ):
        machine = make()
        early = renew(machine)
        expected = machine.denoise(X, 0.6, 0.8)
        for copied in (early, renew(machine)):
            assert torch.equal(copied.denoise(X, 0.6, 0.8), expected)


@pytest.mark.needs(package="faiss")
@pytest.mark.parametrize("renew", [copy.copy, copy.deepcopy, lambda machine: pickle.loads(pickle.dumps(machine))])
def test_so_are_those_with_an_index(renew, tmp_path):
    machine = pyels.ELS(make_bank(60, (1, 9, 8)), 3, engine="sampled", index=tmp_path)
    expected = machine.denoise(X, 0.6, 0.8)
    assert torch.equal(renew(machine).denoise(X, 0.6, 0.8), expected)
    assert torch.equal(machine.denoise(X, 0.6, 0.8), expected)  # which still has its own


def test_the_public_names_are_all_that_is_shown():
    assert dir(pyels) == sorted([*pyels.__all__, "__version__"])
    for name in pyels.__all__:
        assert getattr(pyels, name) is not None
    assert pyels.engines.Cpu.name == "cpu"  # what is not public is there all the same
    for name in ("nothing", "__main__"):
        with pytest.raises(AttributeError, match=f"module 'pyels' has no attribute '{name}'"):
            getattr(pyels, name)


def test_types_are_checked_of_what_is_there():
    """The imports for type checkers say what the table says."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (one for one in tree.body if isinstance(one, ast.If) and getattr(one.test, "id", "") == "TYPE_CHECKING")
    imported = {alias.name: one.module for one in block.body if isinstance(one, ast.ImportFrom) for alias in one.names}
    assert imported == pyels._HOMES
    assert sorted(imported) == sorted(pyels.__all__)


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_what_needs_no_torch_does_not_import_it(argument):
    code = (
        "import sys, pyels.cli\ntry: pyels.cli.main([sys.argv[1]])\nfinally: print([name for name in sys.modules "
        "if name.split('.')[0] in ('torch', 'matplotlib', 'numpy')])"
    )
    ended = python("-c", code, argument)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_first_call_does_not_import_the_compiler_of_torch():
    code = (
        "import sys, torch, pyels\nbank = pyels.PatchBank(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))\n"
        "pyels.ELS(bank, 3).denoise(torch.zeros(1, 1, 4, 4), .6, .8)\nprint('torch._dynamo' in sys.modules)"
    )
    assert python("-c", code).stdout.split() == ["False"]


def test_a_source_folder_says_that_it_is_not_built(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pyels", ignore=shutil.ignore_patterns("_core*", "__pycache__", "data"))
    for how in (["-c", "import pyels"], ["-m", "pyels", "--version"]):
        # Without site-packages, where an editable install would be found first.
        ended = subprocess.run([sys.executable, "-S", *how], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode != 0
        assert "pip install -e" in ended.stderr.splitlines()[-1], ended.stderr
        assert str(tmp_path) in ended.stderr.splitlines()[-1]


def test_environments_that_do_not_matter():
    ended = python("-m", "pyels", "info", LOCAL_WORLD_SIZE=" 2 ", MPLBACKEND="module://none.here")
    assert ended.returncode == 0, ended.stderr


def test_a_terminal_without_letters_beyond_ascii(tmp_path):
    make_bank(4, (1, 8, 8)).save(tmp_path / "bank.npz")
    options = ["--dataset", tmp_path / "bank.npz", "--patch-size", "3", "--steps", "1", "--num", "1"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    ended = python("-m", "pyels", "sample", *map(str, options), "--out", str(tmp_path / "größe"), **plain)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE must be a whole number from 1 on, got 'two'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be a whole number from 1 on, got '0'"),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "-2"}, "WORLD_SIZE must be a whole number from 1 on, got '-2'"),
        ({"PYELS_ISA": "abacus"}, "PYELS_ISA is 'abacus'; this CPU runs"),
    ],
)
def test_environments_that_make_no_sense_are_named(monkeypatch, capsys, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_program("info") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyels: error: ")
    assert message in line
