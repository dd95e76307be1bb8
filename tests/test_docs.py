"""What the documentation promises of itself."""

from pathlib import Path

import pyels

DOCS = Path(__file__).parents[1] / "docs"


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    assert [name for name in pyels.__all__ if f"\n::: pyels.{name}\n" not in pages] == []
