"""The study of cost and error against the size of the bank: its methods, its banks, its figures, and the program."""

import json
import math
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy, partial, run_program

import pyels
from pyels.files import read_tensors
from pyels.sampling import Level
from pyels.studies import bench, resumable, rivals, scaling
from pyels.studies.rivals import Method

LEVEL = Level(0.5, 0.8, 0.6)


# ---- Methods --------------------------------------------------------------------------------------------------------


@pytest.mark.needs(package="faiss")
@pytest.mark.parametrize("boundary", pyels.ELS.boundaries)
@pytest.mark.parametrize(("shape", "dtype"), [((1, 9, 8), torch.uint8), ((3, 8, 11), torch.float32)], ids=str)
def test_top_of_all_windows_is_exact(boundary, shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "_COMPRESSED_AT_ONCE", 300)  # several parts, the last one smaller
    monkeypatch.setattr(rivals, "_GATHERED_AT_ONCE", 1 << 16)
    bank = make_bank(12, shape, dtype=dtype)
    x = noisy(bank, LEVEL.alpha, LEVEL.sigma)
    top = rivals.prepare("top", bank, boundary, 5, 1, tmp_path)
    mean, stated = top.evaluate(x, LEVEL, 2000)  # more than there are
    exact = pyels.ELS(bank, 5, boundary).denoise(x, LEVEL.alpha, LEVEL.sigma)
    if boundary == "zeros":
        exact = exact[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(mean, exact, atol=2e-5, rtol=0)  # seen: 1e-6
    assert torch.isinf(stated).all()
    assert top.index_bytes > 0


@pytest.mark.needs(package="faiss")
def test_top_weighs_the_nearest_alone(tmp_path):
    bank = make_bank(12, (1, 9, 8))
    x = noisy(bank, LEVEL.alpha, LEVEL.sigma)
    mean, _ = rivals.prepare("top", bank, "zeros", 3, 1, tmp_path).evaluate(x, LEVEL, 4)
    patches, queries = (bench.windows(images, 3).flatten(1) for images in (bank.read(slice(None)), x))
    distances = (queries[:, None] - LEVEL.alpha * patches).square().sum(2)
    nearest = distances.topk(4, largest=False)
    weights = (nearest.values / (-2 * LEVEL.sigma**2)).softmax(1)
    expected = (weights * patches[nearest.indices, 4]).sum(1)
    full = pyels.ELS(bank, 3).denoise(x, LEVEL.alpha, LEVEL.sigma)[:, :, 1:-1, 1:-1].flatten()
    off, apart = ((means.flatten() - expected).square().mean().sqrt() for means in (mean, full))
    assert off < 0.3 * apart  # compressed distances put another window among the four now and then


def test_subset_is_exact_on_its_share(tmp_path):
    bank = make_bank(40, (1, 8, 8))
    x = noisy(bank, LEVEL.alpha, LEVEL.sigma)
    subset = rivals.prepare("subset", bank, "zeros", 3, 1, tmp_path)
    few, _ = subset.evaluate(x, LEVEL, 0.01)  # a single image
    exact = [pyels.ELS(bank[i : i + 1], 3).denoise(x, LEVEL.alpha, LEVEL.sigma) for i in range(40)]
    assert min(float((few - mean).abs().max()) for mean in exact) < 1e-6
    all_of_them, _ = subset.evaluate(x, LEVEL, 0.99)
    torch.testing.assert_close(all_of_them, pyels.ELS(bank, 3).denoise(x, LEVEL.alpha, LEVEL.sigma), atol=1e-5, rtol=0)
    again = rivals.prepare("subset", bank, "zeros", 3, 1, tmp_path)
    assert torch.equal(again.evaluate(x, LEVEL, 0.3)[0], subset.evaluate(x, LEVEL, 0.3)[0])


@pytest.mark.needs(package="faiss")
def test_faiss_states_its_error(tmp_path):
    bank = make_bank(60, (1, 12, 12))
    x = noisy(bank, LEVEL.alpha, LEVEL.sigma)
    prepared = rivals.prepare("sampled", bank, "zeros", 5, 1, tmp_path / "index")
    mean, stated = prepared.evaluate(x, LEVEL, 0.05)
    machine = pyels.ELS(bank, 5, engine="faiss", index=tmp_path / "index", tolerance=0.05)
    assert torch.equal(mean, machine.denoise(x, LEVEL.alpha, LEVEL.sigma))
    error, certified = partial(machine, x, LEVEL.alpha, LEVEL.sigma).error()
    assert torch.equal(stated, torch.where(certified, torch.inf, error))
    assert stated.isinf()[0, 0].all()
    assert prepared.index_bytes == (tmp_path / "index" / "k5.safetensors").stat().st_size


@pytest.mark.needs(package="faiss")
def test_what_takes_too_much_is_left_out():
    top, shape = Method("top", 100), (1, 10, 12)
    needed = rivals.BUILDING["top"] * 50 * 8 * 10
    assert rivals.left_out(top, 50, shape, "zeros", 3, needed) is None
    assert "k = 3 takes" in rivals.left_out(top, 50, shape, "zeros", 3, needed - 1)
    assert rivals.left_out(top, 50, shape, "circular", 3, needed) is not None  # more windows
    assert "no window of size 11" in rivals.left_out(top, 50, shape, "zeros", 11, needed)
    assert rivals.left_out(Method("sampled", 0.1), 50, shape, "zeros", 3, 1) is None  # built out of core
    assert rivals.left_out(Method("subset", 0.1), 50, shape, "zeros", 3, 1) is None


# ---- Banks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_grown_banks_are_nested_and_repeatable(dtype, monkeypatch):
    monkeypatch.setattr(scaling, "_MADE_AT_ONCE", 7)
    bank = make_bank(20, (3, 10, 12), dtype=dtype)
    large = scaling.grown(bank, 50, seed=1)
    assert large.dtype == dtype
    assert torch.equal(scaling.grown(bank, 50, seed=1).images, large.images)
    for images in (5, 20, 23, 27, 41):
        assert torch.equal(scaling.grown(bank, images, seed=1).images, large.images[:images])
    assert not torch.equal(scaling.grown(bank, 50, seed=2).images, large.images)
    real, made = large.images[:20].flatten(1).double(), large.images[20:].flatten(1).double()
    assert sorted(map(tuple, real.tolist())) == sorted(map(tuple, bank.images.flatten(1).double().tolist()))
    assert torch.cdist(made, real).min() > 0
    assert torch.cdist(made, made).fill_diagonal_(1).min() > 0


def test_synthetic_images_are_distorted_real_ones(fashion):
    """Nearer to a real image than other real ones are, on average, and black where these are."""
    bank = fashion[:100]
    pixels = scaling.grown(bank, 300, seed=0).read(slice(None)).flatten(1)
    real, made = pixels[:100], pixels[100:]
    assert made.min() >= -1
    assert made.max() <= 1
    assert (made == -1).float().mean() > 0.3
    apart = torch.cdist(real, real).fill_diagonal_(math.inf)
    assert torch.cdist(made, real).amin(1).median() < 1.3 * apart.amin(1).median()
    assert torch.cdist(made, real).amin(1).median() > 0.3 * apart.amin(1).median()


# ---- Figures --------------------------------------------------------------------------------------------------------


def test_fit_finds_the_exponent():
    power = scaling.fit({n: 3e-4 * n**0.4 for n in (1000, 3000, 10_000, 60_000)})
    assert power["exponent"] == pytest.approx(0.4)
    assert power["standard_error"] == pytest.approx(0, abs=1e-9)
    assert power["factor"] == pytest.approx(3e-4)
    costs = {1000: 1.0, 3000: 2.7, 10_000: 11.0, 30_000: 24.0, 60_000: 71.0}
    power = scaling.fit(costs)
    logs = [np.log(list(values)) for values in (costs, costs.values())]
    (slope, _), covariance = np.polyfit(*logs, 1, cov=True)
    assert power["exponent"] == pytest.approx(slope)
    assert power["standard_error"] == pytest.approx(math.sqrt(covariance[0, 0]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_added_memory_is_that_of_the_peak_without_mapped_files(tmp_path):
    path, size = tmp_path / "large", 1 << 26
    path.write_bytes(bytes(size))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        scaling._added(lambda: None)
        assert scaling._added(lambda: None) < size / 8
        assert 0.9 * size < scaling._added(lambda: torch.ones(size // 4)) < 1.1 * size
        assert scaling._added(lambda: sum(mapped[::4096])) < size / 8  # 65 MB of the file are resident


# ---- The program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    make_bank(40, (1, 12, 12)).save(tmp_path / "bank.npz")
    options = ("--images", "50,20,30", "--patch-sizes", "3,3,5", "--num", 2, "--seed", 4, "--threads", 1)
    options += ("--tolerance", "0.1", "--subset", "0.5,0.1", "--top", "10")
    return ("scaling", "--dataset", tmp_path / "bank.npz", *options, "--out", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.needs(package="faiss")
def test_the_study(arguments, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert run_program(*arguments, "--json") == 0
    assert torch.get_num_threads() == threads
    out = tmp_path / "out"
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "cost.png",
        "error.png",
        "report.json",
        "run.json",
        "scaling.safetensors",
    ]
    names = ["exact", "sampled 0.1", "subset 0.5", "subset 0.1", "top 10"]
    records = {(r["images"], r["method"]): r for r in report["records"]}
    assert list(records) == [(n, name) for n in (20, 30, 50) for name in names]
    assert [records[n, "exact"]["synthetic"] for n in (20, 30, 50)] == [0, 0, 10]
    assert [step["patch_size"] for step in report["steps"]] == [5, 3, 3]

    measured = read_tensors(out / "scaling.safetensors")
    assert measured["seconds"].shape == (3, 3, 5, 2)
    loaded = pyels.datasets.load(tmp_path / "bank.npz")
    bank = scaling.grown(loaded, 30, seed=4)
    # The noisy images are those on the exact machine's way from the seeds' noise.
    noise = torch.stack([resumable.noise_of_seed(seed, bank.shape) for seed in (4, 5)])
    passed = []
    pyels.sample(pyels.ELS(bank), noise, 3, patch_sizes=[3, 3, 5], callback=passed.append)
    for step, x, mean in zip(passed, measured["x"][1], measured["exact_mean"][1], strict=True):
        torch.testing.assert_close(x, step.x, atol=1e-4, rtol=0)
        torch.testing.assert_close(mean, step.x0, atol=1e-4, rtol=0)
    # What is said of a method is what one finds by asking it.
    for m, name in ((2, "subset 0.5"), (4, "top 10")):
        method = Method(*name.split()[:1], float(name.split()[1]))
        prepared = rivals.prepare(method.kind, bank, "zeros", 3, 1, tmp_path / "index")
        level = pyels.sampling.noise_levels(3, pyels.schedules.make_schedule("cosine"))[2]
        error = torch.zeros(1, 1, 12, 12)
        mean, _ = prepared.evaluate(measured["x"][1, 2, 1:], level, method.value)
        inner = slice(1, -1) if method.kind == "top" else slice(None)
        error[:, :, inner, inner] = mean - measured["exact_mean"][1, 2, 1:, :, inner, inner]
        assert float(measured["rms"][1, 2, m, 1]) == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)
        assert float(measured["worst"][1, 2, m, 1]) == pytest.approx(float(error.abs().max()), rel=1e-3)
        record = records[30, name]
        per_seed = measured["rms"][1, :, m]
        assert record["worst_rms_error"]["max"] == pytest.approx(float(per_seed.max()))
        assert record["rms_error_of_steps"] == pytest.approx(per_seed.square().mean(1).sqrt().tolist())
        per_sample = measured["seconds"][1, :, m].sum(0)
        assert record["seconds_per_sample"]["min"] == pytest.approx(float(per_sample.min()))
        assert record["seconds_per_sample"]["median"] == pytest.approx(float(per_sample.mean()))
        assert record["seconds_per_step"]["max"] == pytest.approx(float(per_sample.max()) / 3)
    assert "rms_error" not in records[20, "exact"]
    assert records[50, "subset 0.1"]["bank_megabytes"] == pytest.approx(5 * 144 / 1e6)
    sampled = records[50, "sampled 0.1"]
    estimated, missed = (measured[name][2, :, 1].sum() for name in ("estimated", "missed"))
    assert sampled["stated_error_missed"] == pytest.approx(float(missed / estimated))
    assert sampled["stated_error_missed"] < 0.1
    assert sampled["index_megabytes_of_all"] > sampled["index_megabytes"] > 0
    assert report["exponents"]["exact"].keys() == {"all"}  # of real images there are two sizes
    assert report["exponents"]["exact"]["all"]["images"] == [20, 30, 50]
    assert run_program(*arguments, "--images", "20,30,40") == 2
    assert "holds finished results with images = [20, 30, 50], now [20, 30, 40]" in capsys.readouterr().err


def test_no_exponent_of_a_few_images(tmp_path, capsys):
    make_bank(20, (1, 8, 8)).save(tmp_path / "bank.npz")
    few = (
        "--images",
        "2,4,8,16",
        "--patch-sizes",
        "3",
        "--num",
        1,
        "--threads",
        1,
        "--subset",
        "0.5",
        "--tolerance",
        "none",
    )
    assert (
        run_program("scaling", "--dataset", tmp_path / "bank.npz", *few, "--top", "none", "--out", tmp_path / "out")
        == 0
    )
    assert "no exponent of exact: it takes 3 sizes of at least 10 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["exponents"]["exact"] == {}


@pytest.mark.needs(package="faiss")
def test_table(arguments, capsys):
    # 40 * 64 windows of k = 5 and 40 * 100 of k = 3: the first two sizes fit for top, and all for sampled.
    limit = rivals.BUILDING["top"] * 30 * 100
    assert run_program(*arguments, "--memory-limit", limit) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines[1:16]}
    assert "left out: building its index for k = 3 takes" in rows["50", "top"]
    assert "left out" not in rows["30", "top"]
    assert not any("left out" in rows[n, "sampled"] for n in ("20", "30", "50"))
    exponents = [line for line in lines if " ~ images^(" in line]
    assert [line.split()[2] for line in exponents] == ["exact", "sampled", "subset", "subset"]
    assert all(line.endswith("20 to 50 images, some synthetic") for line in exponents)
    assert lines[-1].startswith("pictures: ")


@pytest.mark.slow
def test_a_study_that_was_interrupted_goes_on(arguments, tmp_path, monkeypatch, capsys):
    options = (*arguments[:-2], "--tolerance", "none", "--top", "none")
    assert run_program(*options, "--out", tmp_path / "whole") == 0
    capsys.readouterr()
    prepare, out = rivals.prepare, tmp_path / "out"

    def interrupted(kind, bank, boundary, k, threads, folder):
        folder.mkdir(exist_ok=True)  # as an index would be
        if len(bank) == 30 and k == 3:
            raise KeyboardInterrupt
        return prepare(kind, bank, boundary, k, threads, folder)

    monkeypatch.setattr(rivals, "prepare", interrupted)
    assert run_program(*options, "--out", out) == 130
    done = {path: path.stat().st_mtime_ns for path in (out / "unfinished").glob("0*")}
    assert len(done) == 3 + 1
    assert not (out / "unfinished" / "index").exists()
    assert run_program(*options, "--out", out, "--num", 3) == 2
    assert "holds an unfinished run with seeds" in capsys.readouterr().err
    sizes = []

    def watched(kind, bank, *more):
        assert all(path.stat().st_mtime_ns == at for path, at in done.items())
        sizes.append(len(bank))
        return prepare(kind, bank, *more)

    monkeypatch.setattr(rivals, "prepare", watched)
    assert run_program(*options, "--out", out) == 0
    assert set(sizes) == {30, 50}
    assert not (out / "unfinished").exists()
    whole, resumed = (read_tensors(folder / "scaling.safetensors") for folder in (tmp_path / "whole", out))
    for name in ("x", "exact_mean", "rms", "worst"):
        assert torch.equal(whole[name], resumed[name])


def test_an_interruption_before_anything_was_finished_leaves_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_program(*arguments) == 130
    assert not (tmp_path / "out").exists()


def test_without_faiss(arguments, tmp_path, monkeypatch, capsys):
    for module in (rivals, scaling):
        monkeypatch.setattr(module, "can_build", lambda: False)
    assert run_program(*arguments) == 0
    out = capsys.readouterr().out
    assert out.count("left out: faiss is not installed: pip install pyels[faiss]") == 2 * 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["computer"]["faiss"] is None
    assert report["exponents"]["top 10"] == {}
    assert "seconds_per_sample" in report["records"][2]
    assert (tmp_path / "out" / "error.png").read_bytes()[:4] == b"\x89PNG"


BAD = [
    (("--images", "0,10"), "--images must be at least 1, got 0"),
    (("--images", "ten"), "--images must be integers"),
    (("--images", 10**9), "--images 1000000000 takes 144000000000 bytes, more than"),
    (("--tolerance", "0"), "--tolerance must be positive and finite, got 0"),
    (("--tolerance", ""), "--tolerance must be none or numbers"),
    (("--subset", "0.1,1"), "--subset must be above 0 and below 1, got 1"),
    (("--subset", ".1,.2,.3,.4,.5"), "--subset takes up to 4 numbers, got 5"),
    (("--top", "2.5"), "--top must be whole numbers from 1 on, got 2.5"),
    (("--patch-sizes", "3,4"), "patch_size must be odd"),
    (("--patch-sizes", "3,13", "--boundary", "circular"), "patch_size 13 is larger than the 12x12 image"),
    (("--steps", 7), "--patch-sizes has 3 entries for 7 steps"),
    (("--num", 0), "num must be at least 1"),
    (("--seed", -1), "seed must be between 0 and"),
    (("--threads", 0), "threads must be between 1 and 4096"),
    (("--memory-limit", "much"), "memory_limit must be bytes"),
    (("--dataset", "nowhere"), "'nowhere' is neither one of"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=str)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, tmp_path, capsys, extra, message):
    assert run_program(*arguments, *extra) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path(tmp_path / "out").exists()
