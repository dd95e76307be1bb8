"""A bank of latents says so wherever it goes, and its values may be anything."""

import pickle

import numpy as np
import pytest
import torch

import pyels
from pyels.bank.archive import write_arrays
from pyels.bank.latents import Latents

SPACE = Latents("mine.py:build", "00c0ffee", (1, 16, 16), (0.25, -1 / 3, 1e-9), 0.7)


def latents(n=9, scale=1.0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale


def write(path, dtype=torch.float16):
    values = latents().to(dtype)
    write_arrays(path, tuple(values.shape), dtype, [values[:5], values[5:]], SPACE, labels=list(range(9)))
    return values.float()


def test_scaling_and_back():
    z = latents()
    torch.testing.assert_close(SPACE.unscaled(SPACE.scaled(z)), z)
    torch.testing.assert_close(SPACE.scaled(z)[:, 1], (z[:, 1] + 1 / 3) * 0.7)
    assert Latents.of(SPACE.record()) == SPACE


def test_parts_and_copies_say_it_too(tmp_path):
    bank = pyels.PatchBank(latents(), list(range(9)), latents=SPACE)
    bank.save(tmp_path / "bank.npz")
    write(tmp_path / "half.npz")
    banks = [bank, pyels.PatchBank.load(tmp_path / "bank.npz"), pyels.datasets.load(tmp_path / "half.npz", limit=4)]
    banks += [pyels.PatchBank.load(tmp_path / name, memory_limit=4000) for name in ("bank.npz", "half.npz")]
    assert [one.streamed for one in banks] == [False, False, False, True, True]
    for one in banks:
        for part in (one, one[2:], one[[3, 1]], one.to("cpu"), pickle.loads(pickle.dumps(one))):
            assert part.latents == SPACE
    assert pyels.PatchBank(latents()[:, :1] / 9).latents is None


def test_of_latents_no_range_is_doubted():
    for values in (latents(scale=4), latents().abs() / 5, latents(scale=4).abs() + 20):
        pyels.PatchBank(values, latents=SPACE)
        with pytest.raises((UserWarning, ValueError), match=r"\[-1, 1\]"):  # tests make errors of warnings
            pyels.PatchBank(values)
    with pytest.raises(ValueError, match="the latents have 3 channels, but the images 4"):
        pyels.PatchBank(torch.zeros(2, 4, 8, 8), latents=SPACE)


def test_half_precision_is_read_as_float32(tmp_path):
    values = write(tmp_path / "half.npz")
    for limit in (None, 4000):
        bank = pyels.PatchBank.load(tmp_path / "half.npz", memory_limit=limit)
        assert bank.dtype == torch.float32
        assert bank.verify()
        assert torch.equal(bank.read(slice(None)), values)
        assert torch.equal(bank[[7, 2]].read(slice(None)), values[[7, 2]])
    assert bank.fingerprint() == pyels.PatchBank(values, list(range(9)), latents=SPACE).fingerprint()
    x = values[:2]
    whole = pyels.LS(pyels.PatchBank(values, latents=SPACE), 3).denoise(x, 0.6, 0.8)
    torch.testing.assert_close(pyels.LS(bank, 3).denoise(x, 0.6, 0.8), whole)
    with pytest.raises(ValueError, match="memory_limit must hold two images, 2 x 960 bytes"):
        pyels.PatchBank.load(tmp_path / "half.npz", memory_limit=1900)


@pytest.mark.parametrize("limit", [None, 4000])
def test_a_damaged_image_in_half_precision_is_named(tmp_path, limit):
    write(tmp_path / "half.npz")
    content = bytearray((tmp_path / "half.npz").read_bytes())
    content[content.index(latents()[6].half().numpy().tobytes()) + 40] ^= 1
    (tmp_path / "half.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"half\.npz: image 6 is damaged"):
        pyels.PatchBank.load(tmp_path / "half.npz", memory_limit=limit).verify()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (np.zeros(3), "'latents' must be one text, not float64"),
        (np.array("{}"), "it has no 'source'"),
        (np.array('{"source": "a", "crc32": "b", "shape": [1, 2], "shift": [0], "scale": 1}'), "pictures"),
        (
            np.array('{"source": "a", "crc32": "b", "shape": [1, 2, 2], "shift": [0], "scale": 0}'),
            "scaled by a number > 0",
        ),
    ],
)
def test_what_says_nothing_of_latents(tmp_path, said, message):
    np.savez(tmp_path / "bank.npz", images=latents().numpy(), latents=said)
    with pytest.raises(ValueError, match=rf"bank\.npz.*{message}"):
        pyels.PatchBank.load(tmp_path / "bank.npz")


def test_latents_are_not_resized(tmp_path):
    write(tmp_path / "half.npz")
    assert pyels.datasets.load(tmp_path / "half.npz", size=8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="latents are 8x8, and not resized"):
        pyels.datasets.load(tmp_path / "half.npz", size=4)
