"""`pyels check`: whether a network denoises, and what may be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyels.cli.options import command
from pyels.cli.settings import JsonOptions, NetworkOptions, ThreadOptions
from pyels.studies.check import check

_COLUMNS = ("sigma_over_alpha", "network", "x_over_alpha", "mean_image", "wiener")


@dataclass(frozen=True, kw_only=True)
class Check(NetworkOptions, ThreadOptions, JsonOptions):
    """Options of the command."""


@command(Check)
def check_command(given: Check) -> None:
    """Say whether a network denoises, before it is compared.

    Prints the mean squared error of its estimates on real images at several noise levels, beside what needs no network
    (the noisy image over alpha, the mean image, Wiener's filter), the range of samples that it draws, whether it
    answers alike at every call, and, where its prediction, schedule, time or pixel range seem to be other ones than it
    says, which.
    """
    given.tell_torch()
    denoiser, bank, _, of_both = given.load()
    classes = bank.classes if getattr(denoiser, "conditional", False) and bank.labels is not None else None
    checked = check(denoiser, bank, classes)
    given.show(
        {"command": "check", **of_both, **checked},
        _in_words(checked, "pixels in [-1, 1]" if bank.latents is None else "of latents"),
    )


def _in_words(checked: dict[str, Any], of: str) -> list[str]:
    lines = [f"mean squared error on images of the data set, {of}:"]
    lines.append(" ".join(f"{name:>16}" for name in _COLUMNS))
    for row in checked["levels"]:
        lines.append(" ".join(f"{'not reached' if row[n] is None else format(row[n], '.4g'):>16}" for n in _COLUMNS))
    lines.append(f"{checked['ratio']:.3g} times the error of Wiener's filter, in geometric mean over the levels")
    if checked["range"] is not None:
        low, high = checked["range"]
        lines.append(f"samples reach from {low:.3g} to {high:.3g}")
    lines += [f"doubtful: {doubt}" for doubt in checked["doubts"]]
    return lines if checked["doubts"] else [*lines, "nothing seems wrong"]
