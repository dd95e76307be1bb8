import json
import math

import pytest
import torch
from helpers import make_bank, noisy

import pyels
from pyels.cli import main
from pyels.studies import alternatives, bench


def run(*arguments):
    """Exit status of the program run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("k", "alpha", "sigma"), [(3, 0.95, 0.3), (5, 0.3, 0.95)])
@pytest.mark.parametrize("name", ["SDPA", "matmul", "conv2d", "KeOps"])
def test_alternatives_agree_with_the_oracle(name, k, alpha, sigma, channels, monkeypatch):
    if name == "KeOps":
        pytest.importorskip("pykeops")
    # Many chunks, of queries and of patches, the last one smaller.
    monkeypatch.setattr(alternatives, "CACHED_QUERIES", 100)
    monkeypatch.setattr(alternatives, "CACHED_WEIGHTS", 100 * 70)
    monkeypatch.setattr(alternatives, "MATERIALISED_WEIGHTS", 132 * 70)
    bank = make_bank(10, (channels, 12, 11))
    x = noisy(bank, alpha, sigma, batch=2, seed=1)
    evaluation = bench.alternatives()[name](bench.windows(bank.read(slice(None)), k), x, alpha, sigma)
    oracle = pyels.ELS(bank, k, "interior", "reference").denoise(x, alpha, sigma)
    for _ in range(2):  # timed calls repeat it
        assert float((evaluation() - oracle).abs().max()) < 1e-4  # seen: 3.9e-6


def test_operations_of_a_pair():
    # k = 1: difference, square, scaling, comparison, sum, product. Nothing to add up.
    assert bench.operations(1, "circular", (1, 32, 32)) == 6
    # k = 3 by hand: 34 columns for 32 pixels, ten places for eight windows, three additions for two windows.
    assert bench.operations(3, "circular", (3, 32, 32)) == pytest.approx(34 / 32 * (6 * 10 / 8 + 1.5) + 1.5 + 6)
    costs = [bench.operations(k, "zeros", (1, 32, 32)) for k in range(1, 33, 2)]
    assert costs == sorted(costs)


def test_time_of_size():
    sizes = pyels.presets.patch_sizes("fashion-mnist-resnet-zeros")
    assert bench.time_of_size(3) == pytest.approx((1 / 20 + 2 / 20) / 2)
    assert bench.time_of_size(9) == pytest.approx(8 / 20)
    assert bench.time_of_size(17) == pytest.approx((19 / 20 + 20 / 20) / 2)
    assert bench.time_of_size(1) == bench.time_of_size(3)
    assert bench.time_of_size(31) == bench.time_of_size(17)
    times = [bench.time_of_size(k) for k in sorted(set(sizes))]
    assert times == sorted(set(times))


@pytest.fixture
def arguments(tmp_path):
    make_bank(14, (3, 12, 12)).save(tmp_path / "bank.npz")
    options = ("--images", 12, "--size", 12, "--sizes", "5,3", "--repeats", 2, "--seconds", 0.01, "--threads", 1)
    return "bench", "--dataset", tmp_path / "bank.npz", *options, "--out", tmp_path / "out"


@pytest.mark.slow
def test_bench_writes_every_record(arguments, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert run(*arguments, "--batch", 2, "--json") == 0
    assert torch.get_num_threads() == threads
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png", "run.json"]
    assert (tmp_path / "out" / "bench.png").read_bytes()[:4] == b"\x89PNG"

    methods = [("pyels", boundary) for boundary in pyels.ELS.boundaries]
    methods += [(name, "interior") for name in bench.alternatives()]
    records = result["records"]
    assert [(r["patch_size"], r["method"], r["boundary"]) for r in records] == [
        (k, *m) for k in (3, 5) for m in methods
    ]
    for r in records:
        assert 1 <= r["images"] <= 12
        assert 0 < r["seconds_min"] <= r["seconds_median"] <= r["seconds_max"]
        assert r["pairs_per_second"] == r["pairs"] / r["seconds_median"]
        assert math.isfinite(r["pairs_per_second"])
        assert r["error"] < 1e-4
        assert r["ceiling_share"] is None  # of a GPU only
        if r["boundary"] == "interior":
            assert r["pairs"] == 2 * 12**2 * r["images"] * (12 - r["patch_size"] + 1) ** 2
    assert set(result["ceilings"]) == {"multiply_adds_per_second", "exponentials_per_second", "copied_bytes_per_second"}
    assert all(0 < rate < math.inf for rate in result["ceilings"].values())
    assert result["computer"]["isa"] == pyels._core.isa_in_use()

    rates = {(r["method"], r["boundary"], r["patch_size"]): r["pairs_per_second"] for r in records}
    zeros = [
        rates["pyels", "zeros", k] / max(rates[name, "interior", k] for name in bench.alternatives()) for k in (3, 5)
    ]
    summary = result["ratios"]["boundaries"]["zeros"]["over_best_alternative"]
    assert summary["worst"] == pytest.approx(min(zeros))
    assert summary["geometric_mean"] == pytest.approx(math.sqrt(zeros[0] * zeros[1]))


def test_bench_prints_a_table(arguments, capsys):
    assert run(*arguments, "--boundary", "circular", "--boundary", "circular", "--time", 0.5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["best", "k", "3", "5", "geometric", "worst", "ceilings:", "picture:"]
    assert "circular" in lines[0]
    assert lines[2].split()[1] == "0.500"


BAD = [
    (("--images", 0), "--images must be at least 1, got 0"),
    (("--images", 14), "--images 14 and --batch 1 take 15 images, but"),
    (("--batch", 0), "--batch must be at least 1"),
    (("--size", -1), "--size must be at least 1"),
    (("--repeats", 0), "--repeats must be at least 1"),
    (("--sizes", "3,4"), "patch_size must be odd and positive, got 4"),
    (("--sizes", "13"), "patch_size 13 is larger than the 12x12 image"),
    (("--sizes", "13", "--boundary", "zeros"), "patch_size 13 is larger than the 12x12 image"),
    (("--sizes", ""), "--sizes must be integers"),
    (("--boundary", "mirror"), "'mirror' is not one of"),
    (("--time", 0), "--time must be above 0 and at most 1"),
    (("--time", "nan"), "--time must be above 0 and at most 1"),
    (("--seconds", "nan"), "--seconds must be above 0"),
    (("--seed", -1), "seed must be between 0 and"),
    (("--threads", 0), "threads must be between 1 and 4096"),
    (("--engine", "cuda"), "engine 'cuda' is not available"),
    (("--precision", "high"), "--precision high is for ELS with --engine cuda"),
    (("--machines", "els,vae"), "--machines must be of is, es, ls, els"),
    (("--machines", "els", "--boundary", "zeros"), "leave out --sizes and --boundary"),
    (("--dataset", "nowhere"), "'nowhere' is neither one of"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=str)
def test_bad_input_is_one_line_and_status_2(arguments, tmp_path, capsys, extra, message):
    assert run(*arguments, *extra) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pyels: error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_is_not_timed(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "OURS_WITHIN", -1.0)
    assert run(*arguments) == 2
    assert "off the float64 oracle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_machines_cost(arguments, tmp_path, capsys):
    at = arguments.index("--sizes")
    arguments = (*arguments[:at], *arguments[at + 2 :])
    machines = ["els", "els:circular", "is", "wiener", "asls"]
    assert run(*arguments, "--machines", ",".join(machines), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert [one["machine"] for one in result["records"][:5]] == machines
    assert [one["time"] for one in result["records"][::5]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert [one["patch_size"] for one in result["records"][:5]] == [3, 3, None, None, None]
    assert all(0 < one["seconds_min"] <= one["seconds_median"] <= one["seconds_max"] for one in result["records"])
    assert run(*arguments, "--machines", "is,ls", "--time", 0.2, "--out", tmp_path / "other") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["seconds", "t", "is", "ls"]
