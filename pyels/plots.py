"""Pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pyels.files import replacing


@dataclass(frozen=True)
class Row:
    """A labelled row of images (n, C, H, W), with a caption under each where there is one."""

    label: str
    images: Tensor
    captions: Sequence[str] | None = None


def draw_rows(path: str | Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """Write rows of images with their labels to the left, captions below and column names on top as a PNG."""
    n = len(rows[0].images)
    figure = Figure(figsize=(1.15 * n + 1.5, 1.32 * len(rows) + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), n, squeeze=False)
    for i, row in enumerate(rows):
        for j in range(n):
            _show(axes[i][j], row.images[j])
            if row.captions:
                axes[i][j].set_xlabel(row.captions[j], fontsize=8, labelpad=2)
            if i == 0 and columns:
                axes[i][j].set_title(columns[j], fontsize=8)
        axes[i][0].set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize=9)
    _save(figure, path)


def draw_grid(path: str | Path, images: Tensor, captions: Sequence[str]) -> None:
    """Write images (n, C, H, W) as a captioned, roughly square grid, as a PNG."""
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.6 * columns + 0.2, 1.8 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for i, axis in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        if i < len(images):
            _show(axis, images[i])
            axis.set_xlabel(captions[i], fontsize=8, labelpad=2)
        else:
            axis.set_axis_off()
    _save(figure, path)


@dataclass(frozen=True)
class Curve:
    """pairs/s by patch size, drawn as befits its kind: "ours", "alternative" or "ceiling"."""

    label: str
    rates: Mapping[int, float]
    kind: str


_STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linewidth": 2.5, "markersize": 6, "zorder": 3},
    "alternative": {"linewidth": 1.0, "markersize": 4, "linestyle": "--", "zorder": 2},
    "ceiling": {"linewidth": 1.0, "color": "0.6", "zorder": 1},
}
_OWN: dict[str, list[dict[str, Any]]] = {
    "ours": [{"color": f"C{i}", "marker": marker} for i, marker in enumerate("os^")],
    "alternative": [{"color": f"C{i + 3}", "marker": marker} for i, marker in enumerate("DvPX")],
    "ceiling": [{"linestyle": "-"}, {"linestyle": ":"}],
}


def draw_rates(path: str | Path, curves: Sequence[Curve], title: str) -> None:
    """Write pairs/s against patch size, on a logarithmic axis, as a PNG."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    drawn = dict.fromkeys(_STYLES, 0)
    for curve in curves:
        own = _OWN[curve.kind][drawn[curve.kind]]
        drawn[curve.kind] += 1
        axis.plot(list(curve.rates), list(curve.rates.values()), label=curve.label, **_STYLES[curve.kind], **own)
    axis.set_yscale("log")
    axis.set_xticks(sorted({k for curve in curves for k in curve.rates}))
    axis.set_xlabel("patch size k")
    axis.set_ylabel("pairs/s")
    axis.set_title(title, fontsize=10)
    axis.grid(which="major", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def _show(axis, image: Tensor) -> None:  # type: ignore[no-untyped-def]
    """An image (C, H, W) in [-1, 1]; what lies beyond is clipped."""
    pixels = ((image.detach().float() + 1) / 2).clamp(0, 1)
    if len(pixels) in (3, 4):
        axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(pixels.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
