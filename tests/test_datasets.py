import gzip
import io

import numpy as np
import pytest
import torch
from PIL import Image

import pyels
from pyels import datasets


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


def test_labels_of_pairs_are_integers():
    pixels = np.zeros((5, 4), np.uint8)
    labels = (np.int64(1), torch.tensor(2), np.array([3]), 4)
    assert datasets.from_pairs([(pixels, one) for one in labels]).labels.tolist() == [1, 2, 3, 4]
    for wrong in (0.9, None, "1", np.array([1, 2]), torch.tensor(0.5)):
        with pytest.raises(TypeError, match="the label of pair 1 must be an integer, got"):
            datasets.from_pairs([(pixels, 0), (pixels, wrong)])


def test_pairs_in_other_layouts_and_modes():
    for shape in ((1, 28, 28), (3, 32, 32), (13, 64, 64)):
        with pytest.raises(ValueError, match=r"image 0, an array of shape .* looks like \(C, H, W\)"):
            datasets.from_pairs([(np.zeros(shape, np.uint8), 0)])
    red = Image.new("RGB", (6, 5), (255, 0, 0))
    for mode in ("HSV", "CMYK", "YCbCr", "P"):
        pixels = datasets.from_pairs([(red.convert(mode), 0)]).images[0, :, 0, 0].tolist()
        assert np.abs(np.subtract(pixels, (255, 0, 0))).max() <= 2, mode
    with pytest.raises(ValueError, match=r"image 0 has mode F; convert it"):
        datasets.from_pairs([(red.convert("F"), 0)])


def test_class_names():
    class Pairs(list):
        classes = ["cat", "dog"]  # noqa: RUF012

    assert datasets.from_pairs(Pairs([(np.zeros((4, 4), np.uint8), 1)])).class_names == ["cat", "dog"]
    assert datasets.from_pairs([(np.zeros((4, 4), np.uint8), 1)]).class_names is None
    with pytest.warns(UserWarning, match="the first 2 pairs are of 1 of 2 classes; shuffle them before"):
        datasets.from_pairs(Pairs([(np.zeros((4, 4), np.uint8), i // 5) for i in range(9)]), limit=2)
    bank = datasets.load("fashion-mnist-6000", limit=3)
    assert [bank.name_of(c) for c in (9, 0)] == ["9 (ankle boot)", "0 (T-shirt/top)"]


@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw", "FashionMNIST/raw"])
def test_idx_files_where_others_leave_them(idx_folder, tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("root")
    (root / folder).mkdir(parents=True, exist_ok=True)
    for file in idx_folder.iterdir():
        file.rename(root / folder / file.name)
    assert len(datasets.load("fashion-mnist" if "Fashion" in folder else "mnist", root=root)) == 7
    assert len(datasets.load(root / folder, split="test")) == 3  # a folder of such files is a data set, too
    (root / folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte\\.gz is not there"):
        datasets.load(root / folder, split="test")


def test_files_that_are_none_of_these(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable bank \(neither an npz nor an npy file; of pictures"):
        datasets.load(tmp_path / "a.png")
    np.save(tmp_path / "one.npy", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one\.npy.*one picture of shape \(9, 9, 3\)"):
        datasets.load(tmp_path / "one.npy")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no images in it that Pillow reads, only 1 \.npy"):
        datasets.load(tmp_path)


def test_home_in_paths(tmp_path, monkeypatch, idx_folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(datasets.load("mnist", root="~")) == 7
    pyels.PatchBank(np.zeros((2, 1, 4, 4), np.uint8)).save("~/bank.npz")
    assert len(datasets.load("~/bank.npz")) == len(pyels.PatchBank.load("~/bank.npz")) == 2


def test_limit_takes_as_many_of_each_class_that_lie_in_a_row(tmp_path):
    labels = np.repeat([3, 5, 9], [6, 1, 4])
    images = np.arange(11, dtype=np.uint8).repeat(16).reshape(11, 1, 4, 4)
    pyels.PatchBank(images, labels).save(tmp_path / "sorted.npz")
    bank = datasets.load(tmp_path / "sorted.npz", limit=6)
    assert bank.labels.tolist() == [3, 3, 3, 5, 9, 9]
    assert bank.images[:, 0, 0, 0].tolist() == [0, 1, 2, 6, 7, 8]
    assert torch.equal(
        datasets.load(tmp_path / "sorted.npz", limit=6, memory_limit=64).read(slice(6)), bank.read(slice(6))
    )
    assert datasets.load(tmp_path / "sorted.npz", limit=2).labels.tolist() == [3, 5]
    pyels.PatchBank(images, np.roll(labels, 1)).save(tmp_path / "mixed.npz")
    assert datasets.load(tmp_path / "mixed.npz", limit=6).images[:, 0, 0, 0].tolist() == list(range(6))


def test_limit_takes_whole_classes_in_any_order(tmp_path):
    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(4, 2).repeat(4, 3)
    pyels.PatchBank(images, np.repeat([3, 2, 1, 0], 10)).save(tmp_path / "bank.npz")
    bank = datasets.load(tmp_path / "bank.npz", limit=np.int64(8))
    assert bank.labels.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    pyels.PatchBank(images, np.tile([3, 2, 1, 0], 10)).save(tmp_path / "bank.npz")
    assert datasets.load(tmp_path / "bank.npz", limit=5).labels.tolist() == [3, 2, 1, 0, 3]


@pytest.mark.parametrize("name", ["label", "targets"])
def test_an_array_that_seems_to_be_labels_is_asked_about(tmp_path, name):
    arrays = {"images": np.zeros((5, 1, 4, 4), np.uint8), name: np.arange(5), "target": np.arange(3)}
    np.savez(tmp_path / "bank.npz", **arrays)
    with pytest.warns(UserWarning, match=f"bank.npz: '{name}' is not read as labels; call it 'labels'"):
        assert datasets.load(tmp_path / "bank.npz").labels is None


def test_crop_cuts_out_the_middle(tmp_path):
    images = np.zeros((2, 1, 8, 16), np.uint8)
    images[..., 4:12] = 200
    pyels.PatchBank(images).save(tmp_path / "wide.npz")
    assert (datasets.load(tmp_path / "wide.npz", size=4, crop=True).images == 200).all()
    assert not (datasets.load(tmp_path / "wide.npz", size=4).images == 200).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="imagenet"), "data set 'imagenet' is neither one of fashion-mnist-6000"),
        (dict(name="mnist", split="valid"), "split must be 'train' or 'test'"),
        (dict(name="fashion-mnist-6000", split="test"), "only a train split"),
        (dict(name="fashion-mnist-6000", limit=0), "limit must be at least 1"),
        (dict(name="fashion-mnist-6000", size=-3), "size must be at least 1"),
        (dict(name="fashion-mnist-6000", crop=True), "crop is of pictures that are resized"),
        (dict(name="fashion-mnist-6000", mode="LAB"), "mode must be one of L, RGB, RGBA, got 'LAB'"),
        (dict(name="fashion-mnist-6000", root="."), "root is where fashion-mnist, mnist, cifar10 are looked for"),
        (dict(name="fashion-mnist-6000", mode="L"), "mode and skip_unreadable are for folders of pictures"),
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
