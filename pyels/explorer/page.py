"""A trace as a web page: one file, without a server and with nothing that is fetched.

The page holds what is said of the trace as JSON, and its tensors as a safetensors file, deflated and in base64.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pyels.bank import PatchBank
from pyels.checks import check_count
from pyels.definition import Definition, Gaussian, Sources, Square, WholeImage
from pyels.files import path_of, replacing
from pyels.machines import Machine
from pyels.provenance import Trace, attribute


def write_page(
    path: str | Path,
    trace: Trace,
    machine: Machine,
    sample: int = 0,
    title: str = "",
    images: int = 10,
    limit: int = 5_000_000,
) -> None:
    """Write a page on which one sample of a trace can be explored: every pixel, every step.

    Numbers are those of the trace, in float32. Pictures of training images are in 8 bits, of the first three channels,
    and exact where all that are named have room; else as JPEG, those of the most weight, as many as have. Of the others
    the page says number, place and weight.

    Parameters
    ----------
    path     the file, such as explorer.html
    trace    of `pyels.provenance.trace`
    machine  the machine it was made with
    sample   which of its samples, from 0
    title    of the page; "": the machine and its bank
    images   how many of the images that the sample owes most to are listed
    limit    bytes that the page may have

    Raises
    ------
    OSError                the file cannot be written
    TypeError, ValueError  a trace of another bank; no such sample; more bytes than `limit` even without training images
    """
    page = page_of(trace, machine, sample, title, images, limit)
    with replacing(path_of(path)) as temporary:
        temporary.write_text(page.text, encoding="utf-8")


@dataclass(frozen=True, repr=False)
class Page:
    """A page, as `write_page` writes it; notebooks show it where it is.

    Attributes
    ----------
    text  all of it, HTML
    """

    text: str

    def __repr__(self) -> str:
        return f"Page({len(self.text.encode()):,} bytes of HTML, which a notebook shows)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.text)}" title="pyels explorer" '
            'style="width: 100%; height: 56rem; border: 0"></iframe>'
        )


def page_of(
    trace: Trace, machine: Machine, sample: int = 0, title: str = "", images: int = 10, limit: int = 5_000_000
) -> Page:
    """What `write_page` writes."""
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < trace.x.shape[1]:
        raise ValueError(f"sample must be one of the trace's {trace.x.shape[1]}, from 0, got {sample!r}")
    bank, limit = machine.bank, check_count("limit", limit)
    trace.check_bank(bank)
    owed = attribute(trace, images)
    title = title or f"{type(machine).__name__}, {len(bank)} training images"
    listed, names, definition = owed.image[sample], bank.class_names, machine.definition
    who = [type(machine).__name__, f"sources {trace.sources.replace('_', ' ')}"]
    who += ["with mirror images"] * definition.mirror + ["folded"] * (definition.fold is not None)
    windows = [machine.definition_of(**level.told) for level in trace.levels]
    said: dict[str, Any] = {
        "title": title,
        "machine": ", ".join(who),
        "bank": len(bank),
        "counted": int(trace.candidates[sample].sum()),
        "wraps": Sources(trace.sources) in (Sources.CIRCULAR, Sources.INTERIOR),
        "windows": [_window(one, *bank.shape[1:]) for one in windows],
        "sides": [2 * max(bank.shape) if isinstance(one.window, WholeImage) else one.patch_size for one in windows],
        "names": None if names is None else list(names),
    }
    tensors = {name: getattr(trace, name)[:, sample] for name in _OF_SAMPLES if getattr(trace, name) is not None}
    tensors |= {name: getattr(trace, name).float() for name in ("t", "alpha", "sigma")}
    tensors |= {name: tensors[name].to(dtype) for name, dtype in _NARROWER.items()}
    tensors |= {
        "listed": listed.int(),
        "listed_share": owed.share[sample].float(),
        "listed_influence": trace.influence[:, sample, listed],
        "counts": owed.steps[:, sample].float(),
        "owner": owed.pixel_image[sample].int(),
        "owner_share": owed.pixel_share[sample].float(),
    }
    without = len(_filled(title, said, tensors).encode())
    kept = _of_most_weight(trace, sample, listed)
    room = (limit - without) * 3 // 4 - 1024  # in base64; and names of what is added
    form, count, sheet = _sheet(bank, kept, room - 8 * min(len(kept), room // 256))  # and numbers and classes
    if not count:
        raise ValueError(
            f"the page has {without} bytes and more before its training images, and limit is {limit}; trace fewer "
            f"steps, or fewer sources of each pixel (top), or raise the limit"
        )
    said["sheet"] = {"type": f"image/{form}", "of": len(kept)}
    kept = kept[:count]
    tensors |= {"kept": kept.int(), "sheet": torch.frombuffer(bytearray(sheet), dtype=torch.uint8)}
    if bank.labels is not None:
        tensors["kept_label"] = bank.labels.cpu()[kept].int()
    return Page(_filled(title, said, tensors))


_OF_SAMPLES = ("x", "x0", "network_x0", "entropy", "log_evidence", "image", "row", "column", "weight")
_BLOCK = 8  # pixels
_NARROWER = {"image": torch.int32, "row": torch.int16, "column": torch.int16}


def _window(definition: Definition, height: int, width: int) -> str:
    """What is compared, in words."""
    k = definition.patch_size
    match definition.window:
        case WholeImage():
            return f"the whole image, {height} x {width}"
        case Square():
            return f"{k} x {k}"
        case Gaussian(width=of):
            return f"a Gaussian of width {of:g}, which ends at {k} x {k}"
    return "a mask of its own for every pixel, which is not drawn"


def _of_most_weight(trace: Trace, sample: int, first: Tensor) -> Tensor:
    """Numbers of images by their weight in all that is shown, the largest first, after those that come first anyway."""
    image, weight = trace.image[:, sample].flatten(), trace.weight[:, sample].flatten().double()
    owed = torch.zeros(trace.influence.shape[-1], dtype=torch.float64)
    owed.index_add_(0, image.clamp(min=0), weight)  # -1, none, has weight 0
    owed[first] = torch.inf
    order = owed.argsort(descending=True, stable=True)
    return order[: int((owed > 0).sum())]


def _sheet(bank: PatchBank, numbers: Tensor, room: int) -> tuple[str, int, bytes]:
    """The first of these images side by side in one picture: exact where all have room, else as JPEG, as many as have.

    Returns its format, the number of images, and its bytes.
    """
    count = max(min(len(numbers), room // 256), 0)  # none is smaller by much
    if count == len(numbers) and len(sheet := _tiled(bank, numbers, "png")) <= room:
        return "png", count, sheet
    while count and len(sheet := _tiled(bank, numbers[:count], "jpeg")) > room:
        count = int(0.98 * count * room / len(sheet))
    return "jpeg", count, sheet if count else b""


def _tiled(bank: PatchBank, numbers: Tensor, form: str) -> bytes:
    """Images in a square of tiles, grey, or their first channels as colours; each tile is whole blocks of a JPEG."""
    channels, height, width = bank.shape
    columns, shown = math.ceil(math.sqrt(len(numbers))), 1 if channels == 1 else 3
    high, wide = height + -height % _BLOCK, width + -width % _BLOCK
    tiles = torch.zeros(-(-len(numbers) // columns) * columns, shown, high, wide, dtype=torch.uint8)
    for at in range(0, len(numbers), 1024):
        images = F.pad(bank.read(numbers[at : at + 1024])[:, :3], (0, wide - width, 0, high - height), mode="replicate")
        tiles[at : at + len(images), : images.shape[1]] = ((images + 1) * 127.5).round().clamp(0, 255)
    sheet = tiles.reshape(-1, columns, *tiles.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray((sheet[..., 0] if shown == 1 else sheet).contiguous().numpy()).save(
        file, form, quality=85, subsampling=0
    )
    return file.getvalue()


def _filled(title: str, said: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The page."""
    packed = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    folder = importlib.resources.files("pyels.explorer")
    style, script, page = (
        (folder / name).read_text(encoding="utf-8") for name in ("explorer.css", "explorer.js", "page.html")
    )
    return Template(page).substitute(
        title=html.escape(title),
        style=style,
        script=script,
        said=json.dumps(said).replace("<", "\\u003c"),  # no "</script>" in it, whatever the words are
        tensors=base64.b64encode(zlib.compress(packed)).decode(),
    )
