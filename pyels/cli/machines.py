"""The options that say machines and their engines, and what machines are told at every step."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from pyels import datasets, presets
from pyels.bank import PatchBank
from pyels.cli.options import AnyPath, Settings, flag, in_words, option, values_of
from pyels.definition import Gaussian
from pyels.denoiser import Denoiser
from pyels.engines import NAMES, find_engine
from pyels.engines.cuda import PRECISIONS
from pyels.engines.sampled import TOLERANCE
from pyels.files import path_of
from pyels.machines import ELS, MACHINES
from pyels.records import read_record
from pyels.schedules import SCHEDULES
from pyels.studies.calibration import TRIED

# Names of machines: with windows whose size a call may say, with a parameter, without, with a boundary, a choice of
# windows, a choice of what answers, and an engine.
_TAKES = {name: inspect.signature(make).parameters for name, make in MACHINES.items()}
LOCAL = [name for name in reversed(MACHINES) if "patch_size" in _TAKES[name]]
CALIBRATED = [*LOCAL, *(name for name in MACHINES if "threshold" in _TAKES[name])]
OTHERS = [name for name in MACHINES if name not in CALIBRATED]
BOUNDED = [name for name in MACHINES if "boundary" in _TAKES[name]]
WINDOWED = [name for name in LOCAL if "window" in _TAKES[name]]
FOLDED = [name for name in LOCAL if "fold" in _TAKES[name]]
COMPILED = [name for name in MACHINES if "engine" in _TAKES[name]]
BOUNDARIES = ELS.boundaries
GAUSSIAN = "gaussian"
WINDOWS = ("square", GAUSSIAN)
FOLD = "fold"
SPECS = (
    *MACHINES,
    *(f"{name}:{boundary}" for name in BOUNDED for boundary in BOUNDARIES),
    *(f"{name}:{GAUSSIAN}" for name in WINDOWED),
    *(f"{name}:{FOLD}" for name in FOLDED),
)
_OF_SPECS = {GAUSSIAN: {"window": GAUSSIAN}, FOLD: {"fold": "uniform"}}
DEFAULT_STEPS = 20
_SCALES = {"schedule": str, "parameter?": tuple(TRIED)}
_EXACT = "--tolerance and --index are for --machine els with --engine sampled; the rest is exact"


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Settings):
    """The engine; in the groups derived from it, what it may be told."""

    engine: str = option("auto", type=click.Choice(NAMES))

    def machine_of(
        self,
        name: str,
        bank: PatchBank,
        threads: int | None,
        boundary: str | None = None,
        otherwise: str = "zeros",
        window: str | None = None,
        fold: str | None = None,
        beside: Sequence[str] = (),
    ) -> Denoiser:
        """The machine of a name; where it has a boundary, with the one asked for, or otherwise that of the command.
        Options that are not for it may be for those of the names `beside`."""
        if boundary is not None and name not in BOUNDED:
            raise ValueError(f"--boundary {boundary} was given, but only {in_words(BOUNDED)} have one")
        if window is not None and name not in WINDOWED:
            raise ValueError(f"--window {window} was given, but only {in_words(WINDOWED)} have a choice")
        self.check_engine(name, *beside)
        own: dict[str, Any] = {"boundary": boundary or otherwise} if name in BOUNDED else {}
        if window == GAUSSIAN:
            own["window"] = Gaussian(1.0)  # until a step says another width
        if fold is not None:
            own["fold"] = fold
        if name in COMPILED:
            own |= {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["elsewhere"]}
            own |= {"engine": self.engine, "threads": threads}
        return MACHINES[name](bank, **own)

    def machines_of(
        self, names: str, bank: PatchBank, threads: int | None, otherwise: str = "zeros"
    ) -> dict[str, Denoiser]:
        """The machines of an option --machines, by the names given there, some with a boundary, window or fold."""
        machines: dict[str, Denoiser] = {}
        specs = list(dict.fromkeys(part.strip().lower() for part in names.split(",")))
        all_names = [spec.partition(":")[0] for spec in specs]
        for spec in specs:
            if spec not in SPECS:
                raise ValueError(f"--machines must be of {', '.join(SPECS)}, got {spec!r}")
            name, _, said = spec.partition(":")
            of_it: dict[str, Any] = {} if not said else _OF_SPECS.get(said, {"boundary": said})
            machines[spec] = self.machine_of(name, bank, threads, otherwise=otherwise, beside=all_names, **of_it)
        return machines

    def check_engine(self, *names: str) -> None:
        """Raise ValueError where an option was given that does nothing for any of these machines, or that the engine
        lacks."""
        taken = not set(names).isdisjoint(BOUNDED)
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata["elsewhere"] and value != one.default and not (taken and self._has(one.name)):
                raise ValueError(one.metadata["elsewhere"].format(value))

    def _has(self, name: str) -> bool:
        return self.engine != "auto" and name in (one.name for one in fields(find_engine(self.engine)))


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(EngineOptions):
    precision: str = option(
        PRECISIONS[0],
        "Of ELS with engine cuda: high may use tensor cores for small windows.",
        type=click.Choice(PRECISIONS),
        elsewhere="--precision {} is for ELS with --engine cuda",
    )


@dataclass(frozen=True, kw_only=True)
class SampledOptions(EngineOptions):
    tolerance: float | None = option(
        None,
        "Of engine sampled: how far a pixel's mean may be from the exact one, half a 95% interval.  "
        f"[default: {TOLERANCE}]",
        elsewhere=_EXACT,
    )
    index: Path | None = option(
        None,
        "Of engine sampled: the folder of its indexes, built when first needed.  [default: beside the file of the "
        "data set, or in the user's cache]",
        type=AnyPath(file_okay=False),
        elsewhere=_EXACT,
    )


@dataclass(frozen=True, kw_only=True)
class StepsOptions(EngineOptions):
    """What machines are told at each step of a schedule."""

    patch_sizes: tuple[str, ...] = option(
        (),
        f"Of {in_words(LOCAL)}: one size a step, cleanest first, as 3,3,5,..; a scales.json of pyels calibrate; or a "
        "preset's name. Once more for machines with another parameter: their scales.json, or threshold=.05,.02,..; one "
        "number is for all steps.",
        type=str,
        also="--scales",
    )
    patch_size: int | None = option(None, "One size for all steps, instead.", recorded=False)
    schedule: str = option("cosine", type=click.Choice(SCHEDULES))

    def told(self, machines: Mapping[str, Denoiser], steps: int | None) -> tuple[dict[str, list[Any]], int]:
        """By parameter, what machines are told at every step, and how many steps these are."""
        if not any(machine.parameter for machine in machines.values()):
            refuse_sizes(patch_size=self.patch_size, patch_sizes=self.patch_sizes)
        if self.patch_size is not None and self.patch_sizes:
            raise ValueError("give either --patch-size or --patch-sizes, not both")
        texts = self.patch_sizes if self.patch_size is None else [f"patch_size={self.patch_size}"]
        told, count = told_at_steps(texts, steps, self.schedule)
        check_told(told, machines)
        return told, count


@dataclass(frozen=True, kw_only=True)
class MachinesOptions(StepsOptions):
    """Several machines."""

    machines: str = option(
        "els,ls,is",
        f"Of {', '.join(MACHINES)}; {in_words(SPECS[len(MACHINES) :])} name the boundary, the window, or the "
        "fold (all windows over a pixel answer, as their mean); "
        f"{in_words(BOUNDED)} take the boundary of the network's padding (zeros where it is not known).",
    )


def record_of_engine(bank: PatchBank, *machines: Denoiser) -> dict[str, Any]:
    """What the bits of a result depend on, beside its inputs."""
    settings = {name: value for machine in machines for name, value in machine.settings().items()}
    return settings if bank.memory_limit is None else {**settings, "memory_limit": bank.memory_limit}


# ---- Patch sizes, and other values for each step -------------------------------------------------------------------


def refuse_sizes(**given: Any) -> None:
    """Raise ValueError where sizes were given for machines that have none, nor anything else that steps may say."""
    if names := [flag(name) for name, value in given.items() if value not in (None, ())]:
        raise ValueError(f"machines {in_words(OTHERS)} have no size to be said: leave out {in_words(names)}")


def told_at_steps(
    texts: Sequence[str], steps: int | None, schedule: str, otherwise: str = "patch_size"
) -> tuple[dict[str, list[Any]], int]:
    """By parameter, values for every step along `schedule`, and the number of steps.

    Each text is numbers, which are of the parameter `otherwise`; PARAMETER=NUMBERS, where one is for all steps; a
    scales.json of `pyels calibrate`, or its folder; or a preset's name (20 steps where none are given).
    """
    told = {}
    for text in texts:  # of one parameter the last counts, as of any option
        name, values = _told(text, steps, schedule, otherwise)
        told[name] = values, text.startswith(f"{name}=") and len(values) == 1
    steps = steps or max((len(values) for values, of_all in told.values() if not of_all), default=DEFAULT_STEPS)
    for values, of_all in told.values():
        if len(values) != steps and not of_all:
            raise ValueError(f"--patch-sizes has {len(values)} entries for {steps} steps; give one for each")
    return {name: values * steps if of_all else values for name, (values, of_all) in told.items()}, steps


def _told(text: str, steps: int | None, schedule: str, otherwise: str) -> tuple[str, list[Any]]:
    path = path_of(text) if text else Path()
    name, _, values = text.partition("=")
    if name in TRIED and values:
        return name, values_of("patch_sizes", values, name)
    if text.endswith((".json", ".pt", ".pth")):
        return told_in_file(path, schedule)
    if re.search(r"^[-+\d]|^\.\d|,", text):  # before it is looked up as a folder: many numbers are too long for a name
        return otherwise, values_of("patch_sizes", text, otherwise)
    if text and (path / "scales.json").is_file():
        return told_in_file(path / "scales.json", schedule)
    return "patch_size", presets.patch_sizes(text, DEFAULT_STEPS if steps is None else steps)


def told_in_file(path: Path, schedule: str) -> tuple[str, list[Any]]:
    """The parameter of a scales.json, which must have been calibrated along `schedule`, and its best values."""
    if path.suffix != ".json":
        raise ValueError(
            f"{path}: a pickle may run anything when it is read; the sizes that the paper released are presets "
            f"({', '.join(presets.PATCH_SIZES)}), others are given as numbers: 3,3,5,.."
        )
    what = "a scales.json of pyels calibrate"
    scales = read_record(path, _SCALES, what)
    parameter = scales.get("parameter", "patch_size")
    if scales["schedule"] != schedule:
        raise ValueError(f"{path} was calibrated along schedule {scales['schedule']}, but --schedule is {schedule}")
    if parameter == "patch_size":
        return parameter, read_record(path, {"patch_sizes": [range(1, 1 << 16)]}, what)["patch_sizes"]
    return parameter, read_record(path, {"values": [float]}, what)["values"]


def default_preset(dataset: str, boundary: str | None) -> str:
    base = "fashion-mnist" if dataset == datasets.EMBEDDED else dataset
    padding = "zeros" if boundary in (None, "zeros") else "circular"
    for name in (f"{base}-resnet-{padding}", f"{base}-resnet-zeros"):
        if name in presets.PATCH_SIZES:
            return name
    raise ValueError(
        f"--patch-size or --patch-sizes is needed for data set {dataset}: give numbers, a scales.json of pyels "
        f"calibrate, or one of {', '.join(presets.PATCH_SIZES)}"
    )


def arguments_of(told: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """As `pyels.sample` takes them, and run.json has them."""
    others = {name: values for name, values in told.items() if name != "patch_size"}
    return {"patch_sizes": told.get("patch_size"), **({"per_step": others} if others else {})}


def check_told(told: Mapping[str, Sequence[Any]], machines: Mapping[str, Denoiser]) -> None:
    """Fail on bad values, on those that are of no machine, and where one needs some, before anything is written."""
    for name, values in told.items():
        own = [machine for machine in machines.values() if machine.parameter == name]
        if not own:
            takes = in_words(
                f"{one} takes a {machine.parameter}" for one, machine in machines.items() if machine.parameter
            )
            raise ValueError(f"--patch-sizes has a {name} for each step, but {takes}")
        for machine in own:
            for value in values:
                machine.check_wish(name, value)
    for name in ("patch_size", "width"):  # of which machines of the command line have none of their own
        if name not in told and any(machine.parameter == name for machine in machines.values()):
            raise ValueError(
                f"--patch-sizes is needed, a {name} for each step: pyels calibrate finds them for a network; or give "
                f"numbers, or of patch sizes one of {', '.join(presets.PATCH_SIZES)}"
            )
