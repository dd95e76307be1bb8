import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers import MACHINES, make_bank, noisy
from PIL import Image

import pyels


def test_shares_memory_and_keeps_dtype():
    images = np.zeros((4, 1, 5, 6), np.uint8)
    bank = pyels.PatchBank(images)
    images[0] = 255
    assert bank.images.dtype == torch.uint8
    assert float(bank.read(slice(0, 1)).min()) == 1.0
    floats = torch.zeros(4, 1, 5, 6)
    assert pyels.PatchBank(floats).images.data_ptr() == floats.data_ptr()


def test_uint8_means_v_over_127_5_minus_1():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float().reshape(1, 1, 16, 16)
    torch.testing.assert_close(pyels.PatchBank(values).read(slice(None)), expected, atol=1e-7, rtol=0)


def test_uint8_and_float_banks_give_the_same_posterior():
    bank = make_bank(20, (3, 8, 8))
    floats = pyels.PatchBank((bank.images.double() / 127.5 - 1).float())
    x = noisy(bank, 0.6, 0.8)
    a, b = pyels.ELS(bank, 5).denoise(x, 0.6, 0.8), pyels.ELS(floats, 5).denoise(x, 0.6, 0.8)
    torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_save_and_load_maps_the_file(tmp_path, dtype):
    bank = make_bank(9, (3, 7, 5), labels=[3, 1, 2, 3, 1, 2, 3, 1, 2], dtype=dtype)
    bank.save(tmp_path / "bank.npz")
    loaded = pyels.PatchBank.load(tmp_path / "bank.npz")
    assert torch.equal(loaded.images, bank.images)
    assert torch.equal(loaded.labels, bank.labels)
    assert loaded.images.dtype == dtype
    x = noisy(bank, 0.6, 0.8)
    assert torch.equal(pyels.ELS(loaded, 3).denoise(x, 0.6, 0.8), pyels.ELS(bank, 3).denoise(x, 0.6, 0.8))
    assert [p.name for p in tmp_path.iterdir()] == ["bank.npz"]


def test_memory_map_stays_mapped(tmp_path):
    bank = make_bank(9, (1, 7, 5))
    np.save(tmp_path / "images.npy", bank.images.numpy())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    x = noisy(bank, 0.6, 0.8)
    for other in (pyels.PatchBank(mapped), pyels.PatchBank.load(tmp_path / "images.npy")):
        assert torch.equal(pyels.ELS(other, 3).denoise(x, 0.6, 0.8), pyels.ELS(bank, 3).denoise(x, 0.6, 0.8))
    assert pyels.PatchBank(mapped).images.data_ptr() == mapped.ctypes.data


def test_compressed_npz_and_foreign_label_types(tmp_path):
    bank = make_bank(6, (1, 7, 5), labels=[0, 1, 0, 1, 0, 1])
    np.savez_compressed(tmp_path / "b.npz", images=bank.images.numpy(), labels=bank.labels.numpy().astype(np.uint16))
    loaded = pyels.PatchBank.load(tmp_path / "b.npz")
    assert torch.equal(loaded.images, bank.images)
    assert loaded.classes == [0, 1]


def test_class_index():
    bank = make_bank(6, (1, 4, 4), labels=[7, -1, 7, 2, -1, 7])
    assert bank.classes == [-1, 2, 7]
    begin, end = bank.class_range(7)
    assert bank.order[begin:end].tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match=r"label 3: no images of this class .* classes \[-1, 2, 7\]"):
        bank.class_range(3)
    with pytest.raises(ValueError, match="has none"):
        make_bank(2, (1, 4, 4)).class_range(0)
    with pytest.raises(ValueError, match=r"classes 0, 1, .* 19 and 30 more$"):
        make_bank(50, (1, 4, 4), labels=range(50)).class_range(-1)


def test_slices_share_memory(small):
    part = small[3:7]
    assert len(part) == 4
    assert part.images.data_ptr() == small.images[3:].data_ptr()
    assert torch.equal(part.labels, small.labels[3:7])


def test_damaged_compressed_bank_is_refused_by_name(tmp_path):
    bank = make_bank(9, (1, 7, 5))
    np.savez_compressed(tmp_path / "bank.npz", images=bank.images.numpy())
    whole = (tmp_path / "bank.npz").read_bytes()
    for position in range(40, len(whole), 7):
        (tmp_path / "bank.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            loaded = pyels.PatchBank.load(tmp_path / "bank.npz")
        except ValueError as error:
            assert "bank.npz" in str(error)  # noqa: PT017 (some bytes, such as dates, do not matter)
        else:
            assert torch.equal(loaded.images, bank.images)


@pytest.mark.parametrize("cut", [10, 200, 400])
@pytest.mark.parametrize("name", ["bank.npz", "images.npy"])
def test_truncated_files_are_refused_by_name(tmp_path, name, cut):
    bank = make_bank(9, (1, 7, 5))
    path = tmp_path / name
    bank.save(path) if name.endswith("npz") else np.save(path, bank.images.numpy())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=name):
        pyels.PatchBank.load(path)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "bank.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"bank\.npz"):
        pyels.PatchBank.load(tmp_path / "bank.npz")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch, small):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    with pytest.raises(OSError, match="No space left"):
        small.save(tmp_path / "bank.npz")
    assert list(tmp_path.iterdir()) == []


# ---- What a bank is made of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 28, 28, 1), (10, 32, 32, 3), (10, 30, 40, 4), (10, 64, 64, 13)])
def test_channels_last_are_asked_about(shape):
    with pytest.warns(UserWarning, match=r"if \(N, H, W, C\) is meant, give .*permute") as warned:
        pyels.PatchBank(torch.full(shape, 9, dtype=torch.uint8))
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize("shape", [(10, 1, 28, 28), (10, 13, 16, 16), (10, 4, 4, 4), (10, 16, 8, 8), (10, 3, 2, 2)])
def test_channels_first_are_not(shape):
    pyels.PatchBank(torch.full(shape, 9, dtype=torch.uint8))


def test_other_things_than_arrays_of_four_axes():
    with pytest.raises(ValueError, match=r"of grey images \(N, H, W\), give images\[:, None\]"):
        pyels.PatchBank(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(TypeError, match=r"PIL images; give pyels\.datasets\.from_pairs"):
        pyels.PatchBank([Image.new("RGB", (8, 8))])
    with pytest.raises(TypeError, match="float128"):
        pyels.PatchBank(np.zeros((3, 1, 8, 8), np.longdouble))


UNIT = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (UNIT, r"float images lie in \[0, 1\].*2 \* images - 1"),
        (UNIT * 0.9, r"float images lie in \[0, 1\]"),
        (UNIT - 0.5, r"float images lie in \[-0\.5, 0\.5\]"),
        ((UNIT > 0.5).to(torch.uint8), "0 and 1 alone .* multiply them by 255"),
        ((UNIT - 0.45) / 0.225, "reach from -2 to 2.44.* undo what normalised them"),
        ((UNIT[:, :1] - 0.13) / 0.31, "undo what normalised them"),
        (UNIT[:, [0, 1, 2, 0]] * 255, "reach from .* to 255"),
    ],
)
@pytest.mark.parametrize("limit", [None, 8000])
def test_values_that_seem_to_mean_something_else(tmp_path, images, message, limit):
    with pytest.warns(UserWarning, match=message) as warned:
        bank = pyels.PatchBank(images)
    assert [w.filename for w in warned] == [__file__]
    bank[:20].save(tmp_path / "bank.npz")  # of which nothing is said anew
    with pytest.warns(UserWarning, match=message):
        pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)


def test_values_of_which_nothing_is_said():
    latents = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    for images in (2 * UNIT - 1, torch.zeros(9, 1, 8, 8), torch.zeros(9, 1, 8, 8, dtype=torch.uint8), latents):
        pyels.PatchBank(images)
    for images in (UNIT * 255, latents * 1e6):
        with pytest.raises(ValueError, match=r"give 0\.\.255 values as uint8, or scale them"):
            pyels.PatchBank(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    latents = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    bank = pyels.PatchBank(latents, list(range(9)))
    assert bank.dtype == torch.float32
    assert torch.equal(bank.images, latents.float())
    if dtype == torch.float16:
        np.savez(tmp_path / "half.npz", images=latents.numpy())
        assert torch.equal(pyels.PatchBank.load(tmp_path / "half.npz").images, latents.float())
        streamed = pyels.PatchBank.load(tmp_path / "half.npz", memory_limit=3000)
        assert streamed.streamed
        assert torch.equal(streamed.read(slice(None)), latents.float())
        assert torch.equal(torch.cat([part.clone() for part in streamed.pieces()]), latents.float())


@pytest.mark.parametrize("scale", [1.0, 13.0, 1e4])
@pytest.mark.parametrize("offset", [0, -30])
def test_latents_are_as_exact_as_pictures(scale, offset):
    """In proportion to the largest value. Worst seen: 4e-7 of it."""
    latents = (torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + offset) * scale
    bank = pyels.PatchBank(latents)
    x, sigma = noisy(bank, 1.0, 2 * scale, batch=2), 2 * scale
    for kind in ("IS", "LS", "ELS-zeros"):
        ours, oracle = (
            MACHINES[kind](bank, 3, engine=engine).denoise(x, 1.0, sigma) for engine in ("cpu", "reference")
        )
        assert float((ours - oracle).abs().max()) < 1e-6 * float(latents.abs().max()), kind


@pytest.mark.parametrize("names", ["cat", [1, 2], {"cat": 0, 1: "dog"}])
def test_class_names_are_text(names):
    with pytest.raises(TypeError, match="class_names must be a list of text"):
        pyels.PatchBank(np.zeros((3, 1, 4, 4), np.uint8), [0, 1, 0], names)


def test_labels_of_any_integer_type():
    images = np.zeros((3, 1, 4, 4), np.uint8)
    ids = [4_000_000_000, -7, 2**62]
    assert pyels.PatchBank(images, ids).classes == sorted(ids)
    assert pyels.PatchBank(images, np.array([[1], [0], [1]], np.uint8)).labels.tolist() == [1, 0, 1]
    assert pyels.PatchBank(images, np.array([1, 0, 2**40], np.uint64)).classes == [0, 1, 2**40]
    with pytest.raises(ValueError, match=r"labels must be below 2\^63"):
        pyels.PatchBank(images, np.array([1, 0, 2**63], np.uint64))


@pytest.mark.parametrize("limit", [None, 3 * 72])
def test_cut_by_numbers_and_masks(tmp_path, small, limit):
    small.class_names = ["a", "b", "c"]
    small.save(tmp_path / "bank.npz")
    bank = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)
    assert bank.streamed == (limit is not None)
    mask = small.labels == 1
    for part in (
        mask,
        mask.numpy(),
        mask.tolist(),
        [1, 4, 7, 10],
        (1, 4, 7, 10),
        range(1, 12, 3),
        np.array([1, 4, 7, 10]),
    ):
        cut = bank[part]
        assert torch.equal(cut.read(slice(None)), small.read(mask.nonzero()[:, 0]))
        assert cut.labels.tolist() == [1] * 4
        assert cut.streamed == bank.streamed
        assert cut.class_names == ["a", "b", "c"]
    assert torch.equal(bank[[9, 2, 2]][[0, 2]][1:].read(slice(None)), small.read(torch.tensor([2])))
    x = noisy(small, 0.6, 0.8)
    assert torch.equal(pyels.IS(bank[mask]).denoise(x, 0.6, 0.8), pyels.IS(bank[1::3]).denoise(x, 0.6, 0.8))
    bank[[5, 3]].save(tmp_path / "two.npz")
    assert pyels.PatchBank.load(tmp_path / "two.npz").verify()
    for part, message in ((mask[1:], r"shape \(12,\)"), ([12], "from 0 to 11"), ([-1], "from 0 to 11"), ([], "empty")):
        with pytest.raises(ValueError, match=message):
            bank[part]
    for part in (3, "1", [0.5], None):
        with pytest.raises(TypeError, match=r"cut by a slice, image numbers or a mask|bank\[\.\.\] must be"):
            bank[part]


# ---- Files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("limit", [None, 1000])
def test_npz_files_of_others(tmp_path, compressed, limit):
    grey = np.random.default_rng(0).integers(0, 256, (30, 9, 8)).astype(np.uint8)
    labels, colour = np.arange(30) % 3, np.stack([grey, 255 - grey, grey], axis=-1)
    write = np.savez_compressed if compressed else np.savez
    files = {
        "medmnist": dict(train_images=grey, train_labels=labels[:, None], val_images=grey, test_images=grey[:5]),
        "colour": dict(train_images=colour, train_labels=labels[:, None], test_images=colour[:5]),
        "keras": dict(x_train=grey, y_train=labels, x_test=grey[:5], y_test=labels[:5]),
        "one channel": dict(images=grey[..., None], labels=labels),
        "nameless": dict(arr_0=grey),
        "colours of our own": dict(images=np.moveaxis(colour, -1, 1)),
    }
    for name, arrays in files.items():
        write(tmp_path / "bank.npz", **arrays)
        has_colours = "colour" in name
        if limit is not None and (compressed or name == "colour"):
            with pytest.raises(ValueError, match=r"save them with PatchBank\.save"):
                pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)
            continue
        bank = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)
        expected = np.moveaxis(colour, -1, 1) if has_colours else grey[:, None]
        assert np.array_equal(bank.read(slice(None)), pyels.PatchBank(expected).read(slice(None))), name
        assert bank.labels is None or bank.labels.tolist() == labels.tolist()
        if any("test" in key for key in arrays):
            assert len(pyels.PatchBank.load(tmp_path / "bank.npz", "test")) == 5
        else:
            with pytest.raises(ValueError, match="no array 'test_images' or 'x_test'"):
                pyels.PatchBank.load(tmp_path / "bank.npz", "test")


def test_what_save_wrote_is_never_turned(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = pyels.PatchBank(np.full((4, 13, 30, 1), 9, np.uint8))
        bank.save(tmp_path / "spectra.npz")
        assert pyels.PatchBank.load(tmp_path / "spectra.npz").shape == (13, 30, 1)


@pytest.mark.parametrize("limit", [None, 500])
def test_hostile_headers(tmp_path, limit):
    def header(length, text=b""):
        return b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little") + text

    def of(shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.getvalue()

    for content in (header(2**31, b" " * 999), header(9000, b"(" * 9000), of((2**40, 1, 8, 8)), of((-1, 1, 8, 8)), b""):
        (tmp_path / "bank.npy").write_bytes(content)
        for name, kind in (("stored.npz", zipfile.ZIP_STORED), ("packed.npz", zipfile.ZIP_DEFLATED)):
            with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
                archive.writestr("images.npy", content)
        for name in ("bank.npy", "stored.npz", "packed.npz"):
            with pytest.raises(ValueError, match=name):
                pyels.PatchBank.load(tmp_path / name, memory_limit=limit)
    images = np.zeros((3, 1, 8, 8), np.uint8)
    for name, values in (
        ("labels", np.zeros((3, 9), np.int64)),
        ("labels", np.zeros(10**6, np.int64)),
        ("class_names", np.array(["x" * 10**6] * 3)),
        ("class_names", np.arange(3)),
    ):
        np.savez_compressed(tmp_path / "bank.npz", images=images, **{name: values})
        with pytest.raises(ValueError, match=rf"bank\.npz.*{name}"):
            pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit)


# ---- The same bank -------------------------------------------------------------------------------------------------


def test_every_image_counts_for_what_a_bank_is(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3001, 1, 4, 4)).astype(np.uint8)
    known = pyels.PatchBank(images).fingerprint()
    for i in (0, 1, 1500, 3000):
        changed = images.copy()
        changed[i, 0, 3, 3] ^= 1
        assert pyels.PatchBank(changed).fingerprint() != known
    assert pyels.PatchBank(images[::-1].copy()).fingerprint() != known
    pyels.PatchBank(images).save(tmp_path / "bank.npz")
    for limit in (None, 10_000):
        assert pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=limit).fingerprint() == known


@pytest.mark.parametrize("kind", ["numpy", "torch", "large", "slice"])
def test_a_bank_that_is_changed_in_memory_is_refused(kind):
    images = make_bank(9, (1, 8, 8)).images.clone()
    if kind == "large":  # of several parts that are looked at
        images = torch.zeros((70_000, 1, 8, 8), dtype=torch.uint8)
    bank = pyels.PatchBank(images.numpy() if kind == "numpy" else images)
    machine = pyels.IS(bank[2:] if kind == "slice" else bank)
    x = torch.zeros(1, 1, 8, 8)
    before = machine.denoise(x, 0.6, 0.8)
    images.numpy()[-1, 0, 3, 3] ^= 255
    with pytest.raises(ValueError, match="images of this bank have been changed since it was made; make a new bank"):
        machine.denoise(x, 0.6, 0.8)
    images.numpy()[-1, 0, 3, 3] ^= 255
    assert torch.equal(machine.denoise(x, 0.6, 0.8), before)


@pytest.mark.parametrize("kind", ["mapped", "memmap", "streamed"])
def test_a_bank_that_is_changed_on_disk_is_refused(tmp_path, kind):
    path = tmp_path / "bank.npy"
    np.save(path, make_bank(90, (1, 8, 8)).images.numpy())
    bank = {
        "mapped": lambda: pyels.PatchBank.load(path),
        "memmap": lambda: pyels.PatchBank(np.load(path, mmap_mode="r")),
        "streamed": lambda: pyels.PatchBank.load(path, memory_limit=1000),
    }[kind]()
    machine, x = pyels.LS(bank, 3), torch.zeros(1, 1, 8, 8)
    machine.denoise(x, 0.6, 0.8)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(ValueError, match=r"has been written to since"):
        machine.denoise(x, 0.6, 0.8)


@pytest.mark.parametrize("kind", ["mapped", "memmap"])
def test_a_bank_that_is_cut_off_during_a_call_ends_no_process(tmp_path, kind):
    """In one of its own, which would be killed."""
    path = tmp_path / "bank.npy"
    np.save(path, np.zeros((2000, 1, 28, 28), np.uint8))
    load = "pyels.PatchBank.load(p)" if kind == "mapped" else "pyels.PatchBank(np.load(p, mmap_mode='r'))"
    script = (
        "import os, sys, threading, numpy as np, torch, pyels; p = sys.argv[1]\n"
        f"machine = pyels.ELS({load}, 3, 'circular', threads=1)\n"
        "threading.Timer(0.3, os.truncate, (p, 100_000)).start()\n"
        "try: machine.denoise(torch.zeros(1, 1, 28, 28), 0.6, 0.8)\n"
        "except ValueError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended
    assert "bank.npy: truncated: image 127" in ended.stdout or "bank.npy: has been written to" in ended.stdout


def test_a_bank_that_is_written_to_during_a_call_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bank.npz"
    make_bank(9, (1, 8, 8)).save(path)
    machine, x = pyels.IS(pyels.PatchBank.load(path)), torch.zeros(1, 1, 8, 8)
    before = machine.denoise(x, 0.6, 0.8)
    evaluate = type(machine.engine).evaluate

    def meanwhile(*arguments):
        result = evaluate(*arguments)
        os.utime(path, ns=(1, 1))
        return result

    monkeypatch.setattr(type(machine.engine), "evaluate", meanwhile)
    with pytest.raises(ValueError, match=r"bank\.npz: has been written to"):
        machine.denoise(x, 0.6, 0.8)
    monkeypatch.undo()
    assert torch.equal(machine.denoise(x, 0.6, 0.8), before)  # as every checksum agrees


@pytest.mark.parametrize("kind", ["numbers", "step", "pickled"])
def test_a_copy_of_a_mapped_bank_is_watched_as_memory(tmp_path, kind):
    path = tmp_path / "bank.npy"
    np.save(path, make_bank(9, (1, 8, 8)).images.numpy())
    for i, load in enumerate((pyels.PatchBank.load, lambda path: pyels.PatchBank(np.load(path, mmap_mode="r")))):
        bank = load(path)
        copy = {
            "numbers": lambda bank=bank: bank[[0, 1, 2]],
            "step": lambda bank=bank: bank[::2],
            "pickled": lambda bank=bank: pickle.loads(pickle.dumps(bank)),
        }[kind]()
        machine, x = pyels.IS(copy), torch.zeros(1, 1, 8, 8)
        before = machine.denoise(x, 0.6, 0.8)
        os.utime(path, ns=(i, i))
        assert torch.equal(machine.denoise(x, 0.6, 0.8), before)
        copy.images.numpy()[0, 0, 0, 0] ^= 255
        with pytest.raises(ValueError, match="images of this bank have been changed since it was made"):
            machine.denoise(x, 0.6, 0.8)


def test_what_is_copied_from_a_file_is_checked(tmp_path):
    make_bank(9, (1, 8, 8)).save(tmp_path / "bank.npz")
    bank = pyels.PatchBank.load(tmp_path / "bank.npz")
    blob = (tmp_path / "bank.npz").read_bytes()
    place = blob.index(bank.images[4].numpy().tobytes())
    with open(tmp_path / "bank.npz", "r+b") as file:
        file.seek(place)
        file.write(bytes([blob[place] ^ 1]))
    assert len(bank[[3, 5]]) == 2
    with pytest.raises(ValueError, match=r"bank\.npz: image 4 is damaged"):
        bank[[3, 4]]


@pytest.mark.parametrize("mode", ["r", "r+", "c", "view", "transposed", "deleted"])
def test_memory_maps_of_every_mode_are_watched(tmp_path, mode):
    path = tmp_path / "bank.npy"
    images = make_bank(9, (1, 8, 8)).images.numpy()
    np.save(path, images.transpose(0, 1, 3, 2) if mode == "transposed" else images)
    given = np.load(path, mmap_mode=mode if mode in ("r+", "c") else "r")
    if mode == "deleted":
        path.unlink()
    bank = pyels.PatchBank(
        {"view": np.asarray, "transposed": lambda a: a.transpose(0, 1, 3, 2)}.get(mode, lambda a: a)(given)
    )
    machine, x = pyels.IS(bank), torch.zeros(1, 1, 8, 8)
    before = machine.denoise(x, 0.6, 0.8)
    if mode == "deleted":
        assert torch.equal(machine.denoise(x, 0.6, 0.8), before)
        return
    if mode in ("r+", "c"):
        given[-1] ^= 255
    else:
        os.utime(path, ns=(1, 1))
    if mode == "transposed":  # a copy
        assert torch.equal(machine.denoise(x, 0.6, 0.8), before)
        bank.images.numpy()[-1] ^= 255
    with pytest.raises(ValueError, match="written to since it was mapped" if mode in ("r", "view") else "been changed"):
        machine.denoise(x, 0.6, 0.8)


def test_a_file_that_is_cut_off_is_no_zeros(tmp_path):
    """Whatever looks at the images."""
    path = tmp_path / "bank.npy"
    for load in (pyels.PatchBank.load, lambda path: pyels.PatchBank(np.load(path, mmap_mode="r"))):
        for use in (
            lambda bank: bank.read(slice(None)),
            lambda bank: bank[[8999]],
            lambda bank: bank.fingerprint(),
            lambda bank: bank.save(path.with_suffix(".npz")),
            lambda bank: list(bank.pieces()),
        ):
            np.save(path, np.full((9000, 1, 8, 8), 7, np.uint8))
            bank = load(path)
            os.truncate(path, 100_000)
            with pytest.raises(ValueError, match=r"bank\.npy: (truncated|has been written to)"):
                use(bank)
            assert not path.with_suffix(".npz").exists()


def test_images_of_inference_mode_are_watched():
    with torch.inference_mode():
        images = torch.rand(9, 1, 8, 8) * 2 - 1
        bank = pyels.PatchBank(images)
        bank.shared = False
        machine, x = pyels.IS(bank), torch.zeros(1, 1, 8, 8)
        machine.denoise(x, 0.6, 0.8)
        images[0] = 0
        with pytest.raises(ValueError, match="been changed since it was made"):
            machine.denoise(x, 0.6, 0.8)


def test_a_bank_is_what_it_was_when_it_was_made():
    images, labels = make_bank(4, (1, 8, 8)).images.numpy().copy(), np.array([0, 1, 1, 0])
    bank = pyels.PatchBank(images, labels, np.array(["a", "b"]))
    labels[:] = 1
    assert bank.labels.tolist() == [0, 1, 1, 0]
    assert bank.class_names == ["a", "b"]
    images[0] ^= 255
    with pytest.raises(ValueError, match="been changed since it was made"):
        pyels.IS(bank)
