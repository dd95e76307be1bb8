"""New or remembered, of pictures whose answer is known."""

import pytest
import torch
from helpers import make_bank

import pyels
from pyels.metrics import log_evidence, mse, nearest_image, nearest_patches


@pytest.fixture(scope="module")
def bank(fashion):
    return fashion[:300]


@pytest.fixture(scope="module")
def pictures(fashion):
    """A training image, one moved down by two and left by one, a mosaic of the halves of two, noise, one held out."""
    copy, moved, left, right = fashion.read(torch.tensor([40, 41, 200, 100]))
    mosaic = torch.cat([left[..., :14], right[..., 14:]], -1)
    noise = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    moved = torch.roll(moved, (2, -1), (1, 2))
    return torch.stack([copy, moved, mosaic, noise, fashion.read(torch.tensor([3000]))[0]])


def test_the_nearest_image_also_when_moved(bank, pictures):
    plain, moved = nearest_image(pictures, bank), nearest_image(pictures, bank, shift=2)
    assert int(plain.image[0]) == int(moved.image[0]) == 40
    assert (int(moved.image[1]), int(moved.row[1]), int(moved.column[1])) == (41, 2, -1)
    assert float(moved.mse[:2].max()) < 1e-12 < 0.01 < float(plain.mse[1])
    assert (moved.mse[2:] > 0.01).all()  # a mosaic is no copy, and not always nearest to those it is of
    assert float(moved.mse[3]) > 0.5
    assert (moved.mse <= plain.mse + 1e-12).all()
    assert (plain.row == 0).all()


@pytest.mark.parametrize("shape", [(1, 7, 6), (3, 6, 9)])
def test_it_is_what_a_search_one_by_one_finds(shape, monkeypatch):
    monkeypatch.setattr(pyels.novelty, "_AT_ONCE", 1)  # image by image
    bank, images = make_bank(9, shape), make_bank(3, shape, seed=1).read(slice(None))
    found = nearest_image(images, bank, shift=2)
    _, height, width = shape
    for b, picture in enumerate(images):
        least = []
        for i, image in enumerate(bank.read(slice(None))):
            for row in range(-2, 3):
                for column in range(-2, 3):
                    top, left = max(0, row), max(0, column)
                    bottom, right = min(height, height + row), min(width, width + column)
                    there = image[:, top - row : bottom - row, left - column : right - column]
                    difference = mse(picture[None, :, top:bottom, left:right], there[None])
                    least.append((float(difference), i, row, column))
        difference, *where = min(least)
        assert [int(found.image[b]), int(found.row[b]), int(found.column[b])] == where
        assert abs(float(found.mse[b]) - difference) < 1e-12


def test_patches_of_training_images(bank, pictures):
    copied, consistent, off = [], [], []
    for boundary in ("zeros", "circular"):
        patches = nearest_patches(pictures, pyels.ELS(bank, 5, boundary))
        copied.append(patches.copied())
        consistent.append(patches.consistent())
        off.append(patches.inconsistency)
    for share in (*copied, *consistent):
        assert float(share[0]) == 1  # a copy
        assert float(share[1]) > 0.85  # but for what was moved over the border
        assert 0.8 < float(share[2]) < 1  # but for the seam
        assert float(share[3]) < 0.15  # nothing in noise
    assert float(copied[1][1]) == 1  # rolled around is what circular windows do not see
    assert (copied[0][4] < copied[0][:3]).all()  # held out
    assert (off[0][0] == 0) & (off[0][2] < off[0][3])


@pytest.mark.parametrize(
    "make",
    [
        lambda bank: pyels.ELS(bank, 3),
        lambda bank: pyels.ELS(bank, 5, "circular"),
        lambda bank: pyels.ELS(bank, 5, "interior"),
        lambda bank: pyels.LS(bank, 3, mirror=True),
    ],
)
def test_they_are_the_nearest_to_the_oracle(make):
    bank, images = make_bank(6, (3, 6, 5)), make_bank(2, (3, 6, 5), seed=1).read(slice(None))
    machine = make(bank)
    found = nearest_patches(images, machine)
    expected = pyels.Machine(bank, machine.definition, "reference").posterior(images, 1.0, 0.01).source
    assert torch.equal(torch.stack([found.image, found.row, found.column], -1), expected)
    training, k = bank.read(slice(None)), machine.definition.size
    centres = training[found.image, :, found.row, found.column].movedim(-1, 1)
    torch.testing.assert_close(found.difference, mse_of_pixels(images - centres).sqrt())
    if machine.definition.mirror:
        return
    total, count = torch.zeros(2, 6, 5).double(), torch.zeros(2, 6, 5)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(5), indexing="ij")
    for i in range(-(k // 2), k // 2 + 1):
        for j in range(-(k // 2), k // 2 + 1):
            y, x = rows + i, columns + j
            inside = (y >= 0) & (y < 6) & (x >= 0) & (x < 5) | torch.tensor(machine.definition.wraps)
            theirs = training[found.image, :, (found.row + i) % 6, (found.column + j) % 5].movedim(-1, 1)
            total += mse_of_pixels(images[:, :, y % 6, x % 5] - theirs) * inside
            count += inside
    torch.testing.assert_close(found.mse, total / count, atol=1e-6, rtol=0)


def mse_of_pixels(difference):
    return difference.double().square().mean(1)


def test_unlike_pictures_have_less_evidence(bank, pictures):
    machine = pyels.ELS(bank, 5)
    evidence = log_evidence(pictures, machine)
    assert evidence.dtype == torch.float64
    assert (evidence[3] < evidence[4] - 100) & (evidence[4] < evidence[:3].min())
    expected = machine.posterior(pictures, 1.0, 0.1).log_evidence.double().mean((1, 2))
    assert torch.equal(evidence, expected)


def test_a_streamed_bank_gives_the_same(tmp_path):
    bank, images = make_bank(20, (1, 9, 8)), make_bank(2, (1, 9, 8), seed=1).read(slice(None))
    bank.save(tmp_path / "bank.npz")
    streamed = pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=300)
    for ours, theirs in (
        (nearest_image(images, streamed, 1), nearest_image(images, bank, 1)),
        (
            vars(nearest_patches(images, pyels.ELS(streamed, 3))).values(),
            vars(nearest_patches(images, pyels.ELS(bank, 3))).values(),
        ),
    ):
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bad_arguments_are_refused_in_words(small):
    x = torch.zeros(1, 1, 9, 8)
    for shift in (4, -1):
        with pytest.raises(ValueError, match="shift must be"):
            nearest_image(x, small, shift=shift)
    with pytest.raises(TypeError, match="bank must be"):
        nearest_image(x, x)
    with pytest.raises(ValueError, match="the bank's are"):
        nearest_image(x[..., 1:], small)
    with pytest.raises(TypeError, match=r"machine must be a pyels\.Machine"):
        nearest_patches(x, small)
    with pytest.raises(TypeError, match=r"machine must be a pyels\.Machine"):
        log_evidence(x, small)
    for machine in (pyels.IS(small), pyels.PSPC(small, 3)):
        with pytest.raises(ValueError, match="must have square windows"):
            nearest_patches(x, machine)
    with pytest.raises(ValueError, match="sigma must be positive"):
        log_evidence(x, pyels.IS(small), sigma=0)
    with pytest.raises(ValueError, match="patch_size is missing"):
        nearest_patches(x, pyels.ELS(small))
