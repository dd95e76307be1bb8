import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import make_bank, run_program

import pyels
from pyels.files import read_tensors, write_tensors
from pyels.networks import training
from pyels.networks.load import load_network
from pyels.networks.training import CHECKPOINT, Recipe, train


def make_network(kind=pyels.ResNet, **config):
    torch.manual_seed(0)
    return kind(**{"width": 8, "depth": 1, "num_classes": 3, **config})


@pytest.fixture
def bank():
    return make_bank(24, (1, 8, 8), labels=[0, 1, 2] * 8)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.slow
def test_training_learns(fashion):
    bank = pyels.PatchBank(fashion.images[:64, :, 8:20, 8:20].contiguous(), fashion.labels[:64])
    recipe = Recipe(steps=300, batch_size=16, optimizer="adamw", learning_rate=3e-3, anneal="cosine")
    for kind, width in ((pyels.ResNet, 16), (pyels.UNet, 8)):
        network = make_network(kind, width=width, num_classes=10)
        _, done = train(network, bank, recipe, progress=False)
        assert done.step == 300
        assert sum(done.losses[-20:]) < 0.65 * sum(done.losses[:20])  # ResNet 0.57, UNet 0.49 seen


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pyels.ResNet, {}),
        (pyels.ResNet, {"optimizer": "adamw", "anneal": "cosine"}),
        (pyels.ResNet, {"ema": 0.0}),
        (pyels.ResNet, {"bfloat16": True}),
        (pyels.ResNet, {"schedule": "edm"}),
        (pyels.UNetAttention, {"label_dropout": 0.3}),
        (pyels.DiT, {}),
    ],
    ids=str,
)
def test_a_stopped_training_goes_on_to_the_same_bits(bank, tmp_path, monkeypatch, kind, options):
    recipe = Recipe(steps=12, batch_size=5, **options)

    def make():
        return make_network(kind, null_label="label_dropout" in options)

    whole, done = train(make(), bank, recipe, progress=False)
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1)  # after every step

    steps = training._steps

    def stops_after_7(*arguments):
        for count, loss in enumerate(steps(*arguments)):
            if count == 7:
                raise OSError("the machine is gone")
            yield loss

    monkeypatch.setattr(training, "_steps", stops_after_7)
    with pytest.raises(OSError, match="gone"):
        train(make(), bank, recipe, tmp_path, progress=False)
    monkeypatch.setattr(training, "_steps", steps)
    # Of the new network nothing must be left, nor of the state of torch's own generator.
    anew = make()
    torch.manual_seed(99)
    for weights in anew.parameters():
        torch.nn.init.normal_(weights)
    resumed, again = train(anew, bank, recipe, tmp_path, progress=False)
    assert same(whole, resumed)
    assert again.losses == done.losses
    other, _ = train(make(), bank, dataclasses.replace(recipe, seed=1), progress=False)
    assert not same(whole, other)


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1)
    recipe = Recipe(steps=3, batch_size=4)
    folder = tmp_path / "made" / "for it"
    train(make_network(), bank, recipe, folder, progress=False)
    assert (folder / CHECKPOINT).exists()
    tmp_path = folder
    cases = [
        (make_network(), bank, Recipe(steps=4, batch_size=4), "training with steps = 3, now 4"),
        (make_network(width=4), bank, recipe, "training with network"),
        (make_network(), make_bank(24, (1, 8, 8), labels=[0, 1, 2] * 8, seed=5), recipe, "training with bank"),
    ]
    for network, other, changed, message in cases:
        with pytest.raises(ValueError, match=message):
            train(network, other, changed, tmp_path, progress=False)
    with pytest.raises(ValueError, match="training with network"):  # of the same configuration
        train(make_network(pyels.UNet), bank, recipe, tmp_path, progress=False)
    torch.set_num_threads((before := torch.get_num_threads()) + 1)
    try:
        with pytest.warns(UserWarning, match=f"began with {before} threads and goes on with {before + 1}"):
            train(make_network(), bank, recipe, tmp_path, progress=False)
    finally:
        torch.set_num_threads(before)
    path = tmp_path / CHECKPOINT
    for content in (path.read_bytes()[:-10], b"\x80\x04}q\x00."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors: not a checkpoint of pyels train, or damaged"):
            train(make_network(), bank, recipe, tmp_path, progress=False)
    write_tensors(path, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="not a checkpoint"):
        train(make_network(), bank, recipe, tmp_path, progress=False)


def test_bad_recipes_and_banks(bank):
    for options, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"decay": 1.5}, "decay must lie in"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"label_dropout": -0.1}, "label_dropout must lie in"),
        ({"optimizer": "sgd"}, "optimizer must be"),
        ({"anneal": "linear"}, "anneal must be"),
        ({"schedule": "quadratic"}, "schedule must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**{"steps": 1, **options})
    recipe = Recipe(steps=1)
    with pytest.raises(ValueError, match="no labels"):
        train(make_network(), pyels.PatchBank(bank.images), recipe)
    with pytest.raises(ValueError, match=r"classes 0\.\.1, but the bank has \[0, 1, 2\]"):
        train(make_network(num_classes=2), bank, recipe)
    with pytest.raises(ValueError, match="label_dropout is of networks that have a label for no class"):
        train(make_network(), bank, Recipe(steps=1, label_dropout=0.1))
    with pytest.raises(ValueError, match="takes 3 channels"):
        train(make_network(channels=3), bank, recipe)
    with pytest.raises(ValueError, match="the loss is nan after step"):
        train(make_network(), bank, Recipe(steps=50, batch_size=4, learning_rate=1e30), progress=False)


def test_labels_are_dropped_as_often_as_said(bank, monkeypatch):
    seen = []

    class Told(pyels.ResNet):
        def forward(self, x, angle, labels=None):
            seen.extend(labels.tolist())
            return super().forward(x, angle, labels)

    network = make_network(Told, null_label=True)
    train(network, bank, Recipe(steps=20, batch_size=50, label_dropout=0.2), progress=False)
    assert seen.count(3) == pytest.approx(200, abs=50)  # 4 standard deviations
    assert {0, 1, 2} < set(seen)
    assert bank.labels.max() == 2
    x, alpha, sigma = torch.randn(2, 1, 8, 8), 0.6, 0.8
    denoiser = pyels.adapters.from_pyels(network)
    guided = pyels.Guided(denoiser, 3.0).denoise(x, alpha, sigma, [0, 1])
    none, own = denoiser.denoise(x, alpha, sigma), denoiser.denoise(x, alpha, sigma, [0, 1])
    assert torch.allclose(guided, none + 3 * (own - none), atol=1e-5)
    assert not torch.allclose(none, own, atol=1e-4)


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (199, 199), (200, 200), (201, 200), (599, 200)])
def test_losses_are_of_equal_parts_of_the_run(bank, monkeypatch, steps, points):
    monkeypatch.setattr(training, "_steps", lambda *_: iter([0.5] * steps))
    _, log = train(make_network(width=2), bank, Recipe(steps=steps, batch_size=1), progress=False)
    assert len(log.losses) == points
    assert log.recent == []


def test_learning_rates():
    paper = Recipe(steps=100)
    assert paper.rate(0) == 1e-4
    assert paper.rate(1000) == pytest.approx(1e-4 * 0.999965**1000)
    short = Recipe(steps=100, learning_rate=1.0, anneal="cosine")
    rates = [short.rate(i) for i in range(100)]
    assert max(range(100), key=rates.__getitem__) == 9  # warm-up of a tenth
    assert rates[0] == pytest.approx(0.1)
    assert 0 < rates[-1] < 1e-3


def command(bank_file, out, *more):
    options = ("--width", 8, "--depth", 1, "--batch-size", 16, "--threads", 1, "--out", out)
    return [str(a) for a in ("train", "--dataset", bank_file, *options, *more)]


@pytest.fixture
def bank_file(tmp_path, bank):
    bank.save(tmp_path / "bank.npz")
    return tmp_path / "bank.npz"


def test_train_command_writes_what_the_others_read(bank_file, tmp_path, capsys):
    out = tmp_path / "net"
    assert run_program(*command(bank_file, out, "--epochs", 2.5, "--net", "unet", "--half", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "run.json").read_text())
    assert printed["recipe"]["steps"] == 4  # 2.5 * 24 / 16
    assert len(printed["losses"]) == 4
    assert sorted(p.name for p in out.iterdir()) == ["loss.png", "network.safetensors", "run.json"]
    network, record = load_network(out / "network.safetensors")
    assert isinstance(network, pyels.UNet)
    assert network.config["num_classes"] == 3
    assert record["training"]["data"]["dataset"] == str(bank_file)
    assert {v.dtype for v in read_tensors(out / "network.safetensors").values()} == {torch.float16}
    assert run_program(*command(bank_file, tmp_path / "u", "--steps", 2, "--unconditional")) == 0
    assert load_network(tmp_path / "u" / "network.safetensors")[0].config["num_classes"] is None
    more = ("--predicts", "velocity", "--schedule", "flow", "--label-dropout", 0.2)
    assert run_program(*command(bank_file, tmp_path / "d", "--steps", 2, "--net", "dit", *more)) == 0
    network = load_network(tmp_path / "d" / "network.safetensors")[0]
    assert isinstance(network, pyels.DiT)
    assert (network.predicts, network.null_label) == ("velocity", 3)


def test_networks_are_kept_on_the_way(bank_file, tmp_path):
    """They are what a training that ends there makes: the learning rate does not know of the end."""
    steps = {1.5: 2, 3: 4, 4.5: 7}  # 24 images in batches of 16; the last is what the training ends with
    out = tmp_path / "net"
    assert run_program(*command(bank_file, out, "--steps", 7, "--keep", ",".join(map(str, steps)))) == 0
    for epochs, count in steps.items():
        kept, record = load_network(out / f"epoch-{epochs:g}.safetensors")
        assert record["training"]["kept_after"] == {"steps": count, "epochs": round(count * 16 / 24, 3)}
        assert record["training"]["data"]["dataset"] == str(bank_file)
        alone = tmp_path / str(count)
        assert run_program(*command(bank_file, alone, "--steps", count)) == 0
        assert same(kept, load_network(alone / "network.safetensors")[0])


SLOWLY = """
import time
from pyels.networks import training
from pyels.cli import main
training._CHECKPOINT_SECONDS = {}
steps = training._steps
def slowly(*arguments):
    for loss in steps(*arguments):
        time.sleep(0.02)
        yield loss
training._steps = slowly
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_train_command_goes_on_where_it_was_ended(bank_file, tmp_path, end):
    """SIGINT and SIGTERM write a checkpoint at once; SIGKILL leaves the last one, here of the step before."""
    options = ("--steps", "300")
    assert run_program(*command(bank_file, tmp_path / "whole", *options)) == 0
    out = tmp_path / "ended"
    program = [sys.executable, "-c", SLOWLY.format(0.0 if end == signal.SIGKILL else 1e9)]
    process = subprocess.Popen(
        [*program, *command(bank_file, out, *options)], stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "80"}
    )
    seen = b""
    while b"/300 [" not in seen or b"| 0/300" in seen[-90:]:  # tqdm shows it is under way
        seen += process.stderr.read1(200)
        assert process.poll() is None, seen
    time.sleep(0.1)
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    assert (out / CHECKPOINT).exists()
    if end != signal.SIGKILL:
        assert process.returncode == 130
        assert b"interrupted" in err
    assert run_program(*command(bank_file, out, *options)) == 2  # neither by accident
    assert run_program(*command(bank_file, out, *options, "--resume")) == 0
    nets = [load_network(folder / "network.safetensors")[0] for folder in (tmp_path / "whole", out)]
    assert same(*nets)
    assert not (out / CHECKPOINT).exists()
    finished = (out / "network.safetensors").read_bytes()
    for more in ((), ("--resume",)):
        assert run_program(*command(bank_file, out, "--steps", 2, *more)) == 2  # nor is a finished one overwritten
    assert (out / "network.safetensors").read_bytes() == finished


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--steps", 5, "--epochs", 1), "either --steps or --epochs"),
        (("--epochs", -1), "--epochs must be positive"),
        (("--threads", 0), "--threads must be at least 1"),
        (("--device", "tpu"), "device must be cpu or cuda"),
        (("--device", "cuda:99"), "device must be cpu or cuda"),
        (("--width", 0), "width must be at least 1"),
        (("--depth", 0), "depth must be at least 1"),
        (("--net", "unet", "--size", 9, "--steps", 1), "multiples of 4"),
        (("--net", "dit", "--padding", "circular"), "--padding is of networks that convolve"),
        (("--net", "dit", "--size", 9, "--steps", 1), "squares of 2x2 pixels"),
        (("--label-dropout", 0.1, "--unconditional"), "--label-dropout is of networks that are told classes"),
        (("--label-dropout", 1), "label_dropout must lie in [0, 1)"),
        (("--steps", 3, "--keep", "1,3"), "--keep 3: the network takes 3 steps, which are 2 epochs"),
        (("--keep", "0"), "--keep 0: the network takes"),
        (("--learning-rate", 0), "learning_rate must be positive"),
        (("--seed", -1), "seed must be between"),
    ],
    ids=str,
)
def test_bad_options_are_one_line_and_leave_nothing(bank_file, tmp_path, capsys, extra, message):
    assert run_program(*command(bank_file, tmp_path / "net", *extra)) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "training" not in line and line]
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "net").exists()
