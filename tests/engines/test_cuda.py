"""Engine "cuda": what can be tested without a GPU, and where there is one the engine itself.

The kernels are tested everywhere in C++, by tests/cpp/test_cuda.cpp.
"""

import contextlib
import functools
import itertools
import json
import types

import pytest
import torch
from helpers import ALPHAS, MACHINES, SIGMAS, TIMES, WRAPPING, check, make_bank, noisy, run_program

import pyels
from pyels import engines
from pyels.engines import cuda, operator

gpu = pytest.mark.gpu

# ---- Without a GPU -------------------------------------------------------------------------------------------------


def test_auto_follows_the_bank_to_its_device(monkeypatch, caplog):
    caplog.set_level("INFO", logger="pyels")
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "default_device", lambda: torch.device("cuda", 0))

    def chosen(name, device):
        bank = types.SimpleNamespace(device=torch.device(device))
        engine = engines.choose_engine(name, pyels.Definition(), bank)
        return engine.name, engine.device

    assert chosen("auto", "cuda:1") == ("cuda", torch.device("cuda", 1))
    assert chosen("auto", "cpu") == ("cpu", torch.device("cpu"))
    assert chosen("cuda", "cpu") == ("cuda", torch.device("cuda", 0))
    assert "the bank is on cuda:1" in caplog.text
    for name in ("cpu", "reference", "sampled"):
        with pytest.raises(ValueError, match=r"on cuda:1; use bank\.to\('cpu'\)"):
            chosen(name, "cuda:1")


@pytest.mark.parametrize(
    ("built", "torch_built", "available", "why"),
    [
        (False, True, True, "built without it.*nvcc"),
        (True, False, False, "torch .* was built without CUDA"),
        (True, True, False, "no GPU, or no driver"),
    ],
)
def test_says_what_is_missing(monkeypatch, small, built, torch_built, available, why):
    monkeypatch.setattr(pyels._core, "HAS_CUDA", built)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert "cuda" not in engines.available_engines()
    with pytest.raises(ImportError, match=f"engine 'cuda' is not available: .*{why}.*engine='cpu'"):
        pyels.ELS(small, 3, engine="cuda")


def test_command_line_says_so_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda, "missing", lambda: "no such thing")
    assert run_program("sample", "--engine", "cuda", "--patch-size", 3, "--num", 1, "--out", tmp_path / "out") == 2
    assert "engine 'cuda' is not available: no such thing" in capsys.readouterr().err


def test_tensor_cores_are_used_only_where_asked_for(pretended_gpu, monkeypatch, small):
    x, seen = noisy(small, 0.6, 0.8), []

    def evaluate(engine, options, *given):
        seen.append(options["tensor_cores"])
        return operator.evaluate("cpu", {"threads": 1}, *given)

    monkeypatch.setattr("pyels.engines.exact.evaluate", evaluate)
    exact = pyels.ELS(small, 3, engine="cuda").denoise(x, 0.6, 0.8)
    allowed = pyels.ELS(small, 3, engine="cuda", precision="high").denoise(x, 0.6, 0.8)
    pyels.LS(small, 3, engine="cuda").denoise(x, 0.6, 0.8)
    assert seen == [False] * 3 + [True] * 3 + [False] * 3  # a bank in three parts
    assert torch.equal(exact, allowed)  # on a CPU, which has none
    for wrong in ("low", 3):
        with pytest.raises(ValueError, match=f"precision must be one of highest, high, got {wrong!r}"):
            pyels.ELS(small, 3, precision=wrong)


def test_sample_refuses_precision_without_the_engine(tmp_path, capsys):
    options = ("--precision", "high", "--patch-size", 3, "--num", 1, "--out", tmp_path / "out")
    assert run_program("sample", *options) == 2
    assert "--precision high is for ELS with --engine cuda" in capsys.readouterr().err


class FakeStream:
    """Streams and events in the order in which the host meets them, since all that they order happens at once."""

    def __init__(self, device=None):
        self.waited = 0

    def wait_event(self, event):
        self.waited += 1

    def synchronize(self):
        pass


class FakeEvent:
    recorded = 0

    def record(self, stream):
        self.recorded += 1

    def wait(self, stream):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def pretended_gpu(monkeypatch):
    """As much of torch.cuda as uploads need, with the CPU as the device; the cpu engine does the work."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **options: plain(*a, **options))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 5 * 72)  # five images of 1x9x8
    monkeypatch.setattr(cuda, "fits", lambda images, device: False)
    for work in ("evaluate", "answer"):
        here = getattr(operator, work)
        on_cpu = functools.partial(lambda here, _, options, *given: here("cpu", {"threads": 1}, *given), here)
        monkeypatch.setattr(f"pyels.engines.exact.{work}", on_cpu)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("kind", MACHINES)
def test_bank_larger_than_the_device_comes_in_parts(pretended_gpu, small, kind, with_labels):
    x = noisy(small, 0.6, 0.8, batch=3)
    labels = torch.tensor([2, 0, 2]) if with_labels else None
    there = MACHINES[kind](small, 3, engine="cuda").posterior(x, 0.6, 0.8, labels)
    here = MACHINES[kind](small, 3, engine="cpu").posterior(x, 0.6, 0.8, labels)
    torch.testing.assert_close(there.mean, here.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.log_evidence, here.log_evidence, rtol=1e-6, atol=1e-5)
    assert torch.equal(there.source, here.source)


def test_streamed_bank_goes_to_the_device_part_by_part(pretended_gpu, tmp_path):
    bank = make_bank(40, (1, 9, 8))
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=600)
    assert streamed.streamed
    x = noisy(bank, 0.6, 0.8, batch=2)
    there = pyels.ELS(streamed, 3, engine="cuda").denoise(x, 0.6, 0.8)
    torch.testing.assert_close(there, pyels.ELS(bank, 3).denoise(x, 0.6, 0.8), rtol=0, atol=1e-6)


SECOND = {
    "fold": pyels.Definition(pyels.Square(3), fold=pyels.Fold(0.5)),
    "inside": pyels.Definition(pyels.Square(3, inside=True), "same_position", fold="uniform"),
    "els": pyels.Definition(pyels.Square(3), "interior"),
    "ls": pyels.Definition(pyels.Square(9), "same_position"),
}


def answers(bank, definition, engine, x, labels=None):
    """The mean, and without a fold its variance and the derivative."""
    machine, leaf = pyels.Machine(bank, definition, engine), x.clone().requires_grad_()
    mean = machine.denoise(leaf, 0.6, 0.8, labels)
    told = [mean.detach()]
    if definition.fold is None:
        (mean * torch.linspace(-1, 1, mean.numel(), device=mean.device).reshape(mean.shape)).sum().backward()
        told += [machine.posterior(x, 0.6, 0.8, labels).variance, leaf.grad]
    return told


@pytest.mark.parametrize("name", SECOND)
def test_folds_variances_and_derivatives_of_a_bank_in_parts(pretended_gpu, small, name):
    x, labels = noisy(small, 0.6, 0.8, batch=3), torch.tensor([2, 0, 2])
    for given in (None, labels):
        there, here = (answers(small, SECOND[name], engine, x, given) for engine in ("cuda", "cpu"))
        for ours, expected in zip(there, here, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_what_the_second_pass_lacks_is_said(pretended_gpu, small):
    x = noisy(small, 0.6, 0.8)
    whole, square = pyels.IS(small, engine="cuda"), pyels.ELS(small, 3, engine="cuda")
    leaf = x.clone().requires_grad_()
    for ask in (
        lambda: whole.posterior(x, 0.6, 0.8).variance,
        lambda: whole.denoise(leaf, 0.6, 0.8).sum().backward(),
        lambda: square.influence(x, 0.6, 0.8),
        lambda: square.sources(x, 0.6, 0.8),
    ):
        with pytest.raises(ValueError, match=r"derivatives of squares, but no influence and no sources.*engine='cpu'"):
            ask()
    for definition, why in (
        (pyels.Definition(pyels.Gaussian(1.0, 3), fold="uniform"), "takes windows"),
        (pyels.Definition(pyels.Square(3), fold="uniform", mirror=True), "mirror images"),
    ):
        with pytest.raises(ValueError, match=f"engine 'cuda' .*{why}"):
            pyels.Machine(small, definition, "cuda")


def test_parts_are_copied_before_their_buffers_are_used_again(pretended_gpu):
    images = torch.arange(23, dtype=torch.uint8).reshape(23, 1, 1, 1).expand(23, 1, 9, 8).contiguous()
    ended = []

    def parts():
        try:
            yield from cuda.chunks(images, range(2, 23), cuda.CHUNK_BYTES)
        finally:
            ended.append(True)

    seen = [
        (numbers.tolist(), pixels[:, 0, 0, 0].tolist()) for numbers, pixels in cuda.upload(parts(), torch.device("cpu"))
    ]
    assert [number for numbers, _ in seen for number in numbers] == list(range(2, 23))
    assert all(numbers == pixels for numbers, pixels in seen)
    assert max(len(numbers) for numbers, _ in seen) == 5
    uploading = cuda.upload(parts(), torch.device("cpu"))
    next(uploading)
    uploading.close()  # as where an engine's error ends the loop
    assert ended == [True, True]


def test_chosen_images_in_parts():
    images = torch.arange(9, dtype=torch.float32).reshape(9, 1, 1, 1)
    which = torch.tensor([1, 4, 8])
    [(numbers, pixels)] = cuda.chunks(images, which, cuda.CHUNK_BYTES)
    assert numbers.tolist() == [1, 4, 8]
    assert pixels.flatten().tolist() == [1, 4, 8]


# ---- With one ------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 11, 14), (4, 13, 7), (6, 9, 9), (1, 40, 37)], ids=str)
def test_every_field_matches_the_oracle(kind, shape):
    bank = make_bank(17, shape, dtype=torch.float32 if shape[0] == 4 else torch.uint8)
    x = noisy(bank, ALPHAS, SIGMAS, batch=len(TIMES))
    ks = [1, 3, 5, 7, 9, 11, 13, 15, 17, 33] if shape[1] < 20 else [3, 17]
    if kind in ("IS", "ES"):
        ks = [1]
    for k in ks:
        if kind in WRAPPING and k > min(shape[1:]):
            continue
        ours = MACHINES[kind](bank, k, engine="cuda").posterior(x, ALPHAS, SIGMAS)
        check(ours, MACHINES[kind](bank, k, engine="reference").posterior(x, ALPHAS, SIGMAS))


@gpu
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 11, 14), (1, 40, 37)], ids=str)
@pytest.mark.parametrize("boundary", pyels.ELS.boundaries)
def test_tensor_cores_match_the_oracle(boundary, shape):
    bank = make_bank(17, shape)
    x = noisy(bank, ALPHAS, SIGMAS, batch=len(TIMES))
    for k in (3, 5, 7):
        ours = pyels.ELS(bank, k, boundary, "cuda", precision="high").posterior(x, ALPHAS, SIGMAS)
        oracle = pyels.ELS(bank, k, boundary, "reference").posterior(x, ALPHAS, SIGMAS)
        # Behind each the worst seen on an emulation (tests/cpp).
        assert float((ours.mean - oracle.mean).abs().max()) < 1e-4  # 3.0e-5
        assert float((ours.log_evidence - oracle.log_evidence).abs().max()) < 2e-3  # 1.3e-3
        assert float((ours.entropy - oracle.entropy).abs().max()) < 3e-4  # 6.0e-5
        assert float((ours.source_weight - oracle.source_weight).abs().max()) < 2e-4  # 5.7e-5


@gpu
@pytest.mark.parametrize("kind", MACHINES)
def test_labels_batches_and_devices(fashion, kind):
    bank = fashion[:60]
    labels = bank.labels[torch.arange(16) * 3 % 60]
    levels = ALPHAS[torch.arange(16) % 9], SIGMAS[torch.arange(16) % 9]
    x = noisy(bank, *levels, batch=16)
    machine = MACHINES[kind](bank.to("cuda"), 7)
    assert machine.engine.name == "cuda"
    together = machine.denoise(x.cuda(), *levels, labels)
    assert together.is_cuda
    assert torch.equal(together.cpu(), MACHINES[kind](bank, 7, engine="cuda").denoise(x, *levels, labels))
    assert torch.equal(together, machine.denoise(x.cuda(), *levels, labels))
    for b in range(16):
        alone = machine.denoise(x[b : b + 1].cuda(), levels[0][b], levels[1][b], labels[b : b + 1])
        assert torch.equal(alone[0], together[b])
    oracle = MACHINES[kind](bank, 7, engine="reference").denoise(x, *levels, labels)
    assert float((together.cpu() - oracle).abs().max()) < 1e-4


@gpu
@pytest.mark.parametrize("kind", MACHINES)
def test_parts_give_what_the_whole_gives(monkeypatch, kind):
    bank = make_bank(50, (1, 12, 12), labels=[i % 3 for i in range(50)])
    x, labels = noisy(bank, 0.8, 0.6, batch=2), torch.tensor([1, 2])
    whole = MACHINES[kind](bank, 3, engine="cuda").posterior(x, 0.8, 0.6, labels)
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 7 * 144)
    monkeypatch.setattr(cuda, "fits", lambda images, device: False)
    parts = MACHINES[kind](bank, 3, engine="cuda").posterior(x, 0.8, 0.6, labels)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-5)
    assert torch.equal(parts.source, whole.source)


@gpu
@pytest.mark.parametrize("name", SECOND)
def test_second_pass_matches_the_oracle(small, name):
    x, labels = noisy(small, 0.6, 0.8, batch=3), torch.tensor([2, 0, 2])
    expected = answers(small, SECOND[name], "reference", x, labels)
    for bank, given in ((small, x), (small.to("cuda"), x.cuda())):
        for ours, oracle in zip(answers(bank, SECOND[name], "cuda", given, labels), expected, strict=True):
            assert ours.device == given.device
            assert float((ours.cpu() - oracle).abs().max()) < 1e-4 * max(1.0, float(oracle.abs().max()))


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_operator_keeps_to_its_stream_and_can_be_captured(small):
    partial_posterior = operator.partial_posterior
    x = noisy(small, 0.6, 0.8, batch=2).cuda()
    level = torch.full((2,), 0.8, dtype=torch.float64)
    begin, end = torch.tensor([0, 5]), torch.tensor([5, 9])
    images, order = small.images.cuda(), small.order.cuda()
    for want, tensor_cores in itertools.product((pyels.Want.MEAN, pyels.Want.POSTERIOR), (False, True)):
        task = {"engine": "cuda", "options": {"tensor_cores": tensor_cores}, "window": 1, "sources": 3, "patch_size": 3}
        given = (order, begin, end, x, level, level, [], json.dumps({**task, "want": int(want), "extra": []}))
        torch.library.opcheck(partial_posterior, (images, *given))
        eager = partial_posterior(images, *given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            partial_posterior(images, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = partial_posterior(images, *given)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    machine = pyels.ELS(small.to("cuda"), 3)
    machine.denoise(x, 0.6, 0.8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = machine.denoise(x, 0.6, 0.8)
    x.copy_(noisy(small, 0.6, 0.8, batch=2, seed=1))
    graph.replay()
    assert torch.equal(captured, machine.denoise(x, 0.6, 0.8))


@gpu
def test_sampling_on_the_device(fashion):
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    here = pyels.sample(pyels.ELS(fashion[:100], 5), noise, steps=4)
    there = pyels.sample(pyels.ELS(fashion[:100].to("cuda"), 5), noise.cuda(), steps=4)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)


@gpu
def test_bench_runs_on_the_device(tmp_path):
    out = tmp_path / "out"
    options = ("--images", 20, "--sizes", "3,9", "--repeats", 1, "--seconds", 0.01, "--engine", "cuda", "--out", out)
    assert run_program("bench", "--dataset", "fashion-mnist-6000", *options) == 0
    result = json.loads((out / "bench.json").read_text())
    assert result["computer"]["gpu"]
    assert all((r["ceiling_share"] is not None) == (r["method"] == "pyels") for r in result["records"])
