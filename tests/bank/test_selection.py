"""Which images count: classes, lists, all but some, shares; in memory and streamed."""

import numpy as np
import pytest
import torch
from helpers import MACHINES, make_bank, noisy, partial

import pyels
from pyels.bank import PatchBank, Selection


def numbers(selection):
    """The image numbers of every query."""
    return [
        list(range(a, b)) if selection.order is None else selection.order[a:b].tolist()
        for a, b in zip(selection.begin.tolist(), selection.end.tolist(), strict=True)
    ]


def test_all_classes_lists_and_the_rest(small):
    zero = [i for i in range(12) if small.labels[i] == 0]
    assert numbers(small.select()) == [list(range(12))]
    assert numbers(small.select(labels=[0, 2])) == [zero, [2, 5, 8]]
    assert numbers(small.select(images=[7, 3, 3])) == [[3, 7]]
    assert numbers(small.select(images=[[7, 3], [1]])) == [[3, 7], [1]]
    assert numbers(small.select(without=5)) == [[i for i in range(12) if i != 5]]
    assert numbers(small.select(labels=[2, 0], without=[[5], []])) == [[2, 8], zero]
    assert numbers(small.select(labels=[2, 2], images=torch.arange(6))) == [[2, 5], [2, 5]]
    a, b = small.select(images=[[1, 2], [2, 1]]).names
    assert a == b != small.select(images=[3]).names[0]


def test_shares_are_disjoint_and_together_all(small):
    for whole in (small.select(), small.select(labels=[1, 0]), small.select(without=[[1], [2, 3]])):
        for parts in (1, 2, 5, 20):
            shares = [numbers(whole.share(i, parts)) for i in range(parts)]
            assert [[n for share in shares for n in share[b]] for b in range(len(whole))] == numbers(whole)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", MACHINES)
def test_machine_over_a_selection_is_that_over_the_selected(kind, streamed, small, tmp_path):
    bank = small
    if streamed:
        small.save(tmp_path / "bank.npz")
        bank = PatchBank.load(tmp_path / "bank.npz", memory_limit=5 * 72)
    x = noisy(small, 0.6, 0.8, batch=2)
    lists = [[0, 3, 4, 9], [2, 9, 11]]
    machine = MACHINES[kind](bank, 3)
    ours = machine.posterior(x, 0.6, 0.8, selection=bank.select(images=lists))
    for b, images in enumerate(lists):
        alone = MACHINES[kind](PatchBank(small.images[images]), 3).posterior(x[b : b + 1], 0.6, 0.8)
        torch.testing.assert_close(ours.mean[b], alone.mean[0], rtol=0, atol=0 if not streamed else 1e-6)
        torch.testing.assert_close(
            ours.log_evidence[b], alone.log_evidence[0], rtol=0 if not streamed else 1e-6, atol=0
        )
        assert torch.equal(ours.source[b, ..., 0], torch.tensor(images)[alone.source[0, ..., 0]])
        assert torch.equal(ours.source[b, ..., 1:], alone.source[0, ..., 1:])


@pytest.mark.parametrize("kind", MACHINES)
def test_classes_as_a_selection(kind, small):
    x, labels = noisy(small, 0.6, 0.8, batch=3), torch.tensor([1, 0, 1])
    machine = MACHINES[kind](small, 3)
    assert torch.equal(
        machine.denoise(x, 0.6, 0.8, labels), machine.denoise(x, 0.6, 0.8, selection=small.select(labels=labels))
    )


def test_leaving_out_and_what_was_left_out_merge_to_the_whole(small):
    x, machine = noisy(small, 0.6, 0.8, batch=2), pyels.ELS(small, 3)
    rest = partial(machine, x, 0.6, 0.8, selection=small.select(without=[4, 5]))
    merged = rest.merge(partial(machine, x, 0.6, 0.8, selection=small.select(images=[4, 5])))
    torch.testing.assert_close(merged.mean(), machine.denoise(x, 0.6, 0.8), rtol=0, atol=1e-6)


def test_sampled_engine_is_exact_for_lists(tmp_path):
    bank = make_bank(400, (1, 12, 12))
    x = noisy(bank, 0.6, 0.8)
    machine = pyels.ELS(bank, 5, engine="sampled", index=tmp_path)
    mean = machine.denoise(x, 0.6, 0.8, selection=bank.select(images=range(50, 350)))
    torch.testing.assert_close(mean, pyels.ELS(bank[50:350], 5).denoise(x, 0.6, 0.8), rtol=0, atol=1e-6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"images": [12]}, ValueError, "images must be image numbers from 0 to 11"),
        ({"without": [-1]}, ValueError, "without must be image numbers"),
        ({"images": [0.5]}, TypeError, "images must be image numbers"),
        ({"images": "all"}, TypeError, "images must be image numbers"),
        ({"without": {1, 2}}, TypeError, "without must be image numbers, one list or one for each query, got set"),
        ({"labels": ["a"]}, TypeError, "labels must be integers"),
        ({"without": list(range(12))}, ValueError, "no images are left for query 0"),
        ({"labels": [0, 1], "images": [[3], [0], [1]]}, ValueError, "labels is for 2 queries, but the rest for 3"),
        ({"labels": [7]}, ValueError, "label 7: no images of this class"),
        ({"labels": [0.5]}, TypeError, "labels must be integers"),
    ],
)
def test_bad_selections(small, given, error, why):
    with pytest.raises(error, match=why):
        small.select(**given)


def test_bad_use_of_selections(small):
    x, machine = noisy(small, 0.6, 0.8, batch=2), pyels.ELS(small, 3)
    with pytest.raises(TypeError, match=r"selection must be what bank\.select\(\.\.\) gives, got list"):
        machine.denoise(x, 0.6, 0.8, selection=[1, 2])
    with pytest.raises(ValueError, match="the selection is for 3 queries, but x has 2 images"):
        machine.denoise(x, 0.6, 0.8, selection=small.select(labels=[0, 1, 2]))
    with pytest.raises(ValueError, match="labels and selection were given"):
        machine.denoise(x, 0.6, 0.8, torch.tensor([0, 1]), selection=small.select(images=[0]))
    with pytest.raises(ValueError, match="the selection is of a bank of 11 images, but the machine's has 12"):
        machine.denoise(x, 0.6, 0.8, selection=small[:11].select())
    for order, begin, end in ((None, 0, 13), (None, 3, 2), ([-1], 0, 1), ([12], 0, 1), ([1], 0, 2)):
        order = None if order is None else torch.tensor(order)
        made_up = Selection(12, order, torch.tensor([begin]), torch.tensor([end]), ("all",))
        with pytest.raises(ValueError, match="selection has images that its bank has not"):
            machine.denoise(x, 0.6, 0.8, selection=made_up)


def test_a_set_is_kept_once_and_known_by_its_images(small):
    many = small.select(labels=[0] * 64, without=[5])
    assert len(many) == 64
    assert many.order is not None
    assert len(many.order) == 5
    names = {small.select(images=[a, b]).names[0] for a in range(12) for b in range(a)}
    assert len(names) == 66


def test_one_label_in_any_form(small):
    for label in (1, np.int64(1), np.array(1), torch.tensor(1)):
        assert small.select(labels=label).names == small.select(labels=[1]).names
    with pytest.raises(TypeError, match="labels must be integers"):
        small.select(labels=0.5)
