"""Published files, and what may be wrong with them: nothing is executed, or unpacked beyond what they may hold."""

import gzip
import io
import pickle
import pickletools
import tarfile

import numpy as np
import pytest

from pyels import datasets


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def load_idx(folder, images, labels):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(images)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    return datasets.load("mnist", root=folder)


@pytest.mark.parametrize("cut", [2, 10, 60, 150])
def test_truncated_idx_file_is_refused_by_name(tmp_path, cut):
    images, labels = idx(np.arange(210, dtype=np.uint8).reshape(7, 6, 5)), idx(np.zeros(7, np.uint8))
    assert len(load_idx(tmp_path, gzip.compress(images), gzip.compress(labels))) == 7
    for packed in (gzip.compress(images)[:-cut], gzip.compress(images[:cut]), gzip.compress(images + b"\0")):
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
            load_idx(tmp_path, packed, gzip.compress(labels))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images[:cut])
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: "):
        datasets.load("mnist", root=tmp_path)


def test_no_more_of_an_idx_file_is_unpacked_than_its_header_says(tmp_path, monkeypatch):
    head = b"\0\0\x08\x03" + np.array((2, 6, 5), ">i4").tobytes()
    read = []

    class Watched(gzip.GzipFile):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(gzip, "open", Watched)
    with pytest.raises(ValueError, match="overlong idx file"):
        load_idx(tmp_path, gzip.compress(head + bytes(10**7)), b"")
    assert sum(read) < 100
    with pytest.raises(ValueError, match=r"truncated or overlong idx file, its shape is .*4000000000"):
        load_idx(tmp_path, gzip.compress(head[:4] + b"\xee\x6b\x28\x00" * 3 + bytes(999)), b"")
    assert -1 not in read


def cifar_batches(n):
    rng = np.random.default_rng(1)
    return [(rng.integers(0, 256, (n, 3072)).astype(np.uint8), rng.integers(0, 10, n)) for _ in range(5)]


def test_cifar10_binary_python_and_archives_agree(tmp_path):
    batches = cifar_batches(4)
    expected = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    folders = {name: tmp_path / name for name in ("binary", "python", "archive", "python-archive")}
    files = {"binary": {}, "python": {}}
    for i, (pixels, labels) in enumerate(batches, 1):
        records = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
        files["binary"][f"cifar-10-batches-bin/data_batch_{i}.bin"] = records.tobytes()
        batch = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x", b"filenames": [b"a.png"]}
        files["python"][f"cifar-10-batches-py/data_batch_{i}"] = pickle.dumps(batch, protocol=2)
    for kind in ("binary", "python"):
        for name, content in files[kind].items():
            (folders[kind] / name).parent.mkdir(parents=True, exist_ok=True)
            (folders[kind] / name).write_bytes(content)
    for kind, archive in (("binary", "archive"), ("python", "python-archive")):
        folders[archive].mkdir()
        with tarfile.open(folders[archive] / f"cifar-10-{kind}.tar.gz", "w:gz") as tar:
            for name, content in files[kind].items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for folder in folders.values():
        bank = datasets.load("cifar10", root=folder)
        assert np.array_equal(bank.images.numpy(), expected)
        assert bank.labels.tolist() == np.concatenate([labels for _, labels in batches]).tolist()
    (folders["binary"] / "cifar-10-batches-bin/data_batch_3.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_3\.bin.*truncated"):
        datasets.load("cifar10", root=folders["binary"])
    whole = (folders["archive"] / "cifar-10-binary.tar.gz").read_bytes()
    (folders["archive"] / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz"):
        datasets.load("cifar10", root=folders["archive"])


# ---- Python batches --------------------------------------------------------------------------------------------------


def write_batches(folder, **changes):
    """Five python batches, of which the first is another; protocol 2, as published, unless told."""
    rng = np.random.default_rng(1)
    protocol = changes.pop("protocol", 2)
    (folder / "cifar-10-batches-py").mkdir(exist_ok=True)
    for i in range(1, 6):
        batch = {b"data": rng.integers(0, 256, (4, 3072)).astype(np.uint8), b"labels": [1, 2, 3, i]}
        content = pickle.dumps(batch | changes.get("batch", {}), protocol)
        if i == 1:
            content = changes.get("content", content)
        (folder / f"cifar-10-batches-py/data_batch_{i}").write_bytes(content)
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_batches_that_were_pickled_again(tmp_path, protocol):
    expected = datasets.load("cifar10", root=write_batches(tmp_path))
    rng = np.random.default_rng(1)
    for i in range(1, 6):
        pixels = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        labels = np.array([1, 2, 3, i])
        batch = [
            {"data": pixels, "labels": labels},
            {"data": np.asfortranarray(pixels), "labels": list(labels)},  # numpy's integers
            {b"data": pixels.reshape(-1, 3, 32, 32), b"labels": labels.astype(">i2")},
            {"labels": tuple(labels.tolist()), "data": np.asfortranarray(pixels)},
            {"data": pixels[:, ::-1][:, ::-1], "labels": labels.astype(np.uint8)[:, None]},
        ][i - 1]
        (tmp_path / f"cifar-10-batches-py/data_batch_{i}").write_bytes(pickle.dumps(batch, protocol))
    again = datasets.load("cifar10", root=tmp_path)
    assert again.images.equal(expected.images)
    assert again.labels.equal(expected.labels)


def nested(depth):
    labels = [1]
    for _ in range(depth):
        labels = [labels] * 4
    return labels


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"labels": nested(30)}, "labels that are no integers"),
        ({b"labels": [1, 2, 3]}, "4 images, 3 labels"),
        ({b"labels": [1, 2, 3, 10**30]}, "not a CIFAR-10 python batch"),
        ({b"labels": np.zeros(4)}, "an array of type 'f8', expected integers"),
        ({b"labels": np.array([1, 2, 3, None])}, "an array of type 'O8', expected integers"),
        ({b"data": np.zeros((4, 3072), np.int16)}, "images int16 of shape"),
        ({b"data": np.zeros((3072, 4), np.uint8)}, "expected bytes of shape"),
        ({b"data": [[0] * 3072] * 4}, "not a CIFAR-10 python batch"),
    ],
)
def test_batches_of_other_things(tmp_path, batch, message):
    with pytest.raises(ValueError, match=rf"data_batch_1: .*{message}"):
        datasets.load("cifar10", root=write_batches(tmp_path, batch=batch))


def test_hostile_batches(tmp_path):
    far = b"\x80\x02]r\xff\xff\xff\x7f."  # a list, to be remembered as number 2^31 - 1
    assert any(code.name == "LONG_BINPUT" for code, *_ in pickletools.genops(far))
    for content in (far, b"", b"\x80\x02", pickle.dumps([]), pickle.dumps({b"data": np.dtype})):
        with pytest.raises(ValueError, match=r"data_batch_1: not a CIFAR-10 python batch"):
            datasets.load("cifar10", root=write_batches(tmp_path, content=content))
    rng = np.random.default_rng(0)
    whole = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}, 2)
    for _ in range(200):
        content = bytearray(whole)
        for at in rng.integers(0, 260, 3):
            content[at] = rng.integers(0, 256)
        try:
            datasets.load("cifar10", root=write_batches(tmp_path, content=bytes(content)))
        except ValueError as error:
            assert "data_batch_1" in str(error)  # noqa: PT017


# ---- Archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_in_an_archive_lead_nowhere(tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(3073))
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for i in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            info.type = kind
            info.linkname = str(tmp_path / "secret") if i == 1 else "cifar-10-batches-bin/data_batch_1.bin"
            tar.addfile(info)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: data_batch_1\.bin, .* missing from it"):
        datasets.load("cifar10", root=tmp_path)


def test_archives_that_unpack_to_more_than_they_may(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = 1 << 29
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(ValueError, match=r"damaged archive \(unpacks to more than 268435456 bytes\)"):
        datasets.load("cifar10", root=tmp_path)
