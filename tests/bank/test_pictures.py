"""Folders of pictures: which are classes, which pictures count, and how each becomes pixels."""

import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from pyels import datasets
from pyels.bank import pictures


def write_image(path, size=(8, 6), value=100, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


def folder_of(tmp_path, *names):
    for i, name in enumerate(names):
        write_image(tmp_path / name, value=i)
    return tmp_path


def load(folder, said=None, **options):
    """The red values of a folder's pictures, which are their numbers in `folder_of`, and their labels."""
    if said is None:
        bank = datasets.load(folder, **options)
    else:
        with pytest.warns(UserWarning, match=said) as warned:
            bank = datasets.load(folder, **options)
        assert [w.filename for w in warned] == [__file__]
    return bank.images[:, 0, 0, 0].tolist(), None if bank.labels is None else bank.labels.tolist()


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


# ---- What is a class -----------------------------------------------------------------------------------------------


def test_what_systems_put_into_folders_is_no_data(tmp_path):
    hidden = (".ipynb_checkpoints/a.png", "cat/._a.png", "cat/@eaDir/a.png/thumb.png", "__MACOSX/cat/a.png")
    assert load(folder_of(tmp_path, "cat/a.png", "dog/a.png", *hidden)) == ([0, 1], [0, 1])
    (tmp_path / "cat" / "b.png").mkdir()
    assert datasets.load(tmp_path).class_names == ["cat", "dog"]


def test_splits(tmp_path):
    names = ("train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png")
    assert load(folder_of(tmp_path, *names)) == ([0, 1], [0, 1])
    assert load(tmp_path, split="test") == ([2, 3], [0, 1])
    assert load(tmp_path / "val") == ([2, 3], [0, 1])
    folder_of(tmp_path, "bus/a.png")
    with pytest.raises(ValueError, match="are bus, train, val classes or splits"):
        datasets.load(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train", "dev"),
        ("Training", "eval"),
        ("train-1", "valid-1"),
    ],
)
def test_names_of_splits(tmp_path, train, test):
    folder_of(tmp_path, f"{train}/cat/a.png", f"{train}/dog/a.png", f"{test}/cat/a.png", f"{test}/dog/a.png")
    assert load(tmp_path) == ([0, 1], [0, 1])
    assert load(tmp_path, split="test") == ([2, 3], [0, 1])


def test_two_folders_of_one_split_are_asked_about(tmp_path):
    with pytest.raises(ValueError, match="which of train2014, train2017 is split 'train'"):
        load(folder_of(tmp_path, "train2014/cat/a.png", "train2017/cat/a.png"))


@pytest.mark.parametrize("split", ["", "train/", "train/all/"])
def test_a_zip_of_one_folder(tmp_path, split):
    folder = folder_of(tmp_path / "all", *(f"pets/{split}{name}/a.png" for name in ("cat", "dog")))
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in [folder / "pets", *folder.rglob("*.png")]:
            file.write(path, path.relative_to(folder))
    if split == "train/all/":
        assert load(tmp_path / "pets.zip", said="in folders of class folders") == ([0, 1], [0, 0])
    else:
        assert load(tmp_path / "pets.zip") == ([0, 1], [0, 1])


def test_a_class_may_be_called_train_and_a_split_may_be_missing(tmp_path):
    assert load(folder_of(tmp_path / "vehicles", "bus/a.png", "train/a.png")) == ([0, 1], [0, 1])
    for folder in ("vehicles", "vehicles/bus"):
        with pytest.raises(ValueError, match="no split 'test'"):
            datasets.load(tmp_path / folder, split="test")
    folder_of(tmp_path / "part", "Train/cat/a.png", "Train/dog/a.png")
    with pytest.raises(ValueError, match="no folder of split 'test' in it, only Train"):
        datasets.load(tmp_path / "part", split="test")
    assert load(tmp_path / "part") == ([0, 1], [0, 1])


def test_pictures_beside_folders_of_pictures(tmp_path):
    folder_of(tmp_path, "cat/a.png", "dog/a.png", "overview.png")
    assert load(tmp_path, said=r"a picture, overview\.png, beside class folders left out") == ([0, 1], [0, 1])
    folder_of(tmp_path, "1.png", "2.png")
    with pytest.raises(ValueError, match=r"3 pictures, such as 1\.png, beside folders of pictures, cat, dog"):
        datasets.load(tmp_path)


def test_folders_in_class_folders_belong_to_the_class(tmp_path):
    folder_of(tmp_path, "cat/indoors/a.png", "cat/outdoors/a.png", "dog/a.png")
    assert load(tmp_path, said="2 pictures, .* where the uppermost folder is the class") == ([0, 1, 2], [0, 0, 1])


def test_an_empty_class_keeps_its_number(tmp_path):
    folder_of(tmp_path, "bird/a.png", "dog/a.png")
    (tmp_path / "cat").mkdir()
    assert load(tmp_path, said="class folders without pictures, which keep their numbers: cat") == ([0, 1], [0, 2])
    with pytest.warns(UserWarning, match="cat"):
        bank = datasets.load(tmp_path)
    assert bank.class_names == ["bird", "cat", "dog"]
    bank[1:].save(tmp_path / "dog.npz")
    assert datasets.load(tmp_path / "dog.npz", size=3)[[0]].name_of(2) == "2 (dog)"


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder_of(tmp_path / "all", "cat/a.png", "dog/a.png")
    folder_of(tmp_path / "mine", "dog/a.png")
    (tmp_path / "mine" / "cat").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "mine" / "dog" / "again").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "itself").symlink_to(tmp_path / "mine" / "itself")
    assert load(tmp_path / "mine") == ([0, 0], [0, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_numbered_folders_with_a_list_of_labels(tmp_path, packed):
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(6)]
    folder, archive = folder_of(tmp_path / "edm", *names), tmp_path / "edm.zip"

    def loaded(content):
        (folder / "dataset.json").write_text(content)
        with zipfile.ZipFile(archive, "w") as file:
            for path in folder.rglob("*.*"):
                file.write(path, path.relative_to(folder))
        return load(archive if packed else folder)

    labels = [7, 2, 7, 2, 7, 2]
    listed = [list(pair) for pair in zip(names, labels, strict=True)]
    assert loaded(json.dumps({"labels": [*listed, ["elsewhere.png", 1]]})) == ([0, 1, 2, 3, 4, 5], labels)
    assert loaded(json.dumps({"labels": None})) == ([0, 1, 2, 3, 4, 5], None)
    assert loaded(json.dumps({"labels": {"0": "background"}})) == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    for wrong in ("[" * 100_000, "{", '{"labels": [3]}', '{"labels": [[[], 1]]}', json.dumps({"labels": listed[1:]})):
        with pytest.raises(ValueError, match=r"dataset\.json"):
            loaded(wrong)
    with pytest.raises(ValueError, match=r"img00000000\.png must be an integer of 64 bits, got 1000"):
        loaded(json.dumps({"labels": [[name, 10**30] for name in names]}))
    if packed:
        archive.write_bytes(archive.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"edm\.zip: not a readable zip"):
            load(archive)


@pytest.mark.parametrize("packed", [False, True])
def test_a_list_of_labels_that_is_too_large_is_not_read_whole(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(pictures, "_LARGEST_LIST", 1 << 16)
    folder, archive = folder_of(tmp_path / "edm", "00000/a.png"), tmp_path / "edm.zip"
    with open(folder / "dataset.json", "wb") as file:
        file.truncate(1 << 26)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("00000/a.png", "dataset.json"):
            file.write(folder / name, name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"dataset\.json: no list of .* \(larger than 65536 bytes\)"):
            load(archive if packed else folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_limit_is_spread_over_the_classes(tmp_path):
    names = [f"{c}/{i}.png" for c in ("bird", "cat", "dog") for i in range(2 if c == "cat" else 9)]
    assert load(folder_of(tmp_path, *names), limit=9) == ([0, 1, 2, 3, 9, 10, 11, 12, 13], [0] * 4 + [1] * 2 + [2] * 3)


# ---- What a picture is ---------------------------------------------------------------------------------------------


def test_suffixes(tmp_path):
    for suffix in ("ppm", "jp2", "TIFF", "jfif", "tga", "webp"):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(
            tmp_path / f"a.{suffix}", **({"format": "JPEG"} if suffix == "jfif" else {})
        )
    for name in ("notes.txt", "labels.csv", "more.h5"):
        (tmp_path / name).write_text("-")
    assert len(datasets.load(tmp_path)) == 6
    (tmp_path / "b.heic").write_text("-")
    with pytest.warns(UserWarning, match=r"left out: 1 \.heic"):
        assert len(datasets.load(tmp_path)) == 6


def test_no_other_program_is_asked_to_read_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        datasets.load(tmp_path)


def test_pictures_are_turned_as_their_cameras_say(tmp_path):
    image = Image.new("L", (12, 8))
    image.paste(255, (0, 0, 12, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    bank = datasets.load(tmp_path)
    assert bank.shape == (1, 12, 8)
    assert (bank.images[0, 0] == np.repeat([[0, 255]], 4).reshape(1, 8)).all()


def test_transparency(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "opaque.png", transparency=0)
    assert datasets.load(tmp_path).shape == (3, 4, 4)
    (tmp_path / "opaque.png").unlink()
    palette.save(tmp_path / "glass.png", transparency=1)
    assert datasets.load(tmp_path).images[0, :, 0, 0].tolist() == [0, 0, 255, 0]
    assert datasets.load(tmp_path, mode="RGB").images[0, :, 0, 0].tolist() == [255] * 3
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    assert datasets.load(tmp_path, mode="L").images.unique().tolist() == [255]


def test_of_several_frames_the_first(tmp_path):
    frames = [Image.new("L", (8, 6), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (8, 6), 30).save(tmp_path / "b.gif")
    assert load(tmp_path, said=r"of 1 pictures only the first of several frames is used, first .*a\.gif", mode="L") == (
        [10, 30],
        None,
    )


def test_one_mode_for_all(tmp_path):
    write_image(tmp_path / "a.png", mode="L")
    write_image(tmp_path / "b.png")
    for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)):
        assert datasets.load(tmp_path, mode=mode).shape == (channels, 6, 8)


def test_crop(tmp_path):
    image = Image.new("L", (16, 8))
    image.paste(200, (4, 0, 12, 8))
    image.save(tmp_path / "a.png")
    assert (datasets.load(tmp_path, size=4, crop=True).images == 200).all()
    assert not (datasets.load(tmp_path, size=4).images == 200).all()


def test_files_that_cannot_be_read(tmp_path):
    folder_of(tmp_path, "cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png")
    (tmp_path / "cat" / "a.png").write_bytes(b"\x89PNG")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    (tmp_path / "dog" / "lost.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cat/a\.png: not a readable image .*skip_unreadable"):
        datasets.load(tmp_path)
    said = r"3 of 6 pictures cannot be read and are left out, first .*cat/a\.png"
    assert load(tmp_path, said=said, skip_unreadable=True) == ([1, 2, 3], [0, 1, 1])
    for path in (tmp_path / "cat" / "b.png", tmp_path / "dog" / "a.png", tmp_path / "dog" / "b.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="6 of 6"), pytest.raises(ValueError, match="none of its 6 pictures"):
        datasets.load(tmp_path, skip_unreadable=True)


def test_damaged_pictures_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(path)
        whole = path.read_bytes()
        for _ in range(40):
            content = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(0, 256)
            path.write_bytes(content)
            try:
                datasets.load(tmp_path)
            except ValueError as error:
                assert path.name in str(error)  # noqa: PT017
            except Warning:
                pass  # Pillow's own, which are errors here
        path.unlink()


def test_no_pictures_are_read_that_have_no_room(tmp_path):
    folder_of(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes(b"-")
    with pytest.raises(ValueError, match="432 bytes of pixels have to be in memory at once"):
        datasets.load(tmp_path, memory_limit=300)
    with pytest.raises(ValueError, match=r"c\.png: not a readable image"):
        datasets.load(tmp_path, memory_limit=432)


@pytest.mark.parametrize("name", ["bank.npz", "bank.zip", "train-images-idx3-ubyte", "data_batch_1", "dataset.json"])
def test_pipes_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=r"not a file|no images in it"):
        datasets.load(tmp_path / name if "." in name[:5] else tmp_path)


def test_pictures_too_large_to_be_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image .*bomb"):
        datasets.load(tmp_path)
    monkeypatch.undo()
    Image.new("1", (5000, 5000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image \(5000x5000 pixels in \d+ bytes\)"):
        datasets.load(tmp_path, size=8)
