import zipfile

import numpy as np
import pytest
import torch
from helpers import make_bank, noisy

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
