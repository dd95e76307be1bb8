"""What a Python file that holds a network may do, and what is said of one that does something else."""

import json
import sys

import pytest
import torch
from helpers import make_bank, run_program

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
