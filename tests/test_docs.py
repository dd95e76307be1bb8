"""What the documentation promises of itself."""

import re
from pathlib import Path

import pytest

import pyels

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert [name for name in pyels.__all__ if f"\n::: pyels.{name}\n" not in pages] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        block
        for page in ("README.md", "docs/denoisers.md")
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ],
)
def test_python_of_the_pages_runs(block, monkeypatch, capsys):
    """Word for word, on fewer images."""
    load = pyels.datasets.load
    monkeypatch.setattr(pyels.datasets, "load", lambda *names, **options: load(*names, **options)[:300])
    names = {}
    exec(block, names)
    if "posterior" in names:
        assert names["posterior"].source_weight.max() <= 1
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert names["images"].shape == (4, 1, 28, 28)
        assert names["bank"].labels[names["posterior"].source[0, 14, 14, 0]] == names["labels"][0]
