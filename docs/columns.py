"""The docstrings of pyels as griffe reads them.

They are numpy's, but with tables in columns, in which a name and what is said of it stand side by side:

    Parameters
    ----------
    bank    the training images
    engine  "auto"  the fastest
            "cpu"   on the processor

Entries of sections become numpy's, a name on one line and its text below; tables elsewhere become lists.
"""

import re

import griffe

ENTRY = re.compile(r"([^\s(]+(?:, [^\s(]+)*) {2,}(\S.*)")
PRODUCT = re.compile(r"(?<=\w)\*(?=\w)")  # as in N*H*W, which would be emphasis
TITLE = re.compile(r"\n*([A-Z]\w+)\n-{3,}\n")


class Columns(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text, *sections = TITLE.split(obj.docstring.value)
            tables = ""
            for title, body in zip(sections[::2], sections[1::2], strict=True):
                first, *rest = body.strip("\n").split("\n\n")
                tables += f"\n\n{title}\n{'-' * len(title)}\n{entries(first)}"
                text = "\n\n".join([text, *rest])  # numpy's sections have no text after their entries
            obj.docstring.value = bullets(text) + tables


def table(paragraph: str) -> list[tuple[str, str]]:
    """The names of a table in columns and their texts; nothing where the paragraph is not one."""
    rows: list[tuple[str, str]] = []
    for line in paragraph.split("\n"):
        entry = ENTRY.fullmatch(line)
        if entry:
            rows.append((entry[1], entry[2]))
            column = entry.start(2)
        elif rows and line.startswith("  "):
            rows[-1] = rows[-1][0], f"{rows[-1][1]}\n{line.lstrip() if line[:column].strip() else line[column:]}"
        else:
            return []
    return rows


def bullets(text: str) -> str:
    """Paragraphs, and lists where there were tables."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        rows = table(paragraph)
        if not paragraph.startswith(" " * 4):  # where it would be code
            paragraph = PRODUCT.sub(r"\\*", paragraph)
        paragraphs.append("\n".join(f"- `{name}`: {indented(bullets(told))}" for name, told in rows) or paragraph)
    return "\n\n".join(paragraphs)


def entries(paragraph: str) -> str:
    """The table of a section in numpy's form."""
    return "\n".join(f"{name}\n    {indented(bullets(told))}" for name, told in table(paragraph)) or paragraph


def indented(text: str) -> str:
    return text.replace("\n", "\n    ")
