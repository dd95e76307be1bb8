"""`pyels check` tells a network that denoises from one that does not, and finds what was said wrongly of it."""

import json

import pytest
import torch
from helpers import make_bank, run_program

import pyels
from pyels.adapters import NetworkDenoiser
from pyels.files import read_tensors
from pyels.schedules import make_schedule
from pyels.studies.check import LEVELS, check, leaves, limit_of, outside


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bank():
    return make_bank(40, (1, 8, 8), labels=[0, 1] * 20)


def knowing(bank, predicts, schedule, time=lambda t: t, half=1.0, middle=0.0):
    """A network that finds the image of the bank in any x, and answers as one of these conventions would; time: what it
    makes of the t that it is told."""
    images = bank.read(slice(0, len(bank)))
    centred = torch.nn.functional.normalize((images - images.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)
    schedule = make_schedule(schedule)

    def function(x, t):
        found = (x - x.mean((1, 2, 3), keepdim=True)).flatten(1) @ centred.T
        x0 = images[found.argmax(dim=1)] * half + middle
        times = time(t.double()).clamp(1e-3, 1).tolist()
        a, s = (
            torch.tensor([f(v) for v in times])[:, None, None, None].float() for f in (schedule.alpha, schedule.sigma)
        )
        eps = (x - a * x0) / s
        answers = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "velocity": eps - x0}
        return answers[predicts]

    return function


def test_a_network_that_denoises_is_beyond_doubt(bank):
    for predicts, schedule in (("eps", "linear"), ("v", "cosine"), ("velocity", "flow"), ("x0", "edm")):
        found = check(NetworkDenoiser(knowing(bank, predicts, schedule), predicts, schedule), bank)
        assert found["doubts"] == []
        assert found["likely"] is None
        assert found["ratio"] < 0.5
        assert found["repeatable"]
        assert found["outside"] == 0
        assert [row["sigma_over_alpha"] for row in found["levels"]] == list(LEVELS)
        for row in found["levels"]:
            assert row["x_over_alpha"] == pytest.approx(row["sigma_over_alpha"] ** 2, rel=0.15)
            assert row["wiener"] < min(row["x_over_alpha"], row["mean_image"])
        assert json.loads(json.dumps(found)) == found


WRONG = {
    "prediction": (("velocity", "flow"), {}, ("eps", "flow"), {}, ["predicts='velocity'"]),
    "v for velocity": (("velocity", "flow"), {}, ("v", "flow"), {}, ["predicts='velocity'"]),
    "scale of time": (("eps", "linear"), {"time": lambda t: (t + 1) / 1000}, ("eps", "linear"), {}, ["1000 * t"]),
    "direction of time": (("velocity", "flow"), {"time": lambda t: 1 - t}, ("velocity", "flow"), {}, ["1 - t for t"]),
    "pixel range": (("v", "cosine"), {"half": 0.5, "middle": 0.5}, ("v", "cosine"), {}, ["pixel_range=(0, 1)"]),
    "schedule": (("eps", "flow"), {}, ("eps", "linear"), {}, ["schedule='flow'"]),
    "two things": (
        ("x0", "flow"),
        {"half": 0.5, "middle": 0.5, "time": lambda t: t / 1000},
        ("eps", "flow"),
        {},
        ["predicts='x0'", "pixel_range=(0, 1)"],
    ),
}


@pytest.mark.filterwarnings("ignore:predicts='v'")
@pytest.mark.parametrize("mistake", WRONG)
def test_the_likely_mistake_is_named(bank, mistake):
    truth, how, said, conventions, named = WRONG[mistake]
    found = check(NetworkDenoiser(knowing(bank, *truth, **how), *said, **conventions), bank, drawn=0)
    assert found["likely"] is not None
    for words in named:
        assert words in found["likely"]
    assert found["likely"] in found["doubts"][0]


def test_torch_may_have_other_defaults(bank):
    network = NetworkDenoiser(knowing(bank, "x0", "cosine"), "x0")
    expected = check(network, bank, drawn=1)
    torch.set_default_dtype(torch.float64)
    try:
        assert check(network, bank, drawn=1) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_other_sign_is_found(bank):
    function = knowing(bank, "velocity", "flow")
    found = check(NetworkDenoiser(lambda x, t: -function(x, t), "velocity", "flow"), bank, drawn=0)
    assert "the other sign of the output" in found["likely"]


def test_an_untrained_network_is_said_to_be_none(bank):
    found = check(NetworkDenoiser(lambda x, t: 0 * x, "eps"), bank, drawn=0)
    assert found["likely"] is None
    assert "it is untrained, or wired wrongly" in found["doubts"][0]
    torch.manual_seed(0)
    found = check(pyels.adapters.from_pyels(pyels.ResNet(width=4, depth=1)), bank, drawn=0)
    assert found["ratio"] > 1


def test_answers_that_differ_are_noticed(bank):
    knows = knowing(bank, "x0", "cosine")
    for spoiled in (
        lambda x, t: knows(x, t) + 0.1 * torch.randn(x.shape),
        lambda x, t: torch.nn.functional.dropout(knows(x, t), 0.1, training=True),
        lambda x, t: knows(x, t) - x.mean(0) / 10,  # of the batch
    ):
        found = check(NetworkDenoiser(spoiled, "x0"), bank, drawn=0, try_all=False)
        assert not found["repeatable"]
        assert "differently from call to call" in found["doubts"][0]


def test_networks_that_reach_few_levels(bank):
    found = check(NetworkDenoiser(lambda x: 0.5 * x, "x0", 0.4), bank)
    assert [row["network"] is None for row in found["levels"]] == [level != 0.4 for level in LEVELS]
    assert found["range"] is None
    with pytest.raises(ValueError, match="reaches none of the levels"):
        check(NetworkDenoiser(lambda x: x, "x0", 0.3), bank)


def test_classes_are_told_to_those_that_know_them(bank):
    seen = []
    knows = knowing(bank, "x0", "cosine")
    network = NetworkDenoiser(lambda x, t, y: (seen.extend(y.tolist()), knows(x, t))[1], "x0", num_classes=2)
    assert check(network, bank, labels=[0, 1])["doubts"] == []
    assert set(seen) == {0, 1}
    assert check(pyels.IS(bank), bank)["doubts"] == []  # a machine is a denoiser too


def test_what_lies_outside():
    bank = pyels.PatchBank(torch.linspace(-3, 3, 256).reshape(1, 4, 8, 8))
    assert limit_of(bank) == 3
    images = torch.tensor([-4.0, 0.0, 3.1, 3.2]).reshape(1, 1, 2, 2)
    assert outside(images, 3.0) == 0.25
    assert leaves("x leaves", images, 3.0) == (
        "x leaves the data's range [-3, 3] at 25% of the pixels, which reach from -4 to 3.2; --clip keeps them within"
    )


# ---- from the command line -----------------------------------------------------------------------------------------

FILE = """
import torch
import pyels
bank = pyels.datasets.load({path!r})
machine = pyels.LS(bank, 3, threads=1)

def x0(x, t, y):
    alpha, sigma = torch.cos(t.double() * 1.56), torch.sin(t.double() * 1.56)
    return machine.denoise(x, alpha.clamp(min=0), sigma.clamp(min=1e-6))

class Schedule:
    def alpha(self, t):
        import math
        return math.cos(t * 1.56)
    def sigma(self, t):
        import math
        return math.sin(t * 1.56)

good = pyels.NetworkDenoiser(x0, "x0", Schedule())
wild = pyels.NetworkDenoiser(lambda x, t, y: 3 * x0(x, t, y), "x0", Schedule())
wrong = pyels.NetworkDenoiser(x0, "eps", Schedule())
random = pyels.NetworkDenoiser(lambda x, t, y: x0(x, t, y) + torch.randn(x.shape), "x0", Schedule())
conditional = pyels.NetworkDenoiser(x0, "x0", Schedule(), num_classes=2)
guided = pyels.Guided(pyels.NetworkDenoiser(x0, "x0", Schedule(), null_label=2), 2)
large = pyels.NetworkDenoiser(x0, "x0", Schedule(), size=(16, 16))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory, bank):
    folder = tmp_path_factory.mktemp("mine")
    bank.save(folder / "bank.npz")
    (folder / "mine.py").write_text(FILE.format(path=str(folder / "bank.npz")))
    return lambda name: ("--network", f"{folder / 'mine.py'}:{name}", "--dataset", folder / "bank.npz", "--threads", 1)


def test_check_command(mine, capsys):
    assert run_program("check", *mine("good")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing seems wrong"
    assert run_program("check", *mine("wrong"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["likely"] == "predicts='x0'"
    assert len(found["network"]["crc32"]) == 8
    assert run_program("check", *mine("wild"), "--clip") == 0
    assert "--clip keeps them" not in capsys.readouterr().out
    assert run_program("check", *mine("large")) == 0
    assert "the network is for images of 16x16, the data set's have 8x8: --size?" in capsys.readouterr().err


def compare(mine, name, out, *more):
    options = ("--patch-size", 3, "--steps", 3, "--num", 2, "--machines", "els,is", "--out", out)
    return run_program("compare", *mine(name), *options, *more)


def test_a_comparison_says_what_is_doubtful(mine, tmp_path, capsys):
    assert compare(mine, "wrong", tmp_path / "wrong") == 0
    told = capsys.readouterr()
    assert "pyels: the network may not be what it should be: it denoises worse than a linear filter" in told.err
    assert "likely predicts='x0'" in told.out
    assert compare(mine, "wild", tmp_path / "wild", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outside"]["network"] > 0.1
    assert report["outside"]["els"] == report["outside"]["is"] == 0
    assert any(doubt.startswith("network leaves the data's range [-1, 1]") for doubt in report["doubts"])
    assert compare(mine, "wild", tmp_path / "clipped", "--clip") == 0
    assert float(read_tensors(tmp_path / "clipped" / "comparison.safetensors")["network"].abs().max()) <= 1
    assert json.loads((tmp_path / "clipped" / "run.json").read_text())["network"]["clip"] == 1
    assert json.loads((tmp_path / "clipped" / "run.json").read_text())["patch_sizes"] == [3, 3, 3]


def test_networks_that_answer_differently_are_not_compared(mine, tmp_path, capsys):
    for command in ("compare", "calibrate"):
        sizes = ("--patch-size", 3) if command == "compare" else ("--sizes", 3)
        assert run_program(command, *mine("random"), *sizes, "--num", 1, "--out", tmp_path / command) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("pyels: error: the network cannot be compared: it answers the same images differently")
        assert not (tmp_path / command).exists()


def test_one_size_for_all_steps_or_several(mine, tmp_path, capsys):
    for more, message in (
        (("--patch-sizes", "3,3,3"), "give either --patch-size or --patch-sizes, not both"),
        (("--machines", "is"), "leave out --patch-size"),
        (("--patch-size", "4"), "patch_size must be odd and positive, got 4"),
    ):
        assert compare(mine, "good", tmp_path / "x", *more) == 2
        assert message in capsys.readouterr().err


def test_guided_networks_are_compared_with_classes(mine, tmp_path):
    assert compare(mine, "guided", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["labels"] == [0, 1]


def test_a_network_draws_samples(mine, tmp_path, capsys):
    out = tmp_path / "drawn"
    assert run_program("sample", *mine("good"), "--num", 2, "--steps", 3, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"] is None
    assert result["network"]["source"].endswith("mine.py:good")
    drawn = read_tensors(out / "samples.safetensors")
    network, _ = pyels.adapters.load(result["network"]["source"])
    torch.testing.assert_close(pyels.sample(network, drawn["noise"], 3), drawn["samples"], atol=1e-5, rtol=0)
    assert run_program("sample", *mine("conditional"), "--num", 3, "--steps", 2, "--out", tmp_path / "classes") == 0
    assert read_tensors(tmp_path / "classes" / "samples.safetensors")["labels"].tolist() == [0, 1, 0]
    assert run_program("sample", *mine("wild"), "--num", 2, "--steps", 2, "--out", tmp_path / "wild") == 0
    assert "samples leave the data's range" in capsys.readouterr().out
    for more, message in (
        (("--patch-size", 3), "networks have no windows"),
        (("--machine", "is"), "--machine is for machines: leave it out, or --network"),
        (("--engine", "cpu"), "--engine is for machines"),
        (("--shard", "bank"), "--shard bank is for machines of one definition; others draw with --shard seeds"),
    ):
        assert run_program("sample", *mine("good"), *more, "--out", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
    assert run_program("sample", *mine("good")[2:], "--patch-size", 3, "--clip", "--out", tmp_path / "no") == 2
    assert "--clip and --device are for --network" in capsys.readouterr().err
