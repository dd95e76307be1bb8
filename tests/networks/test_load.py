"""Networks from disk: what files hold, what a Python file may do, and what is said of those that are something else."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_bank, run_program
from torch import nn

import pyels
from pyels.networks.load import load

GOOD = "import pyels\ndef build(): return pyels.NetworkDenoiser(lambda x, t, labels: 0 * x)\n"
PARSER = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--steps', default=3)\n"


@pytest.fixture(autouse=True)
def path_and_arguments(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pyels", "compare", "--network", "mine.py:build"])


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        PARSER + "given = parser.parse_args()\n" + GOOD,
        GOOD + "import sys\nif len(sys.argv) > 1: sys.exit()\n",
        GOOD + "class Mine(pyels.Denoiser):\n    def estimate(self, query): return query.x\nbuild = Mine\n",
        "import helper_of_mine\n" + GOOD + "helper_of_mine.used()\n",
        "import torch\ntorch.set_default_dtype(torch.float32)\n" + GOOD,
    ],
)
def test_files_that_hold_a_network(tmp_path, text):
    (tmp_path / "helper_of_mine.py").write_text("def used(): pass\n")
    (tmp_path / "mine.py").write_text(text)
    denoiser, record = load(f"{tmp_path / 'mine.py'}:build")
    denoiser.denoise(torch.zeros(1, 1, 4, 4), 0.6, 0.8)
    assert record["source"].endswith("mine.py:build")
    assert sys.argv[0] == "pyels"
    sys.modules.pop("helper_of_mine", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PARSER + "parser.add_argument('data')\nparser.parse_args()\n" + GOOD, "are required: data"),
        (GOOD + "import sys\nsys.exit()\n", r"it ends the program when it is imported \(sys.exit\(\)\)"),
        (GOOD + "exit(3)\n", r"sys.exit\(3\)"),
        ("import sys\ndef build(): sys.exit('no weights')\n", r"sys.exit\(no weights\)"),
        ("import torch\nbuild = torch.nn.Conv2d(1, 1, 3)\n", "gave the torch module Conv2d; .* pyels.NetworkDenoiser"),
        ("import torch\ndef build(): return torch.nn.ReLU()\n", "gave the torch module ReLU; .* pyels.NetworkDenoiser"),
        ("from torch.nn import ReLU as build\n", "gave the torch module ReLU; .* pyels.NetworkDenoiser"),
        ("def build(path): pass\n", "missing 1 required positional argument"),
        ("build = 3\n", "gave int; it must be or return a pyels.Denoiser"),
        ("build = (\n", "SyntaxError"),
    ],
)
def test_files_that_hold_something_else(tmp_path, capsys, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(f"{tmp_path / 'mine.py'}:build")
    assert "mine.py" in str(error.value)
    assert capsys.readouterr() == ("", "")
    assert run_program("compare", "--network", f"{tmp_path / 'mine.py'}:build", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyels: error: ")


FAILING = """import pyels
class Own(pyels.Denoiser):
    def estimate(self, query):
        {what}
def call(x, t):
    {what}
wrapped = pyels.NetworkDenoiser(call)
"""


OPTIONS = {"check": [], "calibrate": ["--out", "out"], "compare": ["--patch-sizes", 3, "--steps", 1, "--out", "out"]}


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("return {}['conv1']", "KeyError: 'conv1'"),
        ("raise RuntimeError('shapes')", "RuntimeError: shapes"),
        ("raise type('Odd', (Exception,), {})('text')", "Odd: text"),
        ("return open('/no/such.json')", "FileNotFoundError: [Errno 2] No such file or directory: '/no/such.json'"),
    ],
)
def test_networks_that_fail_end_a_command_in_one_line_that_names_theirs(
    tmp_path, monkeypatch, capsys, command, what, message
):
    monkeypatch.chdir(tmp_path)
    make_bank(4, (1, 8, 8)).save("bank.npz")
    Path("mine.py").write_text(FAILING.replace("{what}", what))
    for name, line in (("Own", 4), ("wrapped", 6)):
        given = ["--network", f"mine.py:{name}", "--dataset", "bank.npz", *OPTIONS[command]]
        assert run_program(command, *given) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("pyels: error: ")
        assert message in said
        assert f"({tmp_path / 'mine.py'}:{line})" in said


@pytest.mark.parametrize(("what", "status"), [("raise KeyboardInterrupt", 130), ("raise SystemExit(7)", 7)])
def test_networks_that_end_the_program_do(tmp_path, what, status):
    make_bank(4, (1, 8, 8)).save(tmp_path / "bank.npz")
    (tmp_path / "mine.py").write_text(FAILING.replace("{what}", what))
    given = ["--network", f"{tmp_path / 'mine.py'}:Own", "--dataset", tmp_path / "bank.npz"]
    assert run_program("check", *given) == status


def test_a_folder_does_not_shadow_the_standard_library(tmp_path):
    for name in ("colorsys", "wave"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not the standard library')\n")
    (tmp_path / "mine.py").write_text("import wave\nimport colorsys\n" + GOOD)
    for name in ("wave", "colorsys"):
        sys.modules.pop(name, None)
    load(f"{tmp_path / 'mine.py'}:build")
    assert str(tmp_path) not in str(sys.modules["wave"].__file__)


def test_what_a_network_prints_does_not_spoil_the_results(tmp_path, capsys):
    make_bank(4, (1, 8, 8)).save(tmp_path / "bank.npz")
    (tmp_path / "mine.py").write_text(
        "import pyels, sys\nprint('at import')\ndef call(x, t, labels):\n    print('at a call')\n    return 0 * x\n"
        "def build():\n    print('when made')\n    print('a warning', file=sys.stderr)\n"
        "    return pyels.NetworkDenoiser(call)\n"
    )
    data = ["--dataset", tmp_path / "bank.npz", "--out", tmp_path / "out"]
    options = [*data, "--patch-sizes", 3, "--num", 1, "--steps", 1]
    assert run_program("compare", "--network", f"{tmp_path / 'mine.py'}:build", *options, "--json") == 0
    out, err = capsys.readouterr()
    assert "median" in json.loads(out)
    for said in ("at import", "at a call", "when made", "a warning"):
        assert said in err


PYTHON = """
import pyels
network = pyels.NetworkDenoiser(lambda x, t, labels: 0 * x, "x0")
def build():
    return network
def wrong():
    return 3
def broken():
    return undefined
"""


def test_load_finds_files_folders_and_python(tmp_path):
    network = pyels.ResNet(width=4, depth=1)
    network.save(tmp_path / "network.safetensors", {"training": {"data": {"dataset": "here"}}})
    for source in (tmp_path, tmp_path / "network.safetensors"):
        denoiser, record = load(source)
        assert isinstance(denoiser, pyels.NetworkDenoiser)
        assert record["training"]["data"]["dataset"] == "here"
        assert len(record["crc32"]) == 8
    (tmp_path / "mine.py").write_text(PYTHON)
    for name in ("network", "build"):
        denoiser, record = load(f"{tmp_path / 'mine.py'}:{name}")
        assert float(denoiser.denoise(torch.ones(1, 1, 4, 4), 0.6, 0.8).abs().max()) == 0
    for source, message in (
        (f"{tmp_path / 'mine.py'}:wrong", "gave int; it must be or return a pyels.Denoiser"),
        (f"{tmp_path / 'mine.py'}:nothing", "nothing of the name 'nothing' in it"),
        (f"{tmp_path / 'mine.py'}:broken", r"mine\.py: NameError: name 'undefined'"),
        (tmp_path / "mine.py", r"mine\.py:NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            load(source)
    (tmp_path / "empty").mkdir()
    for source in (f"{tmp_path / 'gone.py'}:x", tmp_path / "empty", tmp_path / "gone.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"gone|empty"):
            load(source)


def test_pickles_are_not_read(tmp_path):
    torch.save(pyels.ResNet(width=4, depth=1).state_dict(), tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="damaged safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "pytorch_model.bin", "model.pkl"])
def test_pickles_are_refused_as_what_they_are(tmp_path, name):
    torch.save(nn.Conv2d(1, 1, 3).state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"are pickles, which run code when they are read.*FILE\.py:NAME"):
        load(tmp_path / name)


def test_bare_modules_are_told_how_to_be_wrapped(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Conv2d):\n  def __init__(self): super().__init__(1, 1, 3)\n"
        "net = Net()\ndef build(): return net\n"
        "def cuda(): raise AssertionError('Torch not compiled with CUDA enabled')\n"
    )
    for name in ("net", "Net", "build"):
        with pytest.raises(ValueError, match=r"gave .*Net; .* pyels\.NetworkDenoiser\(network, predicts="):
            load(f"{tmp_path / 'mine.py'}:{name}")
    with pytest.raises(ValueError, match="torch is built without CUDA here"):
        load(f"{tmp_path / 'mine.py'}:cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("command", ["check", "calibrate", "compare", "sample"])
def test_a_device_that_is_not_there_ends_a_command_in_one_line(tmp_path, capsys, command):
    make_bank(4, (1, 8, 8)).save(tmp_path / "bank.npz")
    (tmp_path / "mine.py").write_text("import pyels\nnet = pyels.NetworkDenoiser(lambda x: x)\n")
    given = ["--network", f"{tmp_path / 'mine.py'}:net", "--device", "cuda", "--dataset", tmp_path / "bank.npz"]
    assert run_program(command, *given, *(() if command == "check" else ("--out", tmp_path / "out"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyels: error: device must be cpu or cuda")


@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/network"])
def test_paths_that_are_none(path):
    with pytest.raises((ValueError, FileNotFoundError), match=r"must not be empty|no such file|no network"):
        load(path)
