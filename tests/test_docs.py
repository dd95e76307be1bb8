"""What the documentation promises of itself."""

import re
import subprocess
import sys
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
        for page in ("README.md", "docs/denoisers.md", "docs/explain.md")
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


def test_tables_of_results_are_what_the_records_say():
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "results_table.py", "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
