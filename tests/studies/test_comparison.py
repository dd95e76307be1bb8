import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from helpers import make_bank, run_program, save_random_diffusers_pipeline

import pyels
from pyels.files import read_tensors
from pyels.machines import MACHINES
from pyels.studies import comparison, intervals, plots, resumable
from pyels.studies.calibration import calibrate

# ---- the figures of a comparison -----------------------------------------------------------------------------------


def test_report_says_what_was_measured():
    generator = torch.Generator().manual_seed(0)
    network = torch.randn(40, 1, 6, 6, generator=generator)
    images = {
        "network": network,
        "els": network + 0.3 * torch.randn(network.shape, generator=generator),
        "is": torch.cat([network[:10], torch.randn((30, 1, 6, 6), generator=generator)]),
    }
    report = comparison.report(images, ["els", "is"], range(40))
    row = {part: report[part]["els"]["pearson_r"] for part in ("median", "quartiles", "interval_95", "per_seed")}
    values = pyels.metrics.pearson_r(network, images["els"])
    assert row["per_seed"] == values.tolist()
    assert row["median"] == pytest.approx(float(values.sort().values[19:21].mean()))
    assert row["quartiles"][0] < row["interval_95"][0] < row["median"] < row["interval_95"][1] < row["quartiles"][1]
    assert report["per_seed"]["is"]["r2_score"][:10] == [1.0] * 10
    wins = report["beats_is"]["els"]
    assert wins["share"] == report["els_beats_is"] == 0.75
    # Wilson's interval of 30 in 40, worked out by hand: (0.75 + 0.04802 -+ 0.14252) / 1.09604.
    assert wins["interval_95"] == pytest.approx([0.59806, 0.85813], abs=1e-4)
    assert intervals.share_interval(50, 50) == pytest.approx([1 / (1 + 1.96**2 / 50), 1], abs=1e-4)
    assert intervals.share_interval(0, 50)[0] == 0
    assert json.loads(json.dumps(report)) == report


def test_the_share_of_dice_in_the_variance_of_the_median():
    """Against what it is of 200 sets of 50 seeds, whose dice are thrown 20 times: 7%, where that of the mean is 1%."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    seeds = normal(200, 50)
    medians = torch.stack([(seeds + 0.1 * normal(200, 50)).quantile(0.5, dim=1) for _ in range(20)])
    share = float(medians.var(0).mean() / medians.var(1).mean())
    found = [comparison._of_dice(one + 0.1 * normal(50), one[:10] + 0.1 * normal(10)) for one in seeds[:20]]
    assert sum(one["share_of_median"] for one in found) / 20 == pytest.approx(share, rel=0.25)
    assert sum(one["sd"] ** 2 for one in found) / 20 == pytest.approx(0.01, rel=0.15)
    assert sum(low < 0.1 < high for low, high in (one["interval_95"] for one in found)) >= 15
    r = seeds[0]
    none = comparison._of_dice(r, r[:10])
    assert (none["seeds"], none["sd"], none["interval_95"]) == (10, 0, [0, 0])
    assert none["sd_over_seeds"] == float(r.std())
    assert none["share_of_median"] < 1e-20
    one = comparison._of_dice(r[:1], r[:1] + 0.1)
    assert (one["sd_over_seeds"], one["share_of_median"]) == (None, None)
    assert one["sd"] == pytest.approx(0.1 / 2**0.5)


@pytest.mark.slow
def test_bootstrap_interval_covers_the_true_median():
    """Of 200 samples of 25 values each, the interval misses the true median of 0 in about 5%; 3% seen."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(200):
        low, high = intervals.median_interval(torch.randn(25, generator=generator, dtype=torch.float64))
        missed += not low <= 0 <= high
    assert 2 <= missed <= 22
    assert intervals.median_interval(torch.tensor([0.5], dtype=torch.float64)) == [0.5, 0.5]


# ---- train, calibrate, compare from the command line ---------------------------------------------------------------

STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def no_check():
    """Of networks that are hardly trained the check takes longer than all else; it has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for command in ("calibrate", "compare"):
            patch.setattr(import_module(f"pyels.cli.{command}"), "check_wiring", lambda network, bank: [])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a bank file, a network trained on it, and its calibration."""
    folder = tmp_path_factory.mktemp("trained")
    make_bank(40, (1, 12, 12), labels=[0, 1] * 20).save(folder / "bank.npz")
    options = ("--width", 8, "--depth", 1, "--steps", 60, "--batch-size", 16, "--learning-rate", 3e-3)
    assert run_program("train", "--dataset", folder / "bank.npz", *options, "--out", folder / "net") == 0
    options = ("--sizes", "7,3,5", "--steps", STEPS, "--num", 3, "--out", folder / "sizes")
    assert run_program("calibrate", "--network", folder / "net", *options) == 0
    return folder


def compare_arguments(trained, out, *more):
    options = ("--patch-sizes", trained / "sizes", "--num", 5, "--seed", 7, "--out", out)
    return ("compare", "--network", trained / "net", *options, *more)


@pytest.mark.slow
def test_calibrate_command(trained, tmp_path, capsys):
    scales = json.loads((trained / "sizes" / "scales.json").read_text())
    assert scales["sizes"] == [3, 5, 7]
    assert len(scales["cosine"]) == len(scales["mse"]) == len(scales["patch_sizes"]) == STEPS
    for row, best in zip(scales["cosine"], scales["patch_sizes"], strict=True):
        assert scales["sizes"][row.index(max(row))] == best
    assert sorted(p.name for p in (trained / "sizes").iterdir()) == [
        "calibration.png",
        "calibration.safetensors",
        "receptive_field.png",
        "run.json",
        "scales.json",
    ]
    samples = read_tensors(trained / "sizes" / "calibration.safetensors")
    assert samples["cosines"].quantile(0.5, dim=0).tolist() == scales["cosine"]
    assert samples["gradients"].shape == (3, STEPS, 12, 12)
    assert scales["boundary"] == "zeros"
    assert scales["labels"] == [0, 1, 0]
    # The file is enough for the same figures from Python.
    network, _ = pyels.adapters.load(trained / "net")
    bank = pyels.datasets.load(trained / "bank.npz")
    noise = torch.stack([resumable.noise_of_seed(seed, bank.shape) for seed in scales["seeds"]])
    again = calibrate(network, pyels.ELS(bank), noise, torch.tensor(scales["labels"]), scales["sizes"], STEPS)
    torch.testing.assert_close(again.cosine, torch.tensor(scales["cosine"]).double(), atol=1e-6, rtol=0)
    # sample takes the file too, and more numbers than a file name may be long.
    options = ("--dataset", trained / "bank.npz", "--num", 1, "--out", tmp_path / "s")
    assert run_program("sample", *options, "--patch-sizes", trained / "sizes" / "scales.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["patch_sizes"] == scales["patch_sizes"]
    many = ("--limit", 2, "--machine", "ls", "--patch-sizes", ",".join(["3"] * 150))
    assert run_program("sample", *options[:-1], tmp_path / "many", *many) == 0


def test_compare_command(trained, tmp_path, capsys):
    out = tmp_path / "theory"
    machines = ("--machines", "els,els:circular,ls,is,es")
    assert run_program(*compare_arguments(trained, out, *machines, "--network-steps", 9, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "comparison.safetensors",
        "matrix.png",
        "pairs.png",
        "report.json",
        "run.json",
        "scatter.png",
    ]
    assert set(report["median"]) == {"els", "els:circular", "ls", "is", "es"}
    assert report["labels"] == [1, 0, 1, 0, 1]  # seed 7 is of class 7 % 2, whatever the first seed
    # Every image can be made again from the record.
    record = json.loads((out / "run.json").read_text())
    images = read_tensors(out / "comparison.safetensors")
    bank = pyels.datasets.load(record["data"]["dataset"])
    network, identity = pyels.adapters.load(record["network"]["source"])
    assert identity["crc32"] == record["network"]["crc32"]
    labels, sizes = torch.tensor(record["labels"]), record["patch_sizes"]
    for name, denoiser, steps, patch_sizes in (
        ("network", network, 9, None),
        ("els", pyels.ELS(bank), STEPS, sizes),
        ("els:circular", pyels.ELS(bank, boundary="circular"), STEPS, sizes),
        ("is", pyels.IS(bank), STEPS, None),
    ):
        again = pyels.sample(denoiser, images["noise"], steps, "cosine", patch_sizes, labels)
        torch.testing.assert_close(again, images[name], atol=1e-5, rtol=0)


def test_what_throws_dice(small):
    sampled = {"engine": "sampled", "tolerance": 0.1}
    machine = pyels.ELS(small, 3, **sampled)
    other = comparison.other_dice(pyels.Guided(machine, 2))
    assert (other.scale, other.denoiser.engine.dice, other.denoiser.engine.tolerance) == (2, 1, 0.1)
    assert other.denoiser.engine._indexes is machine.engine._indexes
    assert machine.engine.dice == 0
    assert comparison.other_dice(other).denoiser.engine.dice == 0
    assert other.settings() == {**machine.settings(), "dice": 1}
    for exact in (pyels.ELS(small, 3), pyels.LS(small, 3, **sampled), pyels.IS(small, **sampled), pyels.Wiener(small)):
        assert comparison.other_dice(exact) is None


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A bank file with enough windows for engine sampled to sample among."""
    path = tmp_path_factory.mktemp("larger") / "bank.npz"
    make_bank(1000, (1, 12, 12), labels=[0, 1] * 500).save(path)
    return path


@pytest.mark.needs(package="faiss")
def test_dice_are_thrown_twice(trained, larger, tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(comparison, "DRAWN_AGAIN", 3)
    options = ("--dataset", larger, "--patch-size", 5, "--steps", 3, "--labels", 0, "--machines", "els,ls,is")
    sampled = (*options, "--engine", "sampled", "--tolerance", 0.1)
    drawn, sample = [], comparison.sample

    def counted(*given, stopped_at=None, **more):
        drawn.append(given)
        if len(drawn) == stopped_at:
            raise KeyboardInterrupt
        return sample(*given, **more)

    def arguments(out, *options):
        return ("compare", "--network", trained / "net", "--num", 5, "--out", tmp_path / out, *options)

    monkeypatch.setattr(comparison, "sample", counted)
    assert run_program(*arguments("whole", *sampled)) == 0
    assert len(drawn) == 5 * 4 + 3
    said = [line for line in capsys.readouterr().out.splitlines() if "other dice" in line]
    assert len(said) == 1
    assert said[0].startswith("ELS: other dice of its engine move r by ")
    assert "(3 seeds drawn twice), other seeds by " in said[0]
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    images = read_tensors(tmp_path / "whole" / "comparison.safetensors")
    assert list(report["dice"]) == ["els"]
    again, record = images["other dice of els"], json.loads((tmp_path / "whole" / "run.json").read_text())
    assert len(again) == report["dice"]["els"]["seeds"] == 3
    assert "dice" not in record
    machine = pyels.ELS(pyels.datasets.load(larger), 5, engine="sampled", tolerance=0.1, dice=1)
    by_hand = pyels.sample(machine, images["noise"][:3], 3, labels=[0] * 3)
    torch.testing.assert_close(again, by_hand, atol=1e-5, rtol=0)
    assert (again - images["els"][:3]).abs().amax((1, 2, 3)).min() > 1e-3
    r = [pyels.metrics.pearson_r(images["network"][:3], one[:3]) for one in (images["els"], again)]
    assert report["dice"]["els"]["sd"] == pytest.approx(float(((r[0] - r[1]).square().mean() / 2).sqrt()))
    # Stopped at the second drawing of the second seed, it goes on to the same.
    drawn.clear()
    monkeypatch.setattr(comparison, "sample", lambda *given, **more: counted(*given, stopped_at=10, **more))
    assert run_program(*arguments("stopped", *sampled)) != 0
    monkeypatch.setattr(comparison, "sample", counted)
    assert run_program(*arguments("stopped", *sampled)) == 0
    assert len(drawn) == 10 + 5 * 4 + 3 - 5
    assert json.loads((tmp_path / "stopped" / "report.json").read_text()) == report
    # By an exact engine nothing is drawn twice, nor said.
    capsys.readouterr()
    assert run_program(*arguments("exact", *options)) == 0
    assert "dice of" not in capsys.readouterr().out
    assert "dice" not in json.loads((tmp_path / "exact" / "report.json").read_text())
    exact = read_tensors(tmp_path / "exact" / "comparison.safetensors")
    assert set(exact) == {"noise", "network", "els", "ls", "is", "labels"}


def test_every_step_and_all_with_all(trained, tmp_path, capsys):
    out = tmp_path / "steps"
    assert run_program(*compare_arguments(trained, out, "--machines", "els,wiener", "--per-step", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (out / "steps.png").exists()
    images = read_tensors(out / "comparison.safetensors")
    network, _ = pyels.adapters.load(trained / "net")
    bank = pyels.datasets.load(trained / "bank.npz")
    sizes, label = json.loads((out / "run.json").read_text())["patch_sizes"], torch.tensor(report["labels"][:1])
    steps, own = [], []
    pyels.sample(network, images["noise"][:1], STEPS, labels=label, callback=steps.append)
    pyels.sample(pyels.ELS(bank), images["noise"][:1], STEPS, "cosine", sizes, label, callback=own.append)
    for i in range(STEPS):
        level = steps[-1 - i].level
        forced = pyels.ELS(bank).denoise(steps[-1 - i].x, level.alpha, level.sigma, label, sizes[i])
        for way, x0 in enumerate((forced, own[-1 - i].x0)):
            expected = [float(f(steps[-1 - i].x0, x0)) for f in comparison.STEP_MEASURES.values()]
            assert images["steps of els"][0, way, i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    summary = report["per_step"]["els"]["along its own"]["mse"]
    assert summary["median"] == images["steps of els"][:, 1, :, 0].quantile(0.5, dim=0).tolist()
    assert all(low <= m <= high for m, (low, high) in zip(summary["median"], summary["interval_95"], strict=True))
    matrix = report["matrix"]
    assert matrix["names"] == ["network", "els", "wiener"]
    assert matrix["median"][0][1] == matrix["median"][1][0] == report["median"]["els"]["pearson_r"]
    assert matrix["interval_95"][0][2] == report["interval_95"]["wiener"]["pearson_r"]


def test_several_numbers_of_steps_in_one_run(trained, tmp_path, capsys, monkeypatch):
    drawn, draw = [], plots.draw_pairs
    monkeypatch.setattr(plots, "draw_pairs", lambda *given: [drawn.append(given[4]), draw(*given)])
    out = tmp_path / "swept"
    counts = ("--steps", f"{STEPS},2", "--network-steps", f"{STEPS},7")
    assert run_program(*compare_arguments(trained, out, "--machines", "els,is", *counts, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    names = ["network", "network@7", "els", "is", "els@2", "is@2"]
    assert report["matrix"]["names"] == names
    assert drawn == [("network", "ELS")]  # not the network with other steps
    assert list(report["beats_is"]) == ["els", "els@2", "is@2"]
    images = read_tensors(out / "comparison.safetensors")
    record = json.loads((out / "run.json").read_text())
    assert (record["steps"], record["network_steps"]) == ([STEPS, 2], [STEPS, 7])
    bank, labels, sizes = (
        pyels.datasets.load(trained / "bank.npz"),
        torch.tensor(report["labels"]),
        record["patch_sizes"],
    )
    again = pyels.sample(pyels.ELS(bank), images["noise"], 2, "cosine", [sizes[1], sizes[3]], labels)
    torch.testing.assert_close(again, images["els@2"], atol=1e-5, rtol=0)
    assert run_program(*compare_arguments(trained, out, "--machines", "els,is", *counts)) == 0
    assert "pearson_r with network@7: ELS " in capsys.readouterr().out


@pytest.mark.slow
def test_any_number_of_jobs_and_threads_compares_alike(trained, tmp_path):
    images = []
    for jobs, threads in ((1, 1), (1, 2), (3, 3)):
        out = tmp_path / f"{jobs}-{threads}"
        assert run_program(*compare_arguments(trained, out, "--jobs", jobs, "--threads", threads)) == 0
        images.append(read_tensors(out / "comparison.safetensors"))
    for other in images[1:]:
        for name, value in images[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_comparison_that_was_interrupted_goes_on(trained, tmp_path):
    options = compare_arguments(trained, tmp_path / "whole", "--num", 30, "--jobs", 2, "--threads", 2)
    assert run_program(*options) == 0
    out = tmp_path / "ended"
    arguments = [str(out) if a == tmp_path / "whole" else str(a) for a in options]
    process = subprocess.Popen([sys.executable, "-m", "pyels", *arguments], stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while time.time() < deadline and len(list((out / "unfinished").glob("0*"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    done = {p: p.stat().st_mtime_ns for p in (out / "unfinished").glob("0*")}
    assert 3 <= len(done) < 30
    os.sync()
    assert run_program(*arguments, "--steps", STEPS, "--schedule", "flow") == 2  # another run
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert run_program(*arguments) == 0
    a, b = (read_tensors(folder / "comparison.safetensors") for folder in (tmp_path / "whole", out))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)
    assert not (out / "unfinished").exists()
    report = (out / "report.json").read_bytes()
    for changed in (("--num", 2), ("--network-steps", 3)):  # finished results are not replaced by others
        assert run_program(*arguments, *changed) == 2
    assert (out / "report.json").read_bytes() == report


def test_results_of_different_commands_do_not_mix(trained, tmp_path, capsys):
    for folder, command in (("net", "train"), ("sizes", "calibrate")):
        before = (trained / folder / "run.json").read_bytes()
        assert run_program(*compare_arguments(trained, trained / folder)) == 2
        assert f"holds results of pyels {command}" in capsys.readouterr().err
        assert (trained / folder / "run.json").read_bytes() == before
    assert run_program("train", "--dataset", trained / "bank.npz", "--steps", 1, "--out", trained / "sizes") == 2
    assert "holds results of pyels calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--machines", "els,vae"),
            f"--machines must be of {', '.join(MACHINES)}, els:zeros, els:circular",
        ),
        (("--machines", "is:,els"), "got 'is:'"),
        (("--schedule", "flow"), "was calibrated along schedule cosine, but --schedule is flow"),
        (("--machines", "ls:zeros"), "got 'ls:zeros'"),
        (("--machines", "is"), "leave out --patch-sizes"),
        (("--steps", 7), f"--patch-sizes has {STEPS} entries for 7 steps"),
        (("--network-steps", 0), "--network-steps must be at least 1"),
        (("--jobs", 0), "--jobs must be at least 1"),
        (("--tolerance", 0.1), "--tolerance and --index are for --machine els with --engine sampled"),
        (
            ("--machines", "ls,is", "--engine", "sampled", "--index", "."),
            "--tolerance and --index are for --machine els",
        ),
        (("--threads", 0), "--threads must be at least 1"),
        (("--num", 0), "num must be at least 1"),
        (("--labels", "0,5"), "label 5: no images of this class"),
        (("--network", "nowhere"), "nowhere: no such file"),
        (("--patch-sizes", "gone.json"), "gone.json: no such file"),
        (("--patch-sizes", "3,3,4,5"), "patch_size must be odd"),
        (("--machines", "els:circular", "--patch-sizes", "3,3,13,15"), "patch_size 13 is larger than the 12x12"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(trained, tmp_path, capsys, extra, message):
    assert run_program(*compare_arguments(trained, tmp_path / "out", *extra)) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_machines_are_compared(trained, tmp_path, capsys):
    assert run_program(*compare_arguments(trained, tmp_path / "out", "--machines", ",".join(MACHINES), "--num", 1)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["median"]) == list(MACHINES)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["engine"] == "cpu"


def test_each_machine_is_told_what_it_takes(trained, tmp_path, capsys):
    """Sizes of one calibration, thresholds and widths of others; each file only for what takes it."""
    options = ("--network", trained / "net", "--num", 1, "--steps", STEPS)
    for name, *of_it in (("pca", "--sizes", "0.02,0.3"), ("ls", "--window", "gaussian")):
        assert run_program("calibrate", *options, "--machine", name, *of_it, "--out", tmp_path / name) == 0
    thresholds, widths = (json.loads((tmp_path / name / "scales.json").read_text()) for name in ("pca", "ls"))
    assert (thresholds["parameter"], thresholds["sizes"]) == ("threshold", [0.02, 0.3])
    assert (widths["parameter"], widths["sizes"]) == ("width", [0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6])
    assert "patch_sizes" not in thresholds
    told = ("--scales", tmp_path / "pca", "--scales", tmp_path / "ls" / "scales.json")
    machines = ("--machines", "els,els:fold,pca,ls:gaussian,is", "--num", 1)
    assert run_program(*compare_arguments(trained, tmp_path / "theory", *told, *machines)) == 0
    record = json.loads((tmp_path / "theory" / "run.json").read_text())
    assert record["per_step"] == {"threshold": thresholds["values"], "width": widths["values"]}
    images = read_tensors(tmp_path / "theory" / "comparison.safetensors")
    bank, labels = pyels.datasets.load(record["data"]["dataset"]), torch.tensor(record["labels"])
    told = {**record["per_step"], "patch_size": record["patch_sizes"]}
    for name, machine in (
        ("els:fold", pyels.ELS(bank, fold="uniform")),
        ("pca", pyels.PCALocality(bank)),
        ("ls:gaussian", pyels.LS(bank, window=pyels.Gaussian(1.0))),
    ):
        per_step = {machine.parameter: told[machine.parameter]}
        again = pyels.sample(machine, images["noise"], STEPS, labels=labels, per_step=per_step)
        torch.testing.assert_close(again, images[name], atol=1e-5, rtol=0)
    one = ("--machines", "pca,els", "--num", 1, "--scales", "threshold=.3")
    assert run_program(*compare_arguments(trained, tmp_path / "o", *one)) == 0
    assert json.loads((tmp_path / "o" / "run.json").read_text())["per_step"] == {"threshold": [0.3] * STEPS}
    draw = ("sample", "--dataset", trained / "bank.npz", "--num", 1, "--json")
    for i, (name, *more) in enumerate(
        (("pca", "--scales", tmp_path / "pca"), ("golden", "--scales", ".3,.02"), ("pca",))
    ):
        capsys.readouterr()
        assert run_program(*draw, "--machine", name, *more, "--out", tmp_path / str(i)) == 0
        values = [thresholds["values"], [0.3, 0.02], None][i]
        assert json.loads(capsys.readouterr().out).get("per_step") == (values and {"threshold": values})


DRAW = ("sample", "--limit", 9, "--machine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DRAW, "els", "--scales", "FILE"), "a threshold for each step, but els takes a patch_size"),
        (
            (*DRAW, "pca", "--scales", "patch_size=3"),
            "--patch-sizes has a patch_size for each step, but pca takes a thres",
        ),
        ((*DRAW, "pca", "--patch-size", 3), "a patch_size for each step, but pca takes a threshold"),
        ((*DRAW, "pca", "--scales", "3,.1"), "threshold must lie in [0, 1], got 3"),
        ((*DRAW, "pca", "--scales", ".1,x"), "--patch-sizes must be numbers separated by commas, such as .02,.05"),
        ((*DRAW, "pca", "--scales", "FILE", "--schedule", "flow"), "was calibrated along schedule cosine"),
        ((*DRAW, "pca", "--window", "gaussian"), "only els and ls have a choice"),
        ((*DRAW, "ls", "--window", "gaussian"), "--patch-sizes is needed, a width for each step"),
        (
            ("--scales", "FILE"),
            "--patch-sizes has a threshold for each step, but els takes a patch_size and ls takes a",
        ),
        (
            ("--machines", "pca,ls:gaussian", "--scales", "threshold=.1"),
            "has a patch_size for each step, but pca takes",
        ),
        (("--machines", "ls,ls:gaussian"), "--patch-sizes is needed, a width for each step"),
        (("--scales", "width=1,2"), "--patch-sizes has 2 entries for 4 steps"),
    ],
    ids=str,
)
def test_what_is_not_a_machines_is_refused_in_words(trained, tmp_path, capsys, arguments, message):
    record = {"parameter": "threshold", "values": [0.1] * STEPS, "schedule": "cosine"}
    (tmp_path / "scales.json").write_text(json.dumps(record))
    given = [tmp_path / "scales.json" if one == "FILE" else one for one in arguments]
    out = ("--out", tmp_path / "out")
    given = (*given, *out) if given[0] == "sample" else compare_arguments(trained, out[1], "--steps", STEPS, *given)
    assert run_program(*given) == 2
    assert message in capsys.readouterr().err
    assert not out[1].exists()


def test_what_a_network_was_trained_on_is_what_it_is_compared_with(trained, tmp_path, capsys):
    bank_file, net = tmp_path / "bank.npz", tmp_path / "net"
    make_bank(30, (1, 16, 16), labels=[0, 1, 2] * 10).save(bank_file)
    options = ("--limit", 20, "--size", 12, "--padding", "circular", "--width", 4, "--depth", 1, "--steps", 2)
    assert run_program("train", "--dataset", bank_file, *options, "--out", net) == 0
    assert run_program("calibrate", "--network", net, "--num", 1, "--steps", 2, "--out", tmp_path / "sizes") == 0
    scales = json.loads((tmp_path / "sizes" / "scales.json").read_text())
    assert scales["boundary"] == "circular"
    assert scales["sizes"] == [3, 5, 7, 9, 11]  # those that fit the torus
    assert scales["data"] == {**scales["data"], "limit": 20, "size": 12}
    assert scales["data"]["bank"]["images"] == 20
    options = ("compare", "--network", net, "--num", 2, "--machines", "els,els:circular,els:zeros")
    sizes = ("--patch-sizes", tmp_path / "sizes" / "scales.json")
    assert run_program(*options, *sizes, "--out", tmp_path / "theory") == 0
    images = read_tensors(tmp_path / "theory" / "comparison.safetensors")
    assert torch.equal(images["els"], images["els:circular"])
    assert not torch.equal(images["els"], images["els:zeros"])
    capsys.readouterr()
    assert run_program(*options, "--out", tmp_path / "o") == 2
    assert "--patch-sizes is needed" in capsys.readouterr().err
    make_bank(30, (1, 16, 16), labels=[0, 1, 2] * 10, seed=9).save(bank_file)
    assert run_program(*options, *sizes, "--out", tmp_path / "o") == 2
    assert "has changed since" in capsys.readouterr().err


def test_bad_calibrations(trained, tmp_path, capsys):
    for extra, message in (
        (("--sizes", "3,4"), "patch_size must be odd"),
        (("--machine", "ls", "--boundary", "zeros"), "only els and asels have one"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--dataset", "gone"), "'gone' is neither one of"),
    ):
        assert run_program("calibrate", "--network", trained / "net", *extra, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "scales.json").write_text('{"sizes": 3}')
    assert run_program(*compare_arguments(trained, tmp_path / "o", "--patch-sizes", tmp_path / "scales.json")) == 2
    assert "not a scales.json of pyels calibrate" in capsys.readouterr().err


FOREIGN = """
import torch, pyels
@torch.no_grad()
def predict(x, t, labels):
    from beside import factor
    return factor * x
def build():
    import beside
    return pyels.NetworkDenoiser(predict, predicts="eps", schedule="edm")
"""


def test_a_network_of_ones_own_is_compared_unchanged(trained, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FOREIGN)
    (tmp_path / "beside.py").write_text("factor = 0.1")
    options = ("--patch-sizes", "3,3,5", "--num", 2, "--network", f"{tmp_path / 'mine.py'}:build")
    assert run_program("compare", *options, "--out", tmp_path / "o") == 2
    assert "--dataset is needed" in capsys.readouterr().err
    options = (*options, "--dataset", trained / "bank.npz")
    assert run_program("compare", *options, "--out", tmp_path / "o") == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["labels"] is None
    assert (
        run_program("calibrate", *options[4:], "--num", 2, "--steps", 2, "--sizes", "3,5", "--out", tmp_path / "c") == 0
    )


@pytest.mark.needs(package="diffusers")
@pytest.mark.filterwarnings("ignore")  # what other packages warn of at import is theirs
def test_a_random_diffusers_unet_goes_through_compare(trained, tmp_path):
    save_random_diffusers_pipeline(tmp_path / "unet", size=12)
    options = ("--network", tmp_path / "unet", "--dataset", trained / "bank.npz", "--patch-sizes", "3,3,5", "--num", 3)
    assert run_program("compare", *options, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["per_seed"]["els"]["pearson_r"]) == 3
    images = read_tensors(tmp_path / "out" / "comparison.safetensors")
    assert torch.isfinite(images["network"]).all()
    options = (*options[:4], "--num", 2, "--steps", 2, "--sizes", "3,5", "--out", tmp_path / "sizes")
    assert run_program("calibrate", *options) == 0
    assert (tmp_path / "sizes" / "receptive_field.png").exists()


def test_guidance_is_of_network_and_machines_alike(trained, tmp_path, capsys):
    data = ("--dataset", trained / "bank.npz")
    options = ("--width", 4, "--depth", 1, "--steps", 5, "--batch-size", 4, "--label-dropout", 0.5)
    assert run_program("train", *data, *options, "--out", tmp_path / "net") == 0
    out = tmp_path / "guided"
    common = ("--num", 2, "--patch-size", 3, "--steps", 3, "--guidance", 2)
    assert run_program("compare", "--network", tmp_path / "net", "--machines", "els", *common, "--out", out) == 0
    images = read_tensors(out / "comparison.safetensors")
    bank = pyels.datasets.load(trained / "bank.npz")
    network, _ = pyels.adapters.load(tmp_path / "net")
    for name, denoiser in (("els", pyels.ELS(bank, 3)), ("network", network)):
        guided = pyels.sample(pyels.Guided(denoiser, 2), images["noise"], 3, labels=[0, 1])
        torch.testing.assert_close(guided, images[name], atol=1e-5, rtol=0)
    sampled = ("sample", *data, *common, "--labels", "0,1", "--out", tmp_path / "drawn")
    assert run_program(*sampled) == 0
    drawn = read_tensors(tmp_path / "drawn" / "samples.safetensors")["samples"]
    torch.testing.assert_close(drawn, images["els"], atol=1e-5, rtol=0)
    capsys.readouterr()
    assert run_program("compare", "--network", trained / "net", *common, "--out", tmp_path / "none") == 2
    assert "null_label" in capsys.readouterr().err
    compared = ("compare", "--network", tmp_path / "net", "--machines", "els", *common, "--out", out)
    for changed in (("--guidance", 3), ("--schedule", "flow")):  # finished results are not replaced by others
        for command in (compared, sampled):
            assert run_program(*command, *changed) == 2
            assert f"finished results with {changed[0][2:]} = " in capsys.readouterr().err
