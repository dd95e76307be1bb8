import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import pyels
from pyels.bank import datasets


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """A tiny data set in the original format, train gzipped and test not."""
    rng = np.random.default_rng(0)
    for split, n, pack in (("train", 7, gzip.compress), ("t10k", 3, bytes)):
        suffix = ".gz" if pack is gzip.compress else ""
        images = rng.integers(0, 256, (n, 6, 5)).astype(np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(np.arange(n).astype(np.uint8))))
    return tmp_path


def test_embedded_subset_is_the_first_600_of_each_class(fashion):
    assert fashion.images.shape == (6000, 1, 28, 28)
    assert torch.bincount(fashion.labels).tolist() == [600] * 10
    assert fashion.labels[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]  # the data set's own first labels
    for folder in datasets.search_folders("fashion-mnist"):
        if (folder / "train-images-idx3-ubyte.gz").exists():
            whole = datasets.load("fashion-mnist", limit=5000)
            assert torch.equal(whole.images, fashion.images[:5000])
            return


def test_idx_files(idx_folder):
    for name in ("mnist", "fashion-mnist"):
        bank = datasets.load(name, root=idx_folder)
        assert bank.images.shape == (7, 1, 6, 5)
        assert bank.labels.tolist() == list(range(7))
        assert len(datasets.load(name, split="test", root=idx_folder)) == 3
        assert len(datasets.load(name, root=idx_folder, limit=2)) == 2
        assert datasets.load(name, root=idx_folder, size=12).shape == (1, 12, 12)


@pytest.mark.parametrize("cut", [2, 10, 60, 150])
def test_truncated_idx_file_is_refused_by_name(idx_folder, cut):
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"):
        path = idx_folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: min(cut, len(whole) - 3)])
        with pytest.raises(ValueError, match=name):
            datasets.load("mnist", split="train" if "train" in name else "test", root=idx_folder)


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


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_python_batches_execute_nothing(tmp_path, capsys):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for i in range(1, 6):
        (tmp_path / f"cifar-10-batches-py/data_batch_{i}").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_1.*refused to load builtins\.print"):
        datasets.load("cifar10", root=tmp_path)
    assert capsys.readouterr().out == ""


def write_image(path, size=(8, 6), value=100, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


def test_image_folders(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            write_image(tmp_path / name / f"{i}.png", value=50 * label + i)
    bank = datasets.load(tmp_path)
    assert bank.images.shape == (6, 3, 6, 8)
    assert bank.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert bank.images[4, 0, 0, 0] == 51
    flat = datasets.load(tmp_path / "cat", size=4)
    assert flat.images.shape == (3, 3, 4, 4)
    assert flat.labels is None
    write_image(tmp_path / "gray" / "a.png", mode="L")
    assert datasets.load(tmp_path / "gray").shape == (1, 6, 8)


def test_bad_image_folders(tmp_path):
    with pytest.raises(ValueError, match="no images in it"):
        datasets.load(tmp_path)
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(ValueError, match=r"b\.png is 9x9, but .*a\.png is 8x6; give a size"):
        datasets.load(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        datasets.load(tmp_path)


def test_image_modes_are_not_mixed_or_clipped(tmp_path):
    write_image(tmp_path / "a.png", mode="L")
    write_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has 3 channels, but .*a\.png has 1"):
        datasets.load(tmp_path)
    Image.fromarray(np.full((6, 8), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has mode I;16"):
        datasets.load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        datasets.load(tmp_path)


def test_pairs():
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    bank = datasets.from_pairs(
        [(Image.fromarray(pixels), 1), (pixels, 0), (torch.from_numpy(pixels).permute(2, 0, 1), 2)]
    )
    assert bank.images.shape == (3, 3, 5, 4)
    assert torch.equal(bank.images[0], bank.images[1])
    assert torch.equal(bank.images[0], bank.images[2])
    assert bank.labels.tolist() == [1, 0, 2]
    assert len(datasets.from_pairs(((pixels, i) for i in range(9)), limit=4)) == 4
    with pytest.raises(ValueError, match="image 1 has shape"):
        datasets.from_pairs([(pixels, 0), (pixels[1:], 0)])
    with pytest.raises(ValueError, match="no images"):
        datasets.from_pairs([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="imagenet"), "data set 'imagenet' is neither one of fashion-mnist-6000"),
        (dict(name="mnist", split="valid"), "split must be 'train' or 'test'"),
        (dict(name="fashion-mnist-6000", split="test"), "only a train split"),
        (dict(name="fashion-mnist-6000", limit=0), "limit must be at least 1"),
        (dict(name="fashion-mnist-6000", size=-3), "size must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(**arguments)


def test_absent_data_set_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "search_folders", lambda name, root=None: [tmp_path / "share", tmp_path / "cache"])

    def offline(*args, **kwargs):
        raise datasets.urllib.error.URLError("offline")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", offline)
    with pytest.raises(FileNotFoundError, match=r"share.*cannot be downloaded .*offline.*root="):
        datasets.load("mnist")
    assert not (tmp_path / "cache").exists()
    assert datasets.where("mnist") is None


def test_download_is_checked_and_kept(tmp_path, monkeypatch, idx_folder):
    monkeypatch.setattr(datasets, "search_folders", lambda name, root=None: [tmp_path / "share", tmp_path / "cache"])
    served = []

    class Response(io.BytesIO):
        headers: dict = {}  # noqa: RUF012

    def urlopen(url, timeout):
        served.append(url)
        return Response((idx_folder / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(datasets.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="MD5"):
        datasets.load("mnist")
    assert not list((tmp_path / "cache").rglob("*ubyte*"))
    sums = datasets._SOURCES["mnist"].md5
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        content = (idx_folder / name).read_bytes()
        monkeypatch.setitem(sums, name, datasets.hashlib.md5(content, usedforsecurity=False).hexdigest())
    assert len(datasets.load("mnist")) == 7
    assert len(datasets.load("mnist")) == 7
    assert len(served) == 3
    assert datasets.where("mnist") == tmp_path / "cache"
    assert pyels.datasets.load("mnist").images.shape == (7, 1, 6, 5)
