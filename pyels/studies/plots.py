"""Pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pyels.bank import PatchBank
from pyels.files import replacing
from pyels.provenance import Attribution, Trace
from pyels.schedules import Schedule
from pyels.studies.calibration import Calibration
from pyels.studies.rules import Scores


@dataclass(frozen=True)
class Row:
    """A labelled row of images (n, C, H, W), with a caption under each where there is one."""

    label: str
    images: Tensor
    captions: Sequence[str] | None = None


def title_of(run: Mapping[str, Any]) -> str:
    """What a picture is of, as run.json says it: the network or machine, the data, the seeds."""
    data, network, seeds = run.get("data", run), run.get("network"), run.get("seeds")
    if network is not None:
        who = network if isinstance(network, str) else "/".join(Path(str(network["source"])).parts[-2:])
    else:
        who = " ".join(str(run[key]) for key in ("machine", "boundary") if run.get(key))
    parts = [who] * bool(who) + [f"{Path(data['dataset']).name} ({data['bank']['images']} images)"]
    if seeds is None and "num" in run:
        seeds = [run["seed"], run["seed"] + run["num"] - 1]
    if seeds:
        parts.append(f"seed {seeds[0]}" if seeds[0] == seeds[-1] else f"seeds {seeds[0]} to {seeds[-1]}")
    return ", ".join(parts)


def draw_rows(
    path: str | Path | BytesIO, rows: Sequence[Row], columns: Sequence[str] | None = None, title: str = ""
) -> None:
    """Write rows of images with their labels to the left, captions below and column names on top as a PNG."""
    n = len(rows[0].images)
    figure = Figure(figsize=(max(1.15 * n + 1.5, 4), 1.32 * len(rows) + 0.3), dpi=150, layout="constrained")
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
    _save(figure, path, title)


def draw_grid(path: str | Path, images: Tensor, captions: Sequence[str], title: str = "") -> None:
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
    _save(figure, path, title)


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
    figure, axis = _figure((9, 5))
    drawn = dict.fromkeys(_STYLES, 0)
    for curve in curves:
        own = _OWN[curve.kind][drawn[curve.kind]]
        drawn[curve.kind] += 1
        axis.plot(list(curve.rates), list(curve.rates.values()), label=curve.label, **_STYLES[curve.kind], **own)
    axis.set_yscale("log")
    axis.set_xticks(sorted({k for curve in curves for k in curve.rates}))
    axis.set_xlabel("patch size k")
    axis.set_ylabel("pairs/s")
    _plain(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path, title)


def draw_losses(path: str | Path, losses: Sequence[float], steps: int, predicts: str, title: str = "") -> None:
    """Write the loss against the step, on logarithmic axes, as a PNG."""
    figure, axis = _figure((6, 4))
    axis.plot([steps * (i + 1) / len(losses) for i in range(len(losses))], list(losses))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(f"mean squared error of {predicts}")
    _plain(axis)
    _save(figure, path, title)


def draw_calibration(
    path: str | Path,
    found: Calibration | Scores,
    schedule: Schedule,
    title: str = "",
    beside: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write the best patch sizes, or other values, at every step, and how far all others are from them, as a PNG (the
    paper's figure 4b); `beside` are others, by what they are, to be seen with the best ones."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    times, sizes, name = found.times, found.sizes, found.parameter.replace("_", " ")
    for (label, values), style in zip(found.series.items(), ("o-", "s:"), strict=False):
        drawn = {"drawstyle": "steps-mid"} if style == "o-" else {"markersize": 4}
        left.plot(times, values, style, label=label, **drawn)
    for (label, others), marker in zip((beside or {}).items(), cycle("^Dv<>P"), strict=False):
        left.plot(times, others, marker, linestyle="--", linewidth=0.8, markersize=4, label=label)
    left.set_ylabel(f"{name} that is best")
    below_it = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)} if beside else {}  # names may be long
    left.legend(frameon=False, fontsize=9, **below_it)
    # The best size of each step is 0, so that steps with very different agreement can stand side by side.
    what, below = found.lost
    shown = below.clamp(min=1e-6).T.numpy()
    mesh = right.pcolormesh(times, sizes, shown, norm=LogNorm(), cmap="viridis_r", shading="nearest")
    right.plot(times, found.best, "wo", markersize=4, markeredgecolor="k")
    right.set_ylabel(name)
    figure.colorbar(mesh, ax=right, label=what)
    for axis in (left, right):
        if found.parameter in ("threshold", "width"):
            axis.set_yscale("log")
        axis.set_yticks(sizes, [f"{size:g}" for size in sizes])
        axis.set_yticks([], minor=True)
        axis.set_xlabel("t (noisiest right)")
        ticks = times[:: max(1, len(times) // 5)]
        levels = axis.secondary_xaxis("top")
        levels.set_xticks(ticks, [_level(schedule, t) for t in ticks], fontsize=8)
        levels.set_xlabel("sigma / alpha", fontsize=9)
    _plain(left)
    _save(figure, path, title)


def draw_receptive_field(
    path: str | Path,
    gradient: Tensor,
    times: Sequence[float],
    patch_sizes: Sequence[int] | None,
    schedule: Schedule,
    title: str = "",
) -> None:
    """Write the centre pixel's average gradient (steps, H, W) at each step as a PNG (the paper's figure 4a).

    The scale is logarithmic; the calibrated square is outlined, where that is what was calibrated.
    """
    columns = min(len(times), 10)
    lines = math.ceil(len(times) / columns)
    figure = Figure(figsize=(1.35 * columns + 1, 1.6 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    _, height, width = gradient.shape
    norm = LogNorm(1e-4, 1)
    for i, axis in enumerate(axes.flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if i >= len(times):
            axis.set_axis_off()
            continue
        # Relative to the largest beside the centre itself: there, eps and x0 differ by a factor, which drops out.
        beside = gradient[i].clone()
        beside[height // 2, width // 2] = 0
        field = (gradient[i] / beside.max().clamp(min=1e-30)).clamp(max=1)
        axis.imshow(field.clamp(min=1e-4).numpy(), norm=norm, cmap="magma", interpolation="nearest")
        name = f"t = {times[i]:.2f}"
        if patch_sizes is not None:
            k = patch_sizes[i]
            corner = (width // 2 - k / 2, height // 2 - k / 2)
            axis.add_patch(Rectangle(corner, k, k, fill=False, edgecolor="cyan", linewidth=1.2))
            name += f", k = {k}"
        axis.set_title(f"{name}\nsigma / alpha = {_level(schedule, times[i])}", fontsize=7)
    figure.colorbar(ScalarMappable(norm, "magma"), ax=axes, label="relative gradient", shrink=0.9)
    _save(figure, path, title)


def draw_evaluation(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Write each denoiser's error over Wiener's, with its interval, against noise level as a PNG; `rows` as of
    `evaluation.report`."""
    figure, axis = _figure((7.5, 4.5))
    axis.axhline(1, color="0.6", linewidth=1)
    for name in rows[0]["ratio"]:
        reached = [row for row in rows if row["ratio"][name] is not None]
        times, ratios = [row["t"] for row in reached], [row["ratio"][name] for row in reached]
        (line,) = axis.plot(times, ratios, marker="o", markersize=3, label=name.upper())
        low, high = zip(*(row["interval_95"][name] for row in reached), strict=True) if reached else ((), ())
        axis.fill_between(times, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_yscale("log")
    axis.set_xticks([row["t"] for row in rows])
    axis.set_xticklabels([f"{row['sigma'] / row['alpha']:.2g}" if row["alpha"] > 0 else "∞" for row in rows])
    axis.set_xlabel("noise level, sigma / alpha")
    axis.set_ylabel("squared error on held-out images, over Wiener's")
    _plain(axis)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path, title)


def draw_scatter(
    path: str | Path, machines: Mapping[str, Sequence[float]], ideal: Sequence[float], title: str = ""
) -> None:
    """Write each seed's correlation of ELS with the network against that of IS as a PNG (the paper's figure 10)."""
    figure, axis = _figure((5.2, 5))
    low = min(0.0, *ideal, *(min(values) for values in machines.values()))
    axis.plot([low, 1], [low, 1], color="0.6", linewidth=1)
    for name, values in machines.items():
        axis.plot(list(ideal), list(values), "o", markersize=4, alpha=0.7, label=name.upper())
    axis.set_xlabel("Pearson r of IS with the network")
    axis.set_ylabel("Pearson r of the machine with the network")
    axis.set_aspect("equal")
    axis.legend(frameon=False)
    _plain(axis)
    _save(figure, path, title)


def draw_matrix(path: str | Path, matrix: Mapping[str, Any], title: str = "") -> None:
    """Write how alike the pictures of all are to those of all as a PNG; `matrix` as of `comparison.report`."""
    names, medians = [name.upper() for name in matrix["names"]], matrix["median"]
    figure, axis = _figure((1.5 + 0.7 * len(names), 1.2 + 0.6 * len(names)))
    axis.imshow(medians, cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(medians):
        for j, r in enumerate(row):
            axis.text(j, i, f"{r:.2f}", ha="center", va="center", fontsize=8, color="black" if r > 0.6 else "white")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.spines[:].set_visible(False)
    _save(figure, path, title)


def draw_steps(path: str | Path, per_step: Mapping[str, Any], title: str = "") -> None:
    """Write how near the machines' estimates are to the network's at every step, with 95% intervals, as a PNG;
    `per_step` as of `comparison.report`."""
    measures = list(next(iter(next(iter(per_step.values())).values())))
    figure = Figure(figsize=(4 * len(measures), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for i, (name, ways) in enumerate(per_step.items()):
            for way, style in zip(ways, ("-", ":"), strict=True):
                median, (low, high) = ways[way][measure]["median"], zip(*ways[way][measure]["interval_95"], strict=True)
                times = [(step + 1) / len(median) for step in range(len(median))]
                axis.plot(times, median, style, color=f"C{i}", label=f"{name.upper()}, {way}")
                axis.fill_between(times, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        if measure == "mse":
            axis.set_yscale("log")
        else:
            axis.set_ylim(max(-1.0, axis.get_ylim()[0]), 1.02)
        axis.set_xlabel("time t, noise at 1")
        axis.set_ylabel(f"{measure} of the estimates of x0")
        _plain(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path, title)


def draw_explained(path: str | Path, trace: Trace, owed: Attribution, bank: PatchBank, title: str = "") -> None:
    """Write what the first sample of a trace is, whose patches its pixels are, how sure the machine is and how far from
    the network, and the images that it owes most to, as a PNG."""
    pictures, x0 = [("sample", trace.sample[0])], trace.x0[-1, 0]
    if trace.network_x0 is not None:
        pictures = [("network", trace.sample[0]), ("machine", x0)]
    count = max(len(owed.image[0]), 5)
    figure = Figure(figsize=(1.25 * count, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.9, 1))[:, 0]
    maps: list[tuple[str, Tensor]] = [("entropy, nats", (owed.steps[:, 0, None, None] * trace.entropy[:, 0]).sum(0))]
    if trace.network_x0 is not None:
        off = (trace.network_x0 - trace.x0)[:, 0].square().mean(1).sqrt()
        maps.append(("network and machine apart, rms", (owed.steps[:, 0, None, None] * off).sum(0)))
    axes = iter(above.subplots(1, len(pictures) + 1 + len(maps)))
    for name, picture in pictures:
        axis = next(axes)
        _show(axis, picture)
        axis.set_title(name, fontsize=9)
    axis = next(axes)
    _show(axis, mosaic(x0, owed.pixel_image[0]))
    axis.set_title("a colour for each image", fontsize=9)
    for name, values in maps:
        axis = next(axes)
        shown = axis.imshow(values.numpy(), cmap="viridis", interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name, fontsize=9)
        above.colorbar(shown, ax=axis, shrink=0.55).ax.tick_params(labelsize=7)
    of_images = below.subplots(1, count, squeeze=False)[0]
    for axis in of_images:
        axis.set_axis_off()
    for axis, number, share in zip(of_images, owed.image[0].tolist(), owed.share[0].tolist(), strict=False):
        axis.set_axis_on()
        _show(axis, bank.read(slice(number, number + 1))[0])
        axis.set_xlabel(f"{number}\n{share:.2%}", fontsize=8, labelpad=2)
    below.suptitle("owed most to", fontsize=9)
    _save(figure, path, title)


def mosaic(image: Tensor, owners: Tensor) -> Tensor:
    """An image (C, H, W) as bright as it is, in a colour for each of the owners (H, W) of its pixels."""
    bright = ((image.mean(0) + 1) / 2).clamp(0, 1) * 0.75 + 0.25
    hues = (owners * 0.61803398875 % 1).numpy()  # of neighbouring numbers far from each other
    colours = hsv_to_rgb(np.stack([hues, np.full_like(hues, 0.65), bright.numpy()], axis=-1))
    return torch.from_numpy(colours).movedim(-1, 0) * 2 - 1


def draw_pairs(
    path: str | Path, above: Tensor, below: Tensor, captions: Sequence[str], labels: tuple[str, str], title: str = ""
) -> None:
    """Write pairs of images (n, C, H, W), one above the other, ten pairs a line, as a PNG."""
    n = len(above)
    columns = min(n, 10)
    lines = math.ceil(n / columns)
    figure = Figure(figsize=(1.3 * columns + 0.9, 2.9 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for i in range(lines * columns):
        line, column = divmod(i, columns)
        upper, lower = axes[2 * line][column], axes[2 * line + 1][column]
        if i >= n:
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        _show(upper, above[i])
        _show(lower, below[i])
        lower.set_xlabel(captions[i], fontsize=7, labelpad=2)
        if column == 0:
            for axis, label in ((upper, labels[0]), (lower, labels[1])):
                axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    _save(figure, path, title)


_KINDS = {  # in colours that everyone tells apart
    "exact": {"color": "black", "marker": "o"},
    "sampled": {"color": "#0072b2", "marker": "s"},
    "subset": {"color": "#d55e00", "marker": "^"},
    "top": {"color": "#009e73", "marker": "D"},
}
_VALUES = {"sampled": "sampled, by tolerance", "subset": "subset, by share", "top": "top, by number of windows"}


def draw_costs(path: str | Path, report: Mapping[str, Any], title: str) -> None:
    """Write seconds per sample against the size of the bank, from a report of `pyels.scaling`, as a PNG.

    Lines are the fitted powers of the size, those of the real images where there are enough, over the sizes that they
    were fitted to. Bars go from the least to the most of the seeds.
    """
    figure, axis = _figure((9, 5))
    drawn = dict.fromkeys(_KINDS, 0)
    for method, records in _by(report["records"], "method").items():
        kind = method.split()[0]
        look = {**_KINDS[kind], "fillstyle": ("full", "none", "left", "right")[drawn[kind] % 4]}
        drawn[kind] += 1
        label, fits = method, report["exponents"][method]
        if fits:
            power = fits.get("real", fits.get("all"))
            label += f": N^({power['exponent']:.2f} ± {power['standard_error']:.2f})"
            ends = power["images"][0], power["images"][-1]
            curve = [power["factor"] * n ** power["exponent"] for n in ends]
            axis.plot(ends, curve, color=look["color"], linewidth=1, zorder=1)
        images = [record["images"] for record in records]
        seconds, bars = _with_range(records, "seconds_per_sample")
        axis.errorbar(images, seconds, bars, label=label, linestyle="", capsize=2, markersize=6, **look)
    axis.set_xscale("log")
    axis.set_yscale("log")
    synthetic = [record["images"] for record in report["records"] if record["synthetic"]]
    if synthetic:
        real = [record["images"] - record["synthetic"] for record in report["records"]]
        axis.axvline(max(real), color="0.4", linestyle=":", linewidth=1.5)
        place = axis.get_xaxis_transform()
        axis.text(max(real), 1.01, "synthetic images added →", transform=place, fontsize=8, color="0.4")
    ticks = list(_by(report["records"], "images"))
    axis.set_xticks(ticks, [f"{images:,}" for images in ticks], rotation=30)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("images in the bank, N")
    axis.set_ylabel("seconds per sample")
    _plain(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path, title)


def draw_errors(path: str | Path, report: Mapping[str, Any], title: str) -> None:
    """Write error against seconds per sample, one picture for each size of the bank, from a report of `pyels.scaling`,
    as a PNG.

    The error is the root mean square over the image at the step at which it is largest. The cheapest and dearest
    point of a method bear its value; bars go from the least to the most of the seeds.
    """
    by_size = _by(report["records"], "images")
    columns = min(len(by_size), 4)
    lines = math.ceil(len(by_size) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.7 * lines + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    labelled: dict[str, Any] = {}
    for axis, (images, of_size) in zip(axes.flat, by_size.items(), strict=False):
        for method, records in _by(of_size, "method").items():
            if method == "exact":
                seconds = records[0]["seconds_per_sample"]["median"]
                labelled["exact, without error"] = axis.axvline(seconds, color="black", linestyle="--", linewidth=1)
        for kind in list(_KINDS)[1:]:
            records = [record for record in of_size if record["method"].split()[0] == kind]
            if records:
                seconds, across = _with_range(records, "seconds_per_sample")
                errors, along = _with_range(records, "worst_rms_error")
                look = {**_KINDS[kind], "linewidth": 1, "markersize": 5, "capsize": 2}
                labelled[_VALUES[kind]] = axis.errorbar(seconds, errors, along, across, **look)
                cheapest, dearest = seconds.index(min(seconds)), seconds.index(max(seconds))
                for i, offset in {dearest: (5, -9), cheapest: (5, 4)}.items():
                    value = records[i]["method"].split()[1]
                    axis.annotate(value, (seconds[i], errors[i]), offset, textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_yscale("log", nonpositive="mask")
        axis.margins(0.15)
        synthetic = of_size[0]["synthetic"]
        axis.set_title(f"N = {images:,}" + f" ({synthetic:,} synthetic)" * bool(synthetic), fontsize=9)
        axis.set_xlabel("seconds per sample")
        axis.tick_params(labelbottom=True)
        _plain(axis)
    for axis in list(axes.flat)[len(by_size) :]:
        axis.set_axis_off()
    figure.supylabel("rms error of the worst step", fontsize=10)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path, title)


def _by(records: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """The records of methods that were not left out, by one of their entries."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        if "left_out" not in record:
            groups.setdefault(record[key], []).append(record)
    return groups


def _with_range(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far below and above them the least and the most are."""
    medians = [record[key]["median"] for record in records]
    below = [record[key]["median"] - record[key]["min"] for record in records]
    return medians, [below, [record[key]["max"] - record[key]["median"] for record in records]]


def _figure(size: tuple[float, float]):  # type: ignore[no-untyped-def]
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _plain(axis) -> None:  # type: ignore[no-untyped-def]
    axis.grid(which="major", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _show(axis, image: Tensor) -> None:  # type: ignore[no-untyped-def]
    """An image (C, H, W) in [-1, 1]; what lies beyond is clipped. Of four channels the last may be no opacity."""
    pixels = ((image.detach().float() + 1) / 2).clamp(0, 1)
    if len(pixels) in (3, 4):
        axis.imshow(pixels[:3].permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(pixels.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _level(schedule: Schedule, t: float) -> str:
    alpha = schedule.alpha(t)
    return f"{schedule.sigma(t) / alpha:.2g}" if alpha > 0 else "∞"


def _save(figure: Figure, path: str | Path | BytesIO, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=min(10, 2 * figure.get_figwidth()), wrap=True)
    if isinstance(path, BytesIO):
        figure.savefig(path, format="png")
        return
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
