"""Several processes. Most are started here as torchrun starts them, which is quicker than torchrun itself."""

import json
import os
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import click
import pytest
import torch
import torch.distributed as dist
from helpers import MACHINES, make_bank, noisy
from helpers import run_program as run

import pyels
from pyels import distributed
from pyels.bank.file_images import FileImages
from pyels.cli import program
from pyels.files import read_tensors
from pyels.studies import resumable

PYELS = ("-m", "pyels")
LONG = timedelta(seconds=120)

pytestmark = pytest.mark.torchrun


class Processes:
    """As many processes as there are command lines, in one group, ended when the block is left.

    This process keeps the store that they meet at, as torchrun does.
    """

    def __init__(self, folder, *command_lines):
        self.folder = folder
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LONG, wait_for_workers=False)
        self.processes = [self._start(rank, len(command_lines), line) for rank, line in enumerate(command_lines)]

    def _start(self, rank, size, line):
        group = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        environment = {**os.environ, **{name: str(value) for name, value in group.items()}}
        with open(self.folder / f"out-{rank}", "wb") as out, open(self.folder / f"err-{rank}", "wb") as err:
            return subprocess.Popen(
                [sys.executable, *map(str, line)], env=environment, stdout=out, stderr=err, cwd=self.folder
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self):
        """The exit status of each, once all have ended."""
        return [process.wait(LONG.total_seconds()) for process in self.processes]

    def printed(self, stream="err"):
        """All lines of all processes, without progress bars."""
        text = "\n".join((self.folder / f"{stream}-{rank}").read_text() for rank in range(len(self.processes)))
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
        return [line for line in lines if line and not line.startswith("sampling:")]


def wait_for(file, process):
    deadline = time.time() + LONG.total_seconds()
    while not file.exists():
        assert process.poll() is None, "ended too early"
        assert time.time() < deadline
        time.sleep(0.02)


@contextmanager
def torchrun(folder, *arguments):
    """torchrun with two processes, each of which leaves its number in the folder as pid-RANK."""
    script = folder / "leaves_pid.py"
    script.write_text(
        "import os, pathlib, sys\nimport pyels.cli\n"
        "pathlib.Path(__file__).with_name('pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "pyels.cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", script]
    with open(folder / "err", "wb") as err:
        process = subprocess.Popen([str(part) for part in (*command, *arguments)], stderr=err)
    try:
        yield process
    finally:
        process.terminate()  # which ends its processes too
        process.wait(60)


def samples_of(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", "samples.png", "samples.safetensors"]
    return read_tensors(folder / "samples.safetensors")["samples"]


GO_ON = "finished samples are kept: repeat the command to go on"
SMALL = ("sample", "--limit", 200, "--steps", 4, "--num", 3, "--patch-size", 5)
LONGER = ("sample", "--limit", 300, "--steps", 10, "--num", 6, "--patch-size", 7, "--boundary", "interior")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the longer run, by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(*LONGER, "--out", out) == 0
    return out


def test_torchrun_with_a_shared_bank_equals_one_process(tmp_path):
    arguments = (*SMALL, "--labels", "0,1")
    assert run(*arguments, "--out", tmp_path / "alone") == 0
    with torchrun(tmp_path, *arguments, "--shard", "bank", "--out", tmp_path / "shared") as process:
        assert process.wait(120) == 0
    alone, shared = samples_of(tmp_path / "alone"), samples_of(tmp_path / "shared")
    assert float((alone - shared).abs().max()) <= 1e-5  # 1.4e-6 observed
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("alone", "shared")]
    assert [(r.pop("shard"), r.pop("processes")) for r in records] == [(None, 1), ("bank", 2)]
    for record in records:
        del record["seconds"], record["threads"]
    assert records[0] == records[1]  # the pairs of both processes count


def test_shard_with_one_process_changes_nothing(tmp_path):
    for shard in ("bank", "seeds"):
        assert run(*SMALL, "--shard", shard, "--out", tmp_path / shard) == 0
    assert run(*SMALL, "--out", tmp_path / "without") == 0
    expected = samples_of(tmp_path / "without")
    assert torch.equal(samples_of(tmp_path / "bank"), expected)
    assert torch.equal(samples_of(tmp_path / "seeds"), expected)


def posteriors():
    """Run by each of several processes: a sharded machine against the whole one."""
    bank = make_bank(13, (2, 9, 8), labels=[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 2, 1, 1])  # class 2 is one image
    sorted_bank = pyels.PatchBank(bank.images[bank.order], bank.labels[bank.order])
    one_image = make_bank(1, (2, 9, 8))  # the share of which is empty in one process
    labels = torch.tensor([0, 1, 2])
    worst = 0.0
    pyels.distributed.join()
    for name, make in MACHINES.items():
        for data, given in ((bank, None), (bank, labels), (sorted_bank, labels), (one_image, None)):
            for sigma in (0.02, 0.5):
                whole = make(data, 3)
                x = noisy(data, 0.9, sigma, batch=3)
                sharded = pyels.distributed.Sharded(whole)
                expected, found = (m.posterior(x, 0.9, sigma, given) for m in (whole, sharded))
                assert torch.equal(expected.source, found.source), name
                for field in ("mean", "log_evidence", "entropy", "source_weight"):
                    a, b = getattr(expected, field), getattr(found, field)
                    worst = max(worst, float(((a - b).abs() / (1 + a.abs())).max()))
                means = [torch.empty_like(x) for _ in range(pyels.distributed.size())]
                dist.all_gather(means, sharded.denoise(x, 0.9, sigma, given))
                assert all(torch.equal(mean, means[0]) for mean in means), name
                k = None if name in ("IS", "ES") else 3
                assert sharded.pairs(given, k, 3) == whole.pairs(given, k, 3)
    assert "process" in repr(sharded)
    # Errors come in all processes alike, and leave the group in order.
    with pytest.raises(ValueError, match="label 7: no images of this class"):
        pyels.distributed.Sharded(pyels.LS(bank, 3)).denoise(noisy(bank, 0.9, 0.5), 0.9, 0.5, torch.tensor([7]))
    with pytest.raises(ValueError, match="patch_size must be odd"):
        pyels.distributed.Sharded(pyels.LS(bank, 3)).check_wish("patch_size", 4)
    x = noisy(bank, 0.9, 0.5, seed=pyels.distributed.rank())
    with pytest.raises(ValueError, match="the processes passed different queries"):
        pyels.distributed.Sharded(pyels.LS(bank, 3)).denoise(x, 0.9, 0.5)
    with pytest.raises(ValueError, match="process 1 has bank = 1, but process 0 0; start all of them with the same"):
        pyels.distributed.agree({"isa": x.sum().item(), "bank": pyels.distributed.rank()}, but=("isa",))
    assert torch.isfinite(pyels.distributed.Sharded(pyels.IS(bank)).denoise(noisy(bank, 0.9, 0.5), 0.9, 0.5)).all()
    group = weakref.ref(dist.group.WORLD)
    pyels.distributed._leave()
    assert group() is None  # and with it its threads: those that outlive Python abort the process
    print(f"{worst:.1e}")
    assert worst <= 1e-5  # observed: 4.5e-6


def test_posteriors_of_a_sharded_machine_equal_the_whole_ones(tmp_path):
    """The first one has no part in classes and banks of one image."""
    line = ("-c", "from test_distributed import posteriors; posteriors()")
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [0, 0], processes.printed()


def posteriors_from_file(path):
    """Run by each of several processes: sharded machines over a bank in a file, streamed and mapped, against memory."""
    mapped = pyels.PatchBank.load(path)
    memory = pyels.PatchBank(mapped.images.clone(), mapped.labels)
    streamed = pyels.PatchBank.load(path, memory_limit=4 * memory.nbytes // len(memory))
    read = []
    check = FileImages.check
    FileImages.check = lambda self, numbers, pixels: (read.extend(numbers.tolist()), check(self, numbers, pixels))
    pyels.distributed.join()
    rank, size = pyels.distributed.rank(), pyels.distributed.size()
    x = noisy(memory, 0.9, 0.5, batch=3)
    for labels in (None, torch.tensor([0, 1, 2]), torch.tensor([2, 2, 2])):  # of class 2 the first process has no image
        ranges = [(0, len(memory))] if labels is None else [memory.class_range(c) for c in set(labels.tolist())]
        order = torch.arange(len(memory)) if labels is None else memory.order
        share = torch.cat([order[a + (b - a) * rank // size : a + (b - a) * (rank + 1) // size] for a, b in ranges])
        for name, make in MACHINES.items():
            expected = make(memory, 3).posterior(x, 0.9, 0.5, labels)
            for bank in (streamed, mapped):
                read.clear()
                found = pyels.distributed.Sharded(make(bank, 3)).posterior(x, 0.9, 0.5, labels)
                if bank is streamed:
                    assert read == share.sort().values.tolist()
                else:  # whose checksums are compared once, and between images of a class too
                    assert set(read) <= set(range(int(share.min()), int(share.max()) + 1)) if len(share) else not read
                assert torch.equal(found.source, expected.source), name
                for field in ("mean", "log_evidence", "entropy", "source_weight"):
                    torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=1e-5, rtol=1e-5)
    assert len(pyels.distributed.Sharded(pyels.IS(streamed)).denoise(x[:0], 0.9, 0.5)) == 0
    definition = pyels.Definition(pyels.Square(3), fold="uniform", mirror=True)
    for bank in (memory, streamed):
        whole = pyels.Machine(memory, definition)
        sharded = pyels.distributed.Sharded(pyels.Machine(bank, definition))
        torch.testing.assert_close(sharded.denoise(x, 0.9, 0.5), whole.denoise(x, 0.9, 0.5), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sharded.influence(x, 0.9, 0.5), whole.influence(x, 0.9, 0.5), atol=1e-5, rtol=1e-5)
        for found, expected in zip(sharded.sources(x, 0.9, 0.5, 5), whole.sources(x, 0.9, 0.5, 5), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_processes_share_a_bank_in_a_file_and_read_their_part(tmp_path):
    path = tmp_path / "bank.npz"
    make_bank(13, (2, 9, 8), labels=[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 2, 1, 1]).save(path)
    line = ("-c", f"from test_distributed import posteriors_from_file; posteriors_from_file({str(path)!r})")
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [0, 0], processes.printed()


def test_sample_from_a_bank_that_is_streamed_and_shared(tmp_path):
    path = tmp_path / "bank.npz"
    bank = make_bank(40, (1, 9, 8))
    bank.save(path)
    arguments = ("sample", "--dataset", path, "--steps", 3, "--num", 2, "--patch-size", 3)
    assert run(*arguments, "--out", tmp_path / "alone") == 0
    line = (*PYELS, *arguments, "--shard", "bank", "--memory-limit", 800)
    with Processes(tmp_path, *[(*line, "--out", tmp_path / "shared")] * 2) as processes:
        assert processes.codes() == [0, 0], processes.printed()
    difference = samples_of(tmp_path / "alone") - samples_of(tmp_path / "shared")
    assert float(difference.abs().max()) <= 1e-5
    record = json.loads((tmp_path / "shared" / "run.json").read_text())
    assert (record["memory_limit"], record["shard"], record["processes"]) == (800, "bank", 2)
    # Damage that only the second process comes across, which says so: neither waits for the other.
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(bank.images[31].numpy().tobytes())] ^= 1
    path.write_bytes(damaged)
    with Processes(tmp_path, *[(*line, "--out", tmp_path / "damaged")] * 2) as processes:
        assert processes.codes() == [2, 2]
        assert processes.printed() == [f"pyels: error: {path}: image 31 is damaged (its checksum does not match)"]
    assert not (tmp_path / "damaged").exists()


def test_sharded_machine_without_a_group_is_the_machine():
    bank = make_bank(12, (1, 9, 8))
    whole = pyels.ELS(bank, 3)
    x = noisy(bank, 0.9, 0.5)
    assert torch.equal(pyels.distributed.Sharded(whole).denoise(x, 0.9, 0.5), whole.denoise(x, 0.9, 0.5))
    with pytest.raises(TypeError, match=r"machine must be a pyels\.Machine, got PatchBank"):
        pyels.distributed.Sharded(bank)
    with pytest.raises(TypeError, match="a PCALocality is not shared image by image"):
        pyels.distributed.Sharded(pyels.PCALocality(bank))


def check_stopped(out, of):
    """Some of the samples are kept, and nothing else was written, but for the lock of a process that was killed."""
    assert {p.name for p in out.iterdir()} - {".pyels-lock"} == {"unfinished"}
    kept = list((out / "unfinished").glob("[0-9]*.safetensors"))
    assert 1 <= len(kept) < of
    return {p: p.stat().st_mtime_ns for p in kept}


def test_killed_process_under_torchrun_ends_the_run_and_it_goes_on(tmp_path, undisturbed):
    out = tmp_path / "out"
    arguments = (*LONGER, "--shard", "bank", "--out", out)
    with torchrun(tmp_path, *arguments) as process:
        wait_for(out / "unfinished" / "000000.safetensors", process)
        os.kill(int((tmp_path / "pid-1").read_text()), 9)
        assert process.wait(120) == 1
    kept = check_stopped(out, of=6)
    assert (tmp_path / "err").read_text().count(GO_ON) == 1
    with pytest.raises(ProcessLookupError):  # torchrun waited for the other one
        os.kill(int((tmp_path / "pid-0").read_text()), 0)
    # With another number of processes, too.
    before = {p.name: read_tensors(p)["samples"] for p in kept}
    assert run(*arguments) == 0
    samples = samples_of(out)
    assert float((samples_of(undisturbed) - samples).abs().max()) <= 1e-5  # 1.7e-6 observed
    for name, sample in before.items():
        assert torch.equal(samples[int(name[:6])], sample)  # kept, not drawn again


def test_killed_process_of_spread_seeds_and_its_resumed_run(tmp_path, undisturbed):
    """Without torchrun's signals, as when the process was on another machine."""
    out = tmp_path / "out"
    line = (*PYELS, *LONGER, "--shard", "seeds", "--json", "--out", out)
    with Processes(tmp_path, line, line) as processes:
        wait_for(out / "unfinished" / "000001.safetensors", processes.processes[0])
        processes.processes[1].kill()
        assert processes.codes() == [2, -9]
        assert processes.printed() == [
            f"pyels: error: another process of this run ended, or cannot be reached; {GO_ON}"
        ]
    kept = check_stopped(out, of=6)
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [0, 0]
        record = json.loads("".join(processes.printed("out")))  # by one process alone
    alone = json.loads((undisturbed / "run.json").read_text())
    assert record["pairs"] == alone["pairs"] * (6 - len(kept)) // 6
    assert torch.equal(samples_of(undisturbed), samples_of(out))


def test_killed_first_process(tmp_path):
    """The one that writes: another one says what happened."""
    out = tmp_path / "out"
    line = (*PYELS, *LONGER, "--shard", "bank", "--out", out)
    with Processes(tmp_path, line, line) as processes:
        wait_for(out / "unfinished" / "000000.safetensors", processes.processes[0])
        processes.processes[0].kill()
        assert processes.codes() == [-9, 2]
        (said,) = processes.printed()
        assert said.endswith(GO_ON)
    check_stopped(out, of=6)


def test_terminated_process_says_how_to_go_on(tmp_path):
    """By the signal that torchrun sends to the others when a process has ended."""
    out = tmp_path / "out"
    line = (*PYELS, *LONGER, "--shard", "bank", "--out", out)
    with Processes(tmp_path, line, line) as processes:
        wait_for(out / "unfinished" / "000000.safetensors", processes.processes[0])
        processes.processes[0].terminate()
        assert processes.codes() == [1, 2]
        assert processes.printed() == [
            f"pyels: error: another process of this run ended, or it was stopped from outside; {GO_ON}"
        ]
    check_stopped(out, of=6)


def test_a_folder_in_use_is_said_once(tmp_path):
    out = tmp_path / "out"
    line = (*PYELS, *SMALL, "--shard", "bank", "--out", out)
    with resumable.result_folder(out, "train"):
        with Processes(tmp_path, line, line) as processes:
            assert processes.codes() == [2, 2]
            (said,) = processes.printed()
        assert said.startswith(f"pyels: error: {out} is in use by pyels train, process {os.getpid()} on ")
        assert [path.name for path in out.iterdir()] == [".pyels-lock"]
    assert not out.exists()


def test_bad_input_is_said_once(tmp_path):
    line = (*PYELS, *SMALL, "--shard", "bank", "--patch-size", 4, "--out", tmp_path / "out")
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [2, 2]
        assert processes.printed() == ["pyels: error: patch_size must be odd and positive, got 4"]
    assert not (tmp_path / "out").exists()


def test_process_that_lacks_the_data_says_so(tmp_path):
    lines = [(*PYELS, *SMALL, "--shard", "seeds", "--out", "out"), (*PYELS, "sample", "--shard", "seeds")]
    with Processes(tmp_path, lines[0], (*lines[1], "--dataset", "missing.npz")) as processes:
        assert processes.codes() == [2, 2]
        (said,) = processes.printed()
    assert "'missing.npz' is neither one of" in said
    assert not (tmp_path / "out").exists()


def test_how_the_processes_share_the_work_must_be_said(monkeypatch):
    monkeypatch.setattr(pyels.distributed, "launched", lambda: 2)
    with pytest.raises(ValueError, match=r"torchrun started 2 processes: .* --shard bank, or .* --shard seeds"):
        program.main(["sample"], standalone_mode=False)
    with pytest.raises(click.UsageError, match="only sample runs in several processes"):
        program.main(["train"], standalone_mode=False)


def test_processes_tell_windows_of_one_size_apart():
    bank = make_bank(5, (1, 9, 8))
    query = pyels.LS(bank, 3).query(torch.zeros(1, 1, 9, 8), 0.6, 0.8)
    digests = []
    for window in (pyels.Gaussian(1.1), pyels.Gaussian(1.3), pyels.Square(9)):
        definition = pyels.Definition(window, "same_position")
        digests.append(distributed._digest(query, bank.select().expand(1), definition)[1].tolist())
    assert len(set(map(tuple, digests))) == 3
