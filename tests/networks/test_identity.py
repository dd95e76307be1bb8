"""The checksum of a network: every weight is in it, wherever the network keeps it."""

import functools
from pathlib import Path

import pytest
import torch
from helpers import run_program, save_random_diffusers_pipeline
from torch import nn

import pyels
from pyels.networks.identity import checksum
from pyels.networks.load import load


class Holder:
    def __init__(self, weight):
        self.parts = {"a": [weight]}

    def __call__(self, x, t, labels):
        return x * self.parts["a"][0]

    def method(self, x, t, labels):
        return self(x, t, labels)


class Module(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.plain = [weight]
        self.register_buffer("fleeting", weight.clone(), persistent=False)

    def forward(self, x, t, labels):
        return x * self.plain[0] * GLOBAL["weight"]


GLOBAL = {"weight": torch.ones(1)}


def closure(weight):
    def function(x, t, labels):
        return x * weight

    return lambda x, t, labels: function(x, t, labels)


def default(weight):
    return lambda x, t, labels, weight=weight: x * weight


def of_the_file(weight):
    GLOBAL["weight"] = weight
    return lambda x, t, labels: sum(x * GLOBAL["weight"] for _ in (1,))


class Mine(pyels.Denoiser):
    def estimate(self, query):
        return query.x * GLOBAL["weight"]


def denoiser(weight):
    GLOBAL["weight"] = weight
    return Mine()


KINDS = {
    "parameter": lambda weight: nn.ParameterList([nn.Parameter(weight)]),
    "attribute": Module,
    "object": Holder,
    "method": lambda weight: Holder(weight).method,
    "closure": closure,
    "partial": lambda weight: functools.partial(lambda w, x, t, labels: x * w, weight),
    "default": default,
    "global": of_the_file,
    "denoiser": denoiser,
    "array": lambda weight: closure(weight.numpy()),
    "number": lambda weight: closure(float(weight[0])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_found_wherever_they_are(kind):
    def of(value):
        made = KINDS[kind](torch.tensor([value]))
        return checksum(made if kind == "denoiser" else pyels.NetworkDenoiser(made), Path(__file__))

    assert of(1.0) == of(1.0)
    assert of(1.0) != of(1.0000001)


def test_a_weight_that_is_loaded_by_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pathlib, torch, pyels\n"
        "weight = torch.tensor(float(pathlib.Path(__file__).with_name('weight.txt').read_text()))\n"
        "def build(): return pyels.NetworkDenoiser(lambda x, t, labels: x * weight)\n"
    )
    checksums = []
    for value in ("0.5", "0.5", "0.25"):
        (tmp_path / "weight.txt").write_text(value)
        checksums.append(load(f"{tmp_path / 'mine.py'}:build")[1]["crc32"])
    assert checksums[0] == checksums[1] != checksums[2]


@pytest.mark.needs(package="diffusers")
def test_a_pipeline_of_diffusers(tmp_path):
    unet, _ = save_random_diffusers_pipeline(tmp_path / "a", 8)
    before = load(tmp_path / "a")[1]["crc32"]
    assert load(tmp_path / "a")[1]["crc32"] == before
    with torch.no_grad():
        next(unet.parameters()).view(-1)[0] += 1e-6
    unet.save_pretrained(tmp_path / "a" / "unet")
    assert load(tmp_path / "a")[1]["crc32"] != before


def test_a_resumed_run_does_not_mix_two_networks(bank_of_two, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import pathlib, torch, pyels\n"
        "weight = float(pathlib.Path(__file__).with_name('weight.txt').read_text())\n"
        "net = pyels.NetworkDenoiser(lambda x, t, labels: x * weight)\n"
    )
    options = ("compare", "--network", f"{tmp_path / 'mine.py'}:net", "--dataset", bank_of_two, "--machines", "is")
    options = (*options, "--steps", 1, "--num", 1, "--out", tmp_path / "out")
    (tmp_path / "weight.txt").write_text("0.5")
    assert run_program(*options) == 0
    (tmp_path / "weight.txt").write_text("0.25")
    assert run_program(*options) == 2
    assert "holds finished results with network = " in capsys.readouterr().err


@pytest.fixture
def bank_of_two(tmp_path):
    pyels.PatchBank(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).save(tmp_path / "bank.npz")
    return tmp_path / "bank.npz"
