"""Banks larger than memory: streamed from their file, within the limit, and what happens when the file is broken."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from helpers import MACHINES, make_bank, noisy, run_program

import pyels
from pyels.bank import file_images
from pyels.engines import Cpu

SHAPE = (1, 9, 8)
IMAGE = 9 * 8


def saved(tmp_path, n=23, dtype=torch.uint8, labels=True):
    bank = make_bank(n, SHAPE, labels=[i * 7 % 3 for i in range(n)] if labels else None, dtype=dtype)
    bank.save(tmp_path / "bank.npz")
    return bank


def images_offset(path):
    """Where the pixels begin in a saved bank."""
    return path.read_bytes().index(b"\n", path.read_bytes().index(b"NUMPY")) + 1


def assert_equal(ours, expected):
    exact = ours.mean.dtype == torch.float64
    for field in ("mean", "log_evidence", "entropy", "source_weight"):
        # Of the float32 engine, the other fields are log-weights of some 100 nats.
        tolerance = 1e-11 if exact else 1e-6 if field == "mean" else 2e-5  # worst seen 4e-6
        torch.testing.assert_close(getattr(ours, field), getattr(expected, field), atol=tolerance, rtol=tolerance)
    assert torch.equal(ours.source, expected.source)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("per_chunk", [1, 4, 11])
@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_streamed_equals_in_memory(tmp_path, engine, kind, per_chunk, dtype):
    bank = saved(tmp_path, dtype=dtype)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=2 * per_chunk * IMAGE * dtype.itemsize)
    assert streamed.streamed
    assert streamed.fingerprint() == bank.fingerprint()
    x = noisy(bank, 0.8, 0.6, batch=3)
    for labels in (None, torch.tensor([2, 0, 2]), torch.tensor([1, 1, 1])):
        ours, expected = (MACHINES[kind](b, 3, engine=engine).posterior(x, 0.8, 0.6, labels) for b in (streamed, bank))
        assert_equal(ours, expected)
        mean = MACHINES[kind](streamed, 3, engine=engine).denoise(x, 0.8, 0.6, labels)
        torch.testing.assert_close(mean, ours.mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_any_number_of_threads_gives_the_same_bits(tmp_path, engine):
    bank = saved(tmp_path, n=300)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=100 * IMAGE)
    x = noisy(bank, 0.8, 0.6)
    one, three = (pyels.LS(streamed, 3, engine, threads=n).denoise(x, 0.8, 0.6) for n in (1, 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("part", [slice(5, 17), slice(20, None), slice(1, 20, 3)])
def test_slices_stream_within_the_same_limit(tmp_path, part):
    bank = saved(tmp_path)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE)[part]
    assert streamed.streamed
    assert streamed.memory_limit == 4 * IMAGE
    x = noisy(bank, 0.8, 0.6, batch=2)
    labels = bank[part].labels[1:3]
    assert_equal(pyels.LS(streamed, 3).posterior(x, 0.8, 0.6), pyels.LS(bank[part], 3).posterior(x, 0.8, 0.6))
    ours, expected = (pyels.LS(b, 3).posterior(x, 0.8, 0.6, labels) for b in (streamed[1:], bank[part][1:]))
    assert_equal(ours, expected)
    assert streamed.fingerprint() == bank[part].fingerprint()
    for which in (slice(1, 3), slice(None, None, 2), torch.tensor([2, 0, 0, 1])):
        assert torch.equal(streamed.read(which), bank[part].read(which))
    streamed.save(tmp_path / "part.npz")
    assert torch.equal(pyels.PatchBank.load(tmp_path / "part.npz").images, bank[part].images)


def test_only_the_classes_that_are_needed_are_read(tmp_path, monkeypatch):
    bank = saved(tmp_path)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=6 * IMAGE)
    read = []
    check = file_images.FileImages.check
    monkeypatch.setattr(
        file_images.FileImages, "check", lambda self, n, pixels: (read.extend(n.tolist()), check(self, n, pixels))
    )
    pyels.IS(streamed).denoise(noisy(bank, 0.8, 0.6, batch=3), 0.8, 0.6, torch.tensor([0, 2, 0]))
    assert read == [i for i in range(23) if bank.labels[i] != 1]


def test_an_empty_batch(tmp_path):
    saved(tmp_path)
    machine = pyels.IS(pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE))
    for labels in (None, torch.zeros(0, dtype=torch.int64)):
        assert machine.denoise(torch.zeros(0, *SHAPE), 0.8, 0.6, labels).shape == (0, *SHAPE)


def test_a_bank_that_fits_is_mapped_as_without_a_limit(tmp_path):
    bank = saved(tmp_path)
    loaded = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=bank.nbytes)
    assert not loaded.streamed
    assert torch.equal(loaded.images, bank.images)
    with pytest.raises(ValueError, match="not streamed"):
        next(loaded.stream())
    bank[:1].save(tmp_path / "one.npz")
    assert not pyels.PatchBank.load(tmp_path / "one.npz", memory_limit=IMAGE).streamed


def test_npy_and_named_splits_are_streamed(tmp_path):
    bank = make_bank(23, SHAPE)
    np.save(tmp_path / "images.npy", bank.images.numpy())
    np.savez(tmp_path / "both.npz", train_images=bank.images.numpy()[:9], test_images=bank.images.numpy()[9:])
    for name, split, part in (("images.npy", "train", bank), ("both.npz", "test", bank[9:])):
        streamed = pyels.PatchBank.load(tmp_path / name, split, memory_limit="0.3kB")
        assert streamed.streamed
        assert torch.equal(streamed.read(slice(None)), part.read(slice(None)))
        assert not streamed.verify()


def test_threads_that_share_a_bank_share_its_limit(tmp_path):
    bank = saved(tmp_path)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE)
    x = noisy(bank, 0.8, 0.6)
    expected = pyels.IS(streamed).denoise(x, 0.8, 0.6)
    results = []
    with closing(streamed.stream()) as parts:
        next(parts)
        workers = [
            threading.Thread(target=lambda: results.append(pyels.IS(streamed[:]).denoise(x, 0.8, 0.6)))
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        workers[0].join(0.1)
        assert not results  # they wait for the buffers
    for worker in workers:
        worker.join()
    assert len(results) == 3
    assert all(torch.equal(r, expected) for r in results)


def test_a_machine_within_a_stream_is_refused(tmp_path):
    bank = saved(tmp_path)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE)
    machine, x = pyels.IS(streamed[:9]), noisy(bank, 0.8, 0.6)
    for _ in streamed.stream():
        with pytest.raises(ValueError, match=r"bank\.npz: this thread is in the middle of streaming the bank"):
            machine.denoise(x, 0.8, 0.6)
    machine.denoise(x, 0.8, 0.6)


def test_a_thread_that_is_waited_for_within_a_stream_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(file_images, "_LOOK", 0.01)
    bank = saved(tmp_path)
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE)
    machine, x = pyels.IS(streamed[:9]), noisy(bank, 0.8, 0.6)
    with ThreadPoolExecutor(1) as other:
        for _ in streamed.stream(patience=0):
            with pytest.raises(ValueError, match=r"bank\.npz: another thread is in the middle of streaming the bank"):
                other.submit(machine.denoise, x, 0.8, 0.6).result(60)
        other.submit(machine.denoise, x, 0.8, 0.6).result(60)


def test_a_machine_is_waited_for_however_long_it_takes(tmp_path, monkeypatch):
    bank, at_once = saved(tmp_path), Cpu.evaluate_part

    def slowly(*given):
        time.sleep(0.05)
        return at_once(*given)

    monkeypatch.setattr(file_images, "_LOOK", 0.01)
    monkeypatch.setattr(Cpu, "evaluate_part", slowly)
    machine = pyels.IS(pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE))
    with ThreadPoolExecutor(2) as both:
        first, second = (both.submit(machine.denoise, noisy(bank, 0.8, 0.6), 0.8, 0.6) for _ in range(2))
        assert torch.equal(first.result(60), second.result(60))


FORKS = """
import os, sys, threading, torch, pyels
bank = pyels.PatchBank.load(sys.argv[1], memory_limit=int(sys.argv[2]))
machine, x = pyels.IS(bank), torch.zeros(1, 1, 9, 8)
parts, begun = bank.stream(), threading.Event()
worker = threading.Thread(target=lambda: (next(parts), begun.set()))
worker.start()
begun.wait()
if not os.fork():
    try:
        next(parts)
    except ValueError as error:
        print(error, flush=True)
    print(machine.denoise(x, 0.8, 0.6).shape, flush=True)
    os._exit(0)
os.wait()
print(sum(len(numbers) for numbers, _ in parts), machine.denoise(x, 0.8, 0.6).shape)
"""


def test_a_fork_while_it_is_streamed(tmp_path):
    saved(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", FORKS, tmp_path / "bank.npz", 4 * IMAGE]
    ended = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=120)
    child, machine, parent = ended.stdout.splitlines()
    assert "streaming was begun before a fork; begin it anew" in child
    assert machine == "torch.Size([1, 1, 9, 8])"
    assert parent == "21 torch.Size([1, 1, 9, 8])"


def test_a_failed_call_leaves_the_bank_usable(tmp_path, monkeypatch):
    bank = saved(tmp_path)
    machine = pyels.IS(pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=4 * IMAGE))
    x = noisy(bank, 0.8, 0.6)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyels.engines.exact.evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:  # which keeps the frames, too
            machine.denoise(x, 0.8, 0.6)
    machine.denoise(x, 0.8, 0.6)
    assert kept


def test_banks_can_be_pickled(tmp_path):
    bank = saved(tmp_path)
    for limit in (None, 4 * IMAGE):
        loaded = pickle.loads(pickle.dumps(pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)))
        assert torch.equal(loaded.read(slice(None)), bank.read(slice(None)))
        pyels.IS(loaded).denoise(noisy(bank, 0.8, 0.6), 0.8, 0.6)


# ---- The limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"), [(7, 7), ("500MB", 5 * 10**8), ("2 gb", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("64k", 64000)]
)
def test_sizes_in_words(given, meant):
    assert file_images.parse_bytes(given) == meant


@pytest.mark.parametrize("given", ["", "GB", "-1GB", "2XB", "1e9", "2 i", 0, -5, "0MB"])
def test_limits_that_are_none(given):
    with pytest.raises(ValueError, match="memory_limit"):
        file_images.parse_bytes(given)


@pytest.mark.parametrize("given", [True, 1.5, [1]])
def test_limits_of_the_wrong_type(given):
    with pytest.raises(TypeError, match="memory_limit"):
        pyels.datasets.load("fashion-mnist-6000", memory_limit=given)


def test_limits_that_cannot_be_kept(tmp_path):
    bank = saved(tmp_path)
    with pytest.raises(ValueError, match=r"bank\.npz: memory_limit must hold two images, 2 x 72 bytes, got 143"):
        pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=143)
    np.savez_compressed(tmp_path / "small.npz", images=bank.images.numpy())
    with pytest.raises(ValueError, match=r"small\.npz: .* memory_limit of 500, .* uncompressed"):
        pyels.PatchBank.load(tmp_path / "small.npz", memory_limit=500)
    with pytest.raises(ValueError, match="fashion-mnist-6000"):
        pyels.datasets.load("fashion-mnist-6000", memory_limit="1MB")
    with pytest.raises(ValueError, match=r"bank\.npz.*at once"):
        pyels.datasets.load(tmp_path / "bank.npz", size=12, memory_limit=500)
    assert pyels.datasets.load(tmp_path / "bank.npz", size=12, limit=3, memory_limit=500).shape == (1, 12, 12)
    part = pyels.datasets.load(tmp_path / "bank.npz", limit=3, memory_limit=500)
    assert len(part) == 3
    with pytest.raises(ValueError, match=r"bank\.npz.*bank\.read"):
        part.images  # noqa: B018


PROGRAM = """
import sys, torch, pyels
from pathlib import Path

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

small = pyels.PatchBank(torch.zeros((20, 1, 64, 64), dtype=torch.uint8), [0, 1] * 10)
pyels.IS(small).posterior(torch.zeros(1, 1, 64, 64), 0.5, 1.0, torch.tensor([0]))
small.save(sys.argv[2])
before = status("VmRSS")
bank = pyels.PatchBank.load(sys.argv[1], memory_limit=None if sys.argv[3] == "0" else int(sys.argv[3]))
x = torch.zeros(1, 1, 64, 64)
bank.fingerprint()
pyels.IS(bank).denoise(x, 0.5, 1.0)
if bank.labels is not None:
    pyels.IS(bank[10:]).posterior(torch.cat([x, x]), 0.5, 1.0, torch.tensor([0, 1]))
bank[::2].verify()
bank[:-5].save(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resident_memory_stays_within_the_limit(tmp_path, dtype):
    total, limit, engine = 96 << 20, 16 << 20, 40 << 20
    shape = (total // 64**2 // np.dtype(dtype).itemsize, 1, 64, 64)
    if dtype == np.uint8:  # with labels and checksums
        bank = pyels.PatchBank(np.zeros(shape, dtype), np.arange(shape[0]) % 2)
        bank.save(tmp_path / "bank.npz")
        path = tmp_path / "bank.npz"
    else:
        path = tmp_path / "images.npy"
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()

    def grown(most):
        command = [sys.executable, "-c", PROGRAM, path, tmp_path / "copy.npz", most]
        return int(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)

    assert grown(limit) < limit + engine
    if dtype == np.uint8:
        assert grown(0) > total  # so it would be seen


# ---- Truncated files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bank.npz", "images.npy", "train.npz"])
@pytest.mark.parametrize("image", [0, 11, 22])
@pytest.mark.parametrize("limit", [None, 4 * IMAGE])
def test_a_truncated_bank_names_the_image(tmp_path, name, image, limit):
    bank, path = saved(tmp_path), tmp_path / name
    if name == "images.npy":
        np.save(path, bank.images.numpy())
    elif name == "train.npz":  # the images are not the first array in it
        np.savez(path, train_labels=bank.labels.numpy(), test_images=bank.images.numpy()[:3])
        np.savez(path, train_labels=bank.labels.numpy(), train_images=bank.images.numpy())
    offset = path.read_bytes().index(bank.images.numpy().tobytes())
    for cut in (offset + image * IMAGE, offset + image * IMAGE + IMAGE - 1):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=rf"{name}: truncated: image {image} of 23 is cut off"):
            pyels.PatchBank.load(path, memory_limit=limit)
        path.write_bytes(path.read_bytes() + bytes(IMAGE))


def test_an_array_shorter_than_its_header_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "bank.npz", "w") as archive, archive.open("images.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (9, *SHAPE)})
        member.write(bytes(5 * IMAGE + 3))
    with pytest.raises(ValueError, match=r"bank\.npz: truncated: image 5 of 9"):
        pyels.PatchBank.load(tmp_path / "bank.npz")


@pytest.mark.parametrize("limit", [None, 4 * IMAGE])
def test_a_file_truncated_after_it_was_loaded(tmp_path, limit):
    bank = saved(tmp_path)
    path = tmp_path / "bank.npz"
    machine = pyels.IS(pyels.PatchBank.load(path, memory_limit=limit))
    with open(path, "r+b") as file:
        file.truncate(images_offset(path) + 12 * IMAGE + 5)
    for labels in (None, torch.tensor([1])):
        with pytest.raises(ValueError, match=r"bank\.npz: truncated: image 12 of 23 is cut off"):
            machine.denoise(noisy(bank, 0.8, 0.6), 0.8, 0.6, labels)


def test_a_file_truncated_while_it_is_streamed(tmp_path):
    saved(tmp_path)
    path = tmp_path / "bank.npz"
    parts = pyels.PatchBank.load(path, memory_limit=4 * IMAGE).stream()
    next(parts)
    with open(path, "r+b") as file:
        file.truncate(images_offset(path) + 12 * IMAGE + 5)
    with pytest.raises(ValueError, match=r"bank\.npz: truncated: image 12 of 23 is cut off"):
        list(parts)


@pytest.mark.parametrize("name", ["bank.npz", "bank.npy"])
def test_a_file_written_to_while_it_is_streamed(tmp_path, name):
    saved(tmp_path)
    np.save(tmp_path / "bank.npy", pyels.PatchBank.load(tmp_path / "bank.npz").images.numpy())
    bank = pyels.PatchBank.load(tmp_path / name, memory_limit=4 * IMAGE)
    parts = bank.stream()
    next(parts)
    os.utime(tmp_path / name, ns=(1, 1))
    with pytest.raises(ValueError, match=rf"{name}: has been written to since it was loaded"):
        list(parts)


def test_a_file_that_cannot_be_read_any_more(tmp_path, monkeypatch):
    saved(tmp_path)
    path = tmp_path / "bank.npz"
    bank = pyels.PatchBank.load(path, memory_limit=4 * IMAGE)

    class Failing:
        seek = fileno = lambda self, *_: 0

        def readinto(self, into):
            raise OSError(5, "Input/output error")

    file = bank._file
    with pytest.raises(ValueError, match=r"bank\.npz: image 3 cannot be read \(Input/output error\)"):
        file._fill(Failing(), torch.tensor([3, 4]), torch.empty(2, *SHAPE, dtype=torch.uint8))
    saved(tmp_path)  # another file of that name
    with pytest.raises(ValueError, match=r"bank\.npz: has been replaced"):
        bank.read(slice(0, 1))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"bank\.npz"):
        bank.read(slice(0, 1))


# ---- Damaged files -------------------------------------------------------------------------------------------------


def damage(path, image):
    with open(path, "r+b") as file:
        file.seek(images_offset(path) + image * IMAGE + 40)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ 1]))


@pytest.mark.parametrize("limit", [None, 4 * IMAGE])
def test_damage_is_found_when_the_image_is_first_used(tmp_path, limit):
    bank = saved(tmp_path)
    damage(tmp_path / "bank.npz", 17)
    message = r"bank\.npz: image 17 is damaged \(its checksum does not match\)"
    loaded = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)
    x = noisy(bank, 0.8, 0.6)
    pyels.IS(loaded[:17]).denoise(x, 0.8, 0.6)
    for use in (lambda: pyels.IS(loaded).denoise(x, 0.8, 0.6), loaded.verify, loaded[10:].verify):
        with pytest.raises(ValueError, match=message):
            use()
    if limit:
        with pytest.raises(ValueError, match=message):
            loaded.read(slice(17, 18))
    with pytest.raises(ValueError, match=message):  # saving would give it a new checksum
        loaded.save(tmp_path / "copy.npz")
    assert not (tmp_path / "copy.npz").exists()


@pytest.mark.parametrize("limit", [None, 4 * IMAGE])
def test_verify_reads_again(tmp_path, limit):
    saved(tmp_path)
    loaded = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)
    assert loaded.verify()
    damage(tmp_path / "bank.npz", 17)
    assert loaded[:17].verify()
    with pytest.raises(ValueError, match="image 17 is damaged"):
        loaded.verify()
    assert not make_bank(3, SHAPE).verify()


def test_checksums_are_crc_32_of_each_image(tmp_path):
    bank = saved(tmp_path)
    with np.load(tmp_path / "bank.npz") as arrays:
        assert arrays["checksums"].dtype == np.uint32
        assert arrays["checksums"].tolist() == [zlib.crc32(i.numpy().tobytes()) for i in bank.images]
        np.savez(tmp_path / "other.npz", images=arrays["images"], checksums=arrays["checksums"][1:])
    with pytest.raises(ValueError, match=r"other\.npz.*checksums.*\(23,\)"):
        pyels.PatchBank.load(tmp_path / "other.npz")


def test_damaged_labels(tmp_path):
    bank = saved(tmp_path)
    whole = bytearray((tmp_path / "bank.npz").read_bytes())
    whole[bytes(whole).index(bank.labels.numpy().tobytes())] ^= 1
    (tmp_path / "bank.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"bank\.npz.*labels"):
        pyels.PatchBank.load(tmp_path / "bank.npz")


def test_bad_pixels_of_a_streamed_bank(tmp_path):
    images = make_bank(23, SHAPE, dtype=torch.float32).images.numpy()
    for value, message in ((np.nan, "image 19"), (np.inf, "image 19"), (3e6, "reach 3e\\+06")):
        images[19, 0, 3, 3] = value
        np.save(tmp_path / "images.npy", images)
        with pytest.raises(ValueError, match=rf"images\.npy.*{message}"):
            pyels.PatchBank.load(tmp_path / "images.npy", memory_limit=20 * IMAGE)


# ---- The programs --------------------------------------------------------------------------------------------------


def test_sample_and_info(tmp_path, capsys):
    bank = saved(tmp_path)
    path = tmp_path / "bank.npz"
    drawn = {}
    for name, limit in (("memory", "1GB"), ("streamed", "0.5kB")):
        run = ("sample", "--dataset", path, "--machine", "els", "--patch-size", 3, "--steps", 3, "--num", 2, "--json")
        out = tmp_path / name
        assert run_program(*run, "--labels", "0,2", "--memory-limit", limit, "--out", out) == 0
        drawn[name] = pyels.files.read_tensors(out / "samples.safetensors")["samples"]
        assert json.loads(capsys.readouterr().out).get("memory_limit") == (500 if name == "streamed" else None)
    torch.testing.assert_close(drawn["streamed"], drawn["memory"], atol=1e-5, rtol=0)
    assert run_program("info", "--dataset", path) == 0
    out = capsys.readouterr().out
    assert "checksums         ok" in out
    assert str(len(bank)) in out
    damage(path, 5)
    assert run_program("info", "--dataset", path) == 2
    assert "image 5 is damaged" in capsys.readouterr().err
    assert run_program("sample", "--dataset", path, "--memory-limit", "100 apples") == 2
    assert "memory_limit" in capsys.readouterr().err
