"""Indexes: how they are built, in bounded memory, side by side, of shares and of streamed banks."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy, run_program
from safetensors.torch import load_file
from test_distributed import Processes

import pyels
from pyels.engines import sampled
from pyels.engines.index import building, lists
from pyels.files import TensorFile, locked, tensors_in_parts
from pyels.posterior import Want

pytestmark = [pytest.mark.needs(package="faiss"), pytest.mark.usefixtures("one_thread")]


def ask(bank, folder=None, k=5, **options):
    machine = pyels.ELS(bank, k, engine="sampled", index=folder, **options)
    return machine.denoise(torch.zeros(1, *bank.shape), 0.7, 0.7)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- Order and memory -----------------------------------------------------------------------------------------------


def built(bank, folder, k=5):
    ask(bank, folder, k)
    return load_file(folder / f"k{k}.safetensors")


def test_the_same_lists_come_out_however_little_is_in_memory_at_once(tmp_path, monkeypatch):
    bank = make_bank(400, (1, 12, 12))
    bank.images[:, :, :9, :9] = 0  # one list has most windows, and goes on from part to part
    whole = built(bank := pyels.PatchBank(bank.images), tmp_path / "whole")
    for most in (1000, 33, 1):
        for module in (building, lists):
            monkeypatch.setattr(module, "MEMBERS_AT_ONCE", most)
        parts = built(bank, tmp_path / str(most))
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-5)
            if name.endswith(("window", "lead", "tail", "begin", "end")):
                assert torch.equal(parts[name], tensor), name


def test_every_window_is_in_one_list(tmp_path):
    bank = make_bank(300, (2, 11, 12))
    tensors = built(bank, tmp_path)
    for region in lists.regions(5, False):
        begin, end, window = (tensors[f"{region.lists_name}.{name}"] for name in ("begin", "end", "window"))
        members = torch.cat([window[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)])
        centres = lists.Windows(region, bank.shape, 5, False).centres()
        expected = torch.arange(300)[:, None] * 132 + torch.from_numpy(centres)
        assert torch.equal(members.sort().values.long(), expected.flatten().sort().values)


def test_what_lists_say_of_their_windows(tmp_path):
    bank = make_bank(300, (2, 11, 12))
    for tensors in (built(bank, tmp_path), built(bank, tmp_path, 1)):
        k = tensors["inside.origin"].shape[-1]
        windows = bank.read(torch.arange(300)).unfold(2, k, 1).unfold(3, k, 1) - tensors["inside.origin"][:, None, None]
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        inside = torch.from_numpy(lists.Windows(lists.Region.INSIDE, bank.shape, k, False).centres())
        directions = tensors["inside.directions"].flatten(1)
        for a, b, mean, spread in zip(
            *(tensors[f"inside.{n}"] for n in ("begin", "end", "mean")), tensors["inside.spread"][0], strict=True
        ):
            if a == b:
                assert not mean.any()
                continue
            numbers = tensors["inside.window"][a:b].long()
            at = torch.searchsorted(inside, (numbers % 132).int())
            of_list = windows.flatten(1, 2)[numbers // 132, at]
            torch.testing.assert_close(mean, (of_list @ directions.T).mean(0), atol=1e-4, rtol=1e-4)
            expected = of_list.square().sum(1).mean() - mean.square().sum()
            torch.testing.assert_close(spread, expected, atol=1e-3, rtol=1e-3)


def test_the_first_members_of_a_list_are_a_fair_sample():
    numbers = np.arange(3_000_000)  # of the windows of neighbouring images
    shuffled = building._shuffled(numbers, building._MULTIPLIERS)
    assert len(np.unique(shuffled)) == len(numbers)
    assert np.array_equal(building._numbers(shuffled.astype(np.int64) | 7 << 32), numbers)
    some = np.argsort(shuffled)[:30_000]
    for share in (some / len(numbers), some % 784 / 784, some % 28 / 28):  # images, pixels, columns
        counts, _ = np.histogram(share, 28, (0, 1))
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 60  # chi-squared of 27 degrees: 1 in 3,000
    steps = np.sort(some)[1:] - np.sort(some)[:-1]
    assert abs(np.mean(steps == 1) - 0.01) < 0.002  # neighbours are not kept together, nor apart


@pytest.mark.slow
def test_building_takes_bounded_memory(tmp_path):
    """Of 7 million windows, whose numbers, lists and descriptions would take 400 MB and more."""
    script = (
        "import sys, threading, time, torch, pyels, faiss; torch.set_num_threads(1)\n"
        "from pyels.engines.index.file import open_index\n"
        "images = pyels.datasets.load('fashion-mnist-6000').images; images = torch.cat([images, images.flip(3)])\n"
        "bank = pyels.PatchBank(images); bank.fingerprint()\n"
        "def resident(): return sum(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "before, most, done = resident(), 0, False\n"
        "def watch():\n"
        "    global most\n"
        "    while not done: most = max(most, resident()); time.sleep(0.02)\n"
        "watching = threading.Thread(target=watch); watching.start()\n"
        "open_index(bank, 5, False, 'all', range(len(bank)), sys.argv[1], 1)\n"
        "done = True; watching.join(); print((most - before) // 1000)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 400  # MB; 330 observed
    assert (tmp_path / "k5.safetensors").stat().st_size > 150e6


def test_threads_change_nothing(tmp_path):
    bank = make_bank(300, (1, 12, 12))
    for threads in (1, 2):
        ask(bank, tmp_path / str(threads), threads=threads)
    one, two = (load_file(tmp_path / str(threads) / "k5.safetensors") for threads in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_written_in_parts(tmp_path):
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "signed": torch.arange(-5, 5, dtype=torch.int8),
        "numbers": torch.arange(12).reshape(3, 4),
        "none": torch.empty(0, 3),
        "floats": torch.rand(5, 2),
        "counts": torch.arange(3, dtype=torch.int32),
    }
    path, metadata = tmp_path / "a.safetensors", {}
    with tensors_in_parts(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata) as write:
        for name, tensor in tensors.items():
            for first in range(0, tensor.numel(), 3):
                write(name, first, tensor.flatten()[first : first + 3])
        assert names(tmp_path) != ["a.safetensors"]
        metadata["what"] = 'said "later"'
    for mapped in (False, True):
        file = TensorFile.read(path, mapped)
        assert file.has_checksum
        assert file.metadata["what"] == 'said "later"'
        assert all(torch.equal(file.tensors[name], tensor) for name, tensor in tensors.items())
        assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in file.tensors.values())
    blob = bytearray(path.read_bytes())
    for place in (9, len(blob) // 2, len(blob) - 1):
        flipped = blob.copy()
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
            TensorFile.read(path)
    with (
        pytest.raises(ValueError, match="metadata of more than 4096 bytes"),
        tensors_in_parts(path, {}, {"a": "b" * 5000}),
    ):
        pass
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("at", [0, 1, 3, 10])
def test_a_full_disk_leaves_nothing_and_is_said(tmp_path, monkeypatch, at):
    writes, pwrite = [], os.pwrite

    def full(*arguments):
        writes.append(1)
        if len(writes) > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*k5\.safetensors'"):
        ask(make_bank(60, (1, 12, 12)), tmp_path / "index")
    assert names(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "describe_lists", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(make_bank(60, (1, 12, 12)), tmp_path / "index")
    assert names(tmp_path) == []


def test_indexes_are_built_side_by_side_and_each_once(tmp_path):
    """While somebody else builds one, others are; who needs that one waits."""
    bank, answers = make_bank(60, (1, 12, 12)), []
    with locked(tmp_path, "building", of="k3.safetensors"):
        (tmp_path / ".pyels-01234567-k3.safetensors").write_text("being written")
        ask(bank, tmp_path)
        assert names(tmp_path) == [".pyels-01234567-k3.safetensors", ".pyels-lock-k3.safetensors", "k5.safetensors"]
        waiting = threading.Thread(target=lambda: answers.append(ask(bank, tmp_path, 3)))
        waiting.start()
        time.sleep(0.5)
        assert not answers
        assert waiting.is_alive()
    waiting.join(60)
    assert torch.equal(answers[0], ask(bank, tmp_path, 3))
    assert names(tmp_path) == ["k3.safetensors", "k5.safetensors"]


def test_what_a_killed_build_left_goes_with_the_next_call_of_any_index(tmp_path):
    bank = make_bank(60, (1, 12, 12))
    ask(bank, tmp_path)
    for name in (
        ".pyels-01234567-k9-share3of4.safetensors",
        ".pyels-lock-k9-share3of4.safetensors",
        ".pyels-lock-k5.safetensors",
    ):
        (tmp_path / name).write_text("left")
    (tmp_path / "k7.txt").write_text("somebody else's")
    ask(bank, tmp_path)
    assert names(tmp_path) == ["k5.safetensors", "k7.txt"]


# ---- Streamed banks -------------------------------------------------------------------------------------------------


@pytest.fixture
def bank_file(tmp_path):
    path = tmp_path / "bank.npz"
    make_bank(600, (1, 12, 12), labels=[i % 3 for i in range(600)]).save(path)
    return path


def streamed(path):
    bank = pyels.PatchBank.load(path, memory_limit=20_000)
    assert bank.streamed
    return bank


def test_a_streamed_bank_is_searched_as_a_mapped_one(bank_file):
    bank, mapped = streamed(bank_file), pyels.PatchBank.load(bank_file)
    x = noisy(mapped, 0.7, 0.7, 2)
    for labels in (None, torch.tensor([0, 2])):
        machines = [pyels.ELS(b, 5, engine="sampled") for b in (bank, mapped)]
        found, expected = (machine.posterior(x, 0.7, 0.7, labels, tolerance=0.03) for machine in machines)
        for a, b in zip(found.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b)
    folder = bank_file.with_name("bank.npz.index")
    assert names(folder) == ["k5-class0.safetensors", "k5-class2.safetensors", "k5.safetensors"]
    before = load_file(folder / "k5.safetensors")
    (folder / "k5.safetensors").unlink()
    ask(mapped)
    after = load_file(folder / "k5.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_that_changes_under_a_streamed_bank_is_noticed(bank_file, monkeypatch):
    bank = streamed(bank_file)
    ask(bank)
    evaluate = sampled.evaluate

    def cut_off(*arguments):
        found = evaluate(*arguments)
        os.truncate(bank_file, bank_file.stat().st_size - 20_000)
        return found

    monkeypatch.setattr(sampled, "evaluate", cut_off)
    with pytest.raises(ValueError, match=r"bank\.npz"):
        ask(bank)


def test_a_file_that_changes_while_its_index_is_built_is_noticed(bank_file, monkeypatch):
    arrange = building._arrange

    def written_to(*arguments):
        arrange(*arguments)
        os.utime(bank_file, ns=(1, 1))

    monkeypatch.setattr(building, "_arrange", written_to)
    with pytest.raises(ValueError, match=r"bank\.npz"):
        ask(pyels.PatchBank.load(bank_file))
    assert not list(bank_file.with_name("bank.npz.index").glob("*.safetensors"))


def test_what_another_run_is_writing_in_the_folder_is_left_alone(tmp_path):
    (temporary := tmp_path / ".pyels-01234567-samples.safetensors").write_text("half")
    ask(make_bank(60, (1, 12, 12)), tmp_path)
    assert temporary.exists()


def test_parts_of_a_streamed_bank(bank_file, tmp_path):
    bank, memory = streamed(bank_file), make_bank(600, (1, 12, 12))
    assert torch.equal(ask(bank[100:400], tmp_path / "a"), ask(memory[100:400], tmp_path / "b"))
    for part in (slice(0, 600, 2), [1, 5, 300]):
        with pytest.raises(
            ValueError, match=r"bank\.npz: images that do not lie side by side .* without a memory_limit"
        ):
            ask(bank[part], tmp_path / "c")
    kept = pickle.loads(pickle.dumps(bank))
    assert torch.equal(ask(kept), ask(bank))
    assert torch.equal(ask(bank.stacked(), tmp_path / "d"), ask(memory, tmp_path / "e"))
    copied = bank[:600]
    assert copied.in_place() is copied.in_place()
    assert copied.in_place().in_place() is copied.in_place()
    assert memory.in_place() is memory


def test_a_streamed_bank_that_cannot_be_mapped_is_refused_in_words(tmp_path):
    half = tmp_path / "half.npz"
    np.savez(half, images=np.zeros((600, 1, 12, 12), np.float16))
    with pytest.raises(
        ValueError, match=r"half\.npz: its images are float16, .*; save them as float32, or load them wi"
    ):
        ask(streamed(half))
    np.savez_compressed(tmp_path / "packed.npz", images=make_bank(600, (1, 12, 12)).images.numpy())
    with pytest.raises(ValueError, match=r"only uncompressed .* are streamed; save them with PatchBank\.save"):
        streamed(tmp_path / "packed.npz")


@pytest.mark.parametrize("first", [True, False])
def test_a_streamed_bank_that_is_damaged_or_cut_off(bank_file, first):
    bank = streamed(bank_file)
    if not first:
        ask(bank)
    blob = bytearray(bank_file.read_bytes())
    place = blob.index(bank.read(slice(31, 32)).add(1).mul(127.5).round().byte().numpy().tobytes())
    blob[place] ^= 1
    bank_file.write_bytes(blob)
    with pytest.raises(ValueError, match=r"bank\.npz: image 31 is damaged"):
        ask(bank)
    os.truncate(bank_file, 40_000)
    with pytest.raises(ValueError, match=r"bank\.npz: truncated: image \d+ of 600 is cut off"):
        ask(bank)


def test_the_program_searches_a_streamed_bank(bank_file, tmp_path):
    options = ("sample", "--dataset", bank_file, "--patch-size", 5, "--steps", 2, "--num", 1, "--engine", "sampled")
    for limit in ("20kB", "1MB"):
        assert run_program(*options, "--memory-limit", limit, "--out", tmp_path / limit) == 0
    record = json.loads((tmp_path / "20kB" / "run.json").read_text())
    assert (record["engine"], record["memory_limit"]) == ("sampled", 20_000)
    a, b = (load_file(tmp_path / limit / "samples.safetensors")["samples"] for limit in ("20kB", "1MB"))
    assert torch.equal(a, b)


# ---- Shares ---------------------------------------------------------------------------------------------------------


def partials(bank, folder, x, parts, labels=None, want=Want.POSTERIOR, tolerance=0.03):
    """The partial posterior of every share of a bank, by an engine of its own."""
    machine = pyels.ELS(bank, 5)
    query = machine.query(x, 0.7, 0.7, labels, tolerance=tolerance)
    selection = bank.selection_of(labels, None, len(x))
    for part in range(parts):
        engine = pyels.engines.Sampled(1, index=folder)
        yield engine.evaluate(machine.definition, bank, selection.share(part, parts), query, want)


def merged(parts):
    parts = list(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def test_shares_have_indexes_of_their_own_and_merge(fashion, tmp_path):
    bank = fashion[:900]
    x = noisy(bank, 0.7, 0.7, 2)
    missed, worst = [], 0.0
    for labels in (None, torch.tensor([3, 0])):
        exact = pyels.ELS(bank, 5).denoise(x, 0.7, 0.7, labels)
        for parts in (1, 3):
            total = merged(partials(bank, tmp_path, x, parts, labels))
            error, certified = total.error()
            off = (total.mean() - exact).abs().amax(1)
            assert (off <= error)[certified].all()
            missed.append((off > error)[~certified])
            worst = max(worst, float(error.max()))
            assert total.count.unique().numel() <= 2 * 25
    assert torch.cat(missed).float().mean() <= 0.07
    assert worst <= 0.03 * 1.5  # not promised, see `Sharded`; of one part 0.0301 observed, of three 0.02
    of_all = [f"k5-share{i}of3.safetensors" for i in (1, 2, 3)] + ["k5-share1of1.safetensors"]
    of_classes = [f"k5-class{c}-share{i}.safetensors" for c in (0, 3) for i in ("1of1", "1of3", "2of3", "3of3")]
    assert names(tmp_path) == sorted(of_all + of_classes)


def test_a_share_without_images_adds_nothing(tmp_path):
    bank = make_bank(30, (1, 12, 12), labels=[0] * 29 + [7])
    x, labels = noisy(bank, 0.7, 0.7, 2), torch.tensor([7, 7])
    for want in (Want.POSTERIOR, Want.MEAN):
        parts = list(partials(bank, tmp_path, x, 3, labels, want))
        fields = [{name for name, value in vars(part).items() if value is not None} for part in parts]
        assert fields[0] == fields[1] == fields[2]  # or processes would not understand each other
        exact = pyels.ELS(bank, 5).denoise(x, 0.7, 0.7, labels)
        torch.testing.assert_close(merged(parts).mean(), exact, atol=1e-4, rtol=0)


def sharded(path):
    """Run by each of several processes: a sharded machine against the exact one."""
    torch.set_num_threads(1)
    bank = pyels.PatchBank.load(path, memory_limit=200_000)
    pyels.distributed.join()
    whole, given = pyels.ELS(bank, 5), torch.tensor([0, 1, 2])  # class 2 is one image
    machine = pyels.distributed.Sharded(pyels.ELS(bank, 5, engine="sampled", threads=1, tolerance=0.03))
    x = noisy(bank, 0.7, 0.7, 3)
    for labels in (None, given):
        found, exact = machine.posterior(x, 0.7, 0.7, labels), whole.posterior(x, 0.7, 0.7, labels)
        off = (found.mean - exact.mean).abs().amax(1)
        assert (off <= found.error)[found.certified].all()
        assert (off > found.error).float().mean() <= 0.07
        assert (found.error <= 0.05).all()
        assert (found.log_evidence - exact.log_evidence).abs().mean() < 0.05
        everyones = [torch.empty_like(x) for _ in range(pyels.distributed.size())]
        torch.distributed.all_gather(everyones, found.mean)
        assert all(torch.equal(mean, everyones[0]) for mean in everyones)
    torch.testing.assert_close(machine.denoise(x, 0.7, 0.7, given), found.mean)


@pytest.mark.torchrun
def test_processes_share_a_bank_each_with_its_index(tmp_path):
    path = tmp_path / "bank.npz"
    make_bank(1500, (1, 14, 13), labels=[2] + [i % 2 for i in range(1499)]).save(path)
    code = f"import sys; sys.path.append({os.path.dirname(__file__)!r})\n"
    code += f"from test_index import sharded; sharded({str(path)!r})"
    line = ("-c", code)
    for _ in range(2):  # built, and used
        with Processes(tmp_path, line, line) as processes:
            assert processes.codes() == [0, 0], processes.printed()
    sets = ["", "-class0", "-class1"]
    expected = [f"k5{name}-share{i}of2.safetensors" for name in sets for i in (1, 2)]
    assert names(tmp_path / "bank.npz.index") == sorted([*expected, "k5-class2-share2of2.safetensors"])


@pytest.mark.torchrun
def test_the_program_in_processes_that_share_a_bank(tmp_path):
    path = tmp_path / "bank.npz"
    make_bank(400, (1, 12, 12)).save(path)
    options = ("sample", "--dataset", path, "--patch-size", 5, "--steps", 3, "--num", 2)
    assert run_program(*options, "--out", tmp_path / "exact") == 0
    more = ("--engine", "sampled", "--tolerance", 0.02, "--shard", "bank", "--memory-limit", "30kB")
    line = ("-m", "pyels", *options, *more, "--out", tmp_path / "out")
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [0, 0], processes.printed()
    exact, found = (load_file(tmp_path / name / "samples.safetensors")["samples"] for name in ("exact", "out"))
    assert (exact - found).square().mean().sqrt() < 0.03
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["engine"], record["shard"], record["processes"]) == ("sampled", "bank", 2)


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_process_that_is_killed_while_it_builds(tmp_path):
    """The others end; repeated, the run leaves nothing but whole indexes."""
    path = tmp_path / "bank.npz"
    make_bank(3000, (1, 20, 20)).save(path)
    line = ("-m", "pyels", "sample", "--dataset", path, "--patch-size", 5, "--steps", 2, "--num", 1)
    line = (*line, "--engine", "sampled", "--tolerance", 0.1, "--shard", "bank", "--out", tmp_path / "out")
    folder = tmp_path / "bank.npz.index"
    with Processes(tmp_path, line, line) as processes:
        deadline = time.time() + 100
        while not list(folder.glob(".pyels-lock-k5-share2of2.safetensors")):
            assert time.time() < deadline
            time.sleep(0.01)
        processes.processes[1].kill()
        assert processes.codes()[1] == -9
    with Processes(tmp_path, line, line) as processes:
        assert processes.codes() == [0, 0], processes.printed()
    assert names(folder) == ["k5-share1of2.safetensors", "k5-share2of2.safetensors"]
