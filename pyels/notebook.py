"""What notebooks show of banks, posteriors and traces in place of their names."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import torch
from torch import Tensor

from pyels.bank import PatchBank
from pyels.posterior import Posterior
from pyels.provenance import Trace
from pyels.studies import plots

_MOST = 10  # images side by side


def png_of_bank(bank: PatchBank) -> bytes:
    """The first images, of each of the first classes where there are labels."""
    if bank.labels is None:
        numbers = torch.arange(min(3 * _MOST, len(bank)))
        columns = min(_MOST, len(numbers))
        lines = numbers[: len(numbers) // columns * columns].reshape(-1, columns)
        return _png([plots.Row("", bank.read(line)) for line in lines], repr(bank))
    of_classes = {int(label): (bank.labels == label).nonzero()[:_MOST, 0] for label in bank.classes[:_MOST]}
    columns = min(map(len, of_classes.values()))
    rows = [plots.Row(bank.name_of(label), bank.read(found[:columns])) for label, found in of_classes.items()]
    left_out = len(bank.classes) - len(rows)
    return _png(rows, repr(bank) + f", of which {left_out} are not shown" * (left_out > 0))


def png_of_posterior(posterior: Posterior) -> bytes:
    """Of each of the first queries the mean, whose patches are the heaviest, and maps of the rest."""
    some = slice(0, _MOST)
    mean = posterior.mean[some].float().cpu()
    owners = zip(mean, posterior.source[some, ..., 0].cpu(), strict=True)
    rows = [
        plots.Row("mean", mean),
        plots.Row("image of the\nheaviest patch", torch.stack([plots.mosaic(*one) for one in owners])),
        _map("its weight", posterior.source_weight[some]),
        _map("entropy, nats", posterior.entropy[some]),
        _map("log-evidence, nats", posterior.log_evidence[some]),
    ]
    if not posterior.certified.all():
        rows.append(_map("error of\nthe mean", posterior.error[some]))
    left_out = len(posterior.mean) - len(mean)
    return _png(rows, repr(posterior) + f", of which {left_out} are not shown" * (left_out > 0))


def png_of_trace(trace: Trace) -> bytes:
    """Of the first sample its way from noise, some of the steps where there are many."""
    steps = sorted({round(i) for i in torch.linspace(0, len(trace) - 1, min(_MOST, len(trace))).tolist()})
    rows = [plots.Row("noisy image", (trace.x / trace.alpha.hypot(trace.sigma).float().view(-1, 1, 1, 1, 1))[steps, 0])]
    if trace.network_x0 is not None:
        rows.append(plots.Row("network", trace.network_x0[steps, 0]))
    rows += [plots.Row("machine", trace.x0[steps, 0]), _map("entropy, nats", trace.entropy[steps, 0])]
    return _png(rows, repr(trace), [f"t = {t:.3g}" for t in trace.t[steps].tolist()])


def _map(name: str, values: Tensor) -> plots.Row:
    """Values (n, H, W) in colours, dark to bright; which are their least and most the label says."""
    values = values.double().cpu()
    known = values[values.isfinite()]
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    shade = ((values - least) / ((most - least) or 1.0)).nan_to_num(0.0).clamp(0, 1)
    colours = torch.from_numpy(matplotlib.colormaps["viridis"](shade.numpy())[..., :3])
    return plots.Row(f"{name}\n{least:.3g} to {most:.3g}", colours.movedim(-1, 1) * 2 - 1)


def _png(rows: Sequence[plots.Row], title: str, columns: Sequence[str] | None = None) -> bytes:
    file = io.BytesIO()
    plots.draw_rows(file, rows, columns, title)
    return file.getvalue()
