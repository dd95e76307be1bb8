"""What notebooks show."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_bank
from PIL import Image

import pyels
from pyels.explorer import write_page
from pyels.provenance import Trace, trace
from pyels.studies import plots

NOISE = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def drawn(monkeypatch):
    """A function that gives what a picture is drawn of: rows, names of columns, title."""
    told = []
    draw = plots.draw_rows
    monkeypatch.setattr(plots, "draw_rows", lambda file, *of: (told.append(of), draw(file, *of)))

    def of(one):
        with Image.open(io.BytesIO(one._repr_png_())) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 100
        return told.pop()

    return of


def test_a_bank_shows_its_classes(drawn):
    bank = make_bank(12, (3, 7, 8), labels=[4, 1, 2] * 4)
    rows, _, title = drawn(pyels.PatchBank(bank.images, bank.labels, ["zero", "one"]))
    assert [row.label for row in rows] == ["1 (one)", "2", "4"]
    assert torch.equal(rows[0].images, bank.read([1, 4, 7, 10]))
    assert title.startswith("PatchBank(12 images of 3x7x8")
    (row,), *_ = drawn(pyels.PatchBank(bank.images[:1]))
    assert torch.equal(row.images, bank.read([0]))
    rows, *_ = drawn(make_bank(34, (1, 5, 5)))
    assert [len(row.images) for row in rows] == [10, 10, 10]
    rows, _, title = drawn(make_bank(13, (1, 5, 5), labels=[*range(12), 0]))
    assert [len(row.images) for row in rows] == [1] * 10
    assert title.endswith("of which 2 are not shown")


def test_a_streamed_bank_is_read_for_it(drawn, tmp_path):
    bank = make_bank(9, (1, 6, 6))
    bank.save(tmp_path / "bank.npz")
    (row,), *_ = drawn(pyels.PatchBank.load(tmp_path / "bank.npz", memory_limit=100))
    assert torch.equal(row.images, bank.read(range(9)))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_posterior_shows_its_fields(drawn, small, engine):
    machine = pyels.ELS(small, 3, engine=engine)
    posterior = machine.posterior(NOISE, 0.8, 0.6)
    rows, _, title = drawn(posterior)
    assert [row.label.split("\n")[0] for row in rows] == [
        "mean", "image of the", "its weight", "entropy, nats", "log-evidence, nats"
    ]  # fmt: skip
    assert torch.equal(rows[0].images, posterior.mean.float())
    assert title == repr(posterior) == "Posterior(2 images of 1x9x8)"
    low, high = (f"{float(value):.3g}" for value in posterior.entropy.double().aminmax())
    assert rows[3].label.endswith(f"\n{low} to {high}")
    place = posterior.entropy[0].argmax()  # the brightest in its image, where the first image has the most
    assert rows[3].images[0].sum(0).flatten().argmax() == place
    unsure = replace(posterior, certified=posterior.certified & False, entropy=posterior.entropy.fill_(torch.inf))
    rows, *_ = drawn(unsure)
    assert rows[-1].label.startswith("error of")
    assert rows[3].label.endswith("0 to 0")


def test_labels_of_one_column_have_room(small):
    """Nothing dark touches the left edge of the picture."""
    posterior = pyels.ELS(small, 3).posterior(NOISE[:1], 0.8, 0.6)
    with Image.open(io.BytesIO(posterior._repr_png_())) as picture:
        assert picture.convert("L").crop((0, 0, 2, picture.height)).getextrema()[0] > 250


def test_a_trace_shows_its_way(drawn, small):
    machine = pyels.ELS(small, 3)
    rows, columns, title = drawn(trace(machine, NOISE, 14, network=pyels.LS(small, 3)))
    assert [row.label.split("\n")[0] for row in rows] == ["noisy image", "network", "machine", "entropy, nats"]
    assert len(columns) == len(rows[0].images) == 10
    assert (columns[0], columns[-1]) == ("t = 1", "t = 0.0714")
    assert title.startswith("Trace(14 steps of 2 samples, by ELS: ")
    rows, columns, _ = drawn(traced := trace(machine, NOISE[:1], 2))
    assert len(rows) == 3
    assert torch.equal(rows[1].images, traced.x0[:, 0])


def test_a_trace_shows_its_page(small, tmp_path):
    machine = pyels.ELS(small, 3)
    traced = trace(machine, NOISE, 2)
    write_page(tmp_path / "page.html", traced, machine, sample=1, title="<here>")
    page = traced.show(sample=1, title="<here>")
    assert page.text == (tmp_path / "page.html").read_text()
    assert "<h1>" not in page._repr_html_()  # all of it is one attribute of a frame
    assert repr(page).startswith("Page(")
    traced.save(tmp_path / "trace.safetensors")
    read = Trace.load(tmp_path / "trace.safetensors")
    for one in read, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)):
        with pytest.raises(ValueError, match="give show the machine"):
            one.show()
        assert one.show(machine, 1, title="<here>").text == page.text
    with pytest.raises(ValueError, match="checksum"):
        read.show(pyels.ELS(make_bank(3, (1, 9, 8)), 3))
    with pytest.raises(ValueError, match="sample must be"):
        traced.show(sample=2)


@pytest.mark.needs(package="nbclient")
@pytest.mark.needs(package="ipykernel")
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_the_examples_run_and_are_kept_as_they_ran(path, tmp_path):
    import nbclient
    import nbformat

    kept = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(kept)
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    for one, other in zip(kept.cells, fresh.cells, strict=True):
        if one.cell_type == "code":
            kinds = [[sorted(output.get("data", {"text": ""})) for output in cell.outputs] for cell in (one, other)]
            assert kinds[0] == kinds[1]
