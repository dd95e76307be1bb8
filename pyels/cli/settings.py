"""The options that several commands share, in groups, and what they come to: a bank, a network, a machine, sizes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click
import torch

from pyels import adapters, datasets, presets
from pyels.bank import PatchBank
from pyels.bank.latents import Latents
from pyels.bank.pictures import MODES
from pyels.checks import check_device
from pyels.cli.options import AT_LEAST_1, AnyPath, Settings, check, flag, in_words, option
from pyels.cli.progress import report
from pyels.definition import Gaussian
from pyels.denoiser import Denoiser
from pyels.engines import NAMES, default_threads, find_engine
from pyels.engines.cuda import PRECISIONS
from pyels.engines.sampled import TOLERANCE
from pyels.files import path_of
from pyels.guided import Guided
from pyels.machines import ELS, MACHINES
from pyels.networks.latent import decoder_of
from pyels.records import read_record
from pyels.schedules import SCHEDULES
from pyels.studies import resumable
from pyels.studies.calibration import TRIED
from pyels.studies.check import JUDGED, limit_of
from pyels.studies.check import check as check_network

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
_MOST_JOBS = 8  # each holds its own part of a posterior, up to 130 MB
_SCALES = {"schedule": str, "parameter?": tuple(TRIED)}
_EXACT = "--tolerance and --index are for --machine els with --engine sampled; the rest is exact"


# ---- Results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JsonOptions(Settings):
    json: bool = option(False, "Print the result as JSON on standard output.")

    def show(self, result: Mapping[str, Any], lines: Iterable[str]) -> None:
        with redirect_stdout(click.get_current_context().obj):
            for line in [json.dumps(result, indent=2)] if self.json else lines:
                click.echo(line)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(JsonOptions):
    out: Path = option()

    def hold_folder(self, settings: Mapping[str, Any], *names: str) -> None:
        """Work in the output folder until the command ends, on results of these settings, in files of these names.
        Raises ValueError where they would replace others."""
        context = click.get_current_context()
        context.with_resource(resumable.result_folder(self.out, str(context.command.name)))
        resumable.check_results(self.out, settings, names)


# ---- Banks and networks --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Settings):
    """How a data set is read."""

    split: Literal["train", "test"] | None = option(None, "Of a data set that has both.  [default: train]")
    root: str | None = option(None, "Folder in which a named data set is looked for first, such as torchvision's.")
    limit: int | None = option(
        None, "Use only so many images: the first, or as many of each class where they lie class after class."
    )
    size: int | None = option(None, "Resize the images to so many pixels.")
    crop: bool = option(False, "With --size: cut out the middle instead of squeezing the images.")
    mode: str | None = option(
        None, "What pictures of several modes are brought to: grey, colour, or with transparency.", click.Choice(MODES)
    )
    skip_unreadable: bool = option(False, "Leave out pictures that cannot be read, and say how many.")

    def reading(self) -> dict[str, Any]:
        """Those that were given."""
        given = {one: getattr(self, one.name) for one in fields(ReadingOptions)}
        return {one.name: value for one, value in given.items() if value != one.default}


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ReadingOptions):
    dataset: str = option(datasets.EMBEDDED, "A name (see `pyels info`) or a path.")

    def read(self, **instead: Any) -> PatchBank:
        return datasets.load(self.dataset, **{**self.reading(), **instead})

    def record_of_data(self, bank: PatchBank) -> dict[str, Any]:
        return record_of_data(self.dataset, self.reading(), bank)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Settings):
    memory_limit: str | None = option(
        None,
        "Memory that the images may take, of each process where there are several, as 500MB or 2GB. A saved bank that "
        "takes more is read from its file again and again, a part at a time.  [default: no limit]",
    )


@dataclass(frozen=True, kw_only=True)
class UseOptions(Settings):
    """How a network is used."""

    device: str | None = option(None, "Of the network: cpu, cuda, cuda:1 ..  [default: where it was loaded]")
    clip: bool = option(
        False,
        "Keep the network's estimates in the data's range, as diffusers' schedulers do; those that say so in their "
        "clip_sample are clipped anyway.",
    )

    def use(self, source: str) -> tuple[Denoiser, dict[str, Any]]:
        """A network, and its record."""
        denoiser, record = adapters.load(source)
        if self.device is not None:
            denoiser.to(check_device(self.device))
        return denoiser, record

    def fit(self, denoiser: Denoiser, record: Mapping[str, Any], bank: PatchBank) -> dict[str, Any]:
        """Make a network one for the images of a bank, if it is; what of it belongs into the record of a run."""
        channels, size = getattr(denoiser, "channels", None), getattr(denoiser, "size", None)
        trained_on = record.get("training", {}).get("data", {}).get("bank")
        if trained_on is not None:
            check_space(Latents.of(trained_on.get("latents")), bank.latents, "the network was trained on")
            size = tuple(trained_on["shape"][1:]) if "shape" in trained_on else size
        if channels not in (None, bank.shape[0]):
            raise ValueError(f"the network takes {channels} channels, but the data set's images have {bank.shape[0]}")
        if size not in (None, bank.shape[1:]):
            at = "x".join(map(str, bank.shape[1:]))
            report(f"pyels: the network is for images of {'x'.join(map(str, size))}, the data set's have {at}: --size?")
        if self.clip and type(denoiser).denoise is not Denoiser.denoise:
            raise ValueError(
                f"--clip: {type(denoiser).__name__} has a denoise of its own; clip there, or define estimate"
            )
        if self.clip and denoiser.clip is None:
            denoiser.clip = limit_of(bank)
        said = {"device": self.device, "clip": denoiser.clip}
        return {**{key: record[key] for key in ("source", "crc32")}, **{k: v for k, v in said.items() if v is not None}}


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(Settings):
    guidance: float | None = option(
        None,
        "Classifier-free guidance of networks, trained with --label-dropout, and machines alike: 0 is no class, 1 the "
        "class, more leans further towards it.",
    )

    def guided(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.guidance is None else Guided(denoiser, self.guidance)


@dataclass(frozen=True, kw_only=True)
class BankOptions(ReadingOptions, MemoryOptions, UseOptions):
    """The bank that a network, which is used so, is held against."""

    dataset: str | None = option(
        None, "A name (see `pyels info`) or a path.  [default: what the network was trained on]"
    )

    def use_if_any(self, network: str | None) -> tuple[Denoiser | None, dict[str, Any]]:
        """As `use`, of a network that may be left out."""
        if network is not None:
            return self.use(network)
        if self.clip or self.device is not None:
            raise ValueError("--clip and --device are for --network; machines need neither")
        return None, {}

    def read_bank(self, record: Mapping[str, Any]) -> tuple[PatchBank, dict[str, Any]]:
        """The bank, by default what the network of this record was trained on, and what of it belongs into a record."""
        trained_on = record.get("training", {}).get("data")
        dataset, reading = self.dataset, self.reading()
        if dataset is None:
            if trained_on is None:
                why = f": {record['source']} does not say what it was trained on" if record else ""
                raise ValueError(f"--dataset is needed{why}")
            dataset = str(trained_on["dataset"])
            names = [one.name for one in fields(ReadingOptions) if trained_on.get(one.name) is not None]
            reading = {**{name: trained_on[name] for name in names}, **reading}
        bank = datasets.load(dataset, memory_limit=self.memory_limit, **reading)
        data = record_of_data(dataset, reading, bank)
        same = self.dataset is None and not self.reading()
        if same and trained_on.get("bank", data["bank"])["crc32"] != data["bank"]["crc32"]:
            raise ValueError(
                f"{dataset} has changed since {record['source']} was trained on it; give --dataset to use it all the "
                "same"
            )
        return bank, data


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(BankOptions):
    network: str = option(
        help="A file or folder written by pyels train, a folder written by diffusers, or FILE.py:NAME, a "
        "pyels.NetworkDenoiser or another pyels.Denoiser of your own."
    )

    def load(self) -> tuple[Denoiser, PatchBank, dict[str, Any], dict[str, Any]]:
        """The network, the bank, the record of the network, and what of both belongs into that of a run."""
        denoiser, record = self.use(self.network)
        bank, data = self.read_bank(record)
        return denoiser, bank, record, {"network": self.fit(denoiser, record, bank), "data": data}


def check_space(known: Latents | None, given: Latents | None, what: str, holds: str = "the data set holds") -> None:
    """Raise ValueError unless both are pictures, or latents of one space; `what` has to do with the first."""
    if not (given is None if known is None else known.is_space_of(given)):
        first, second = ("pictures" if one is None else str(one) for one in (known, given))
        raise ValueError(
            f"{what} {first}, but {holds} {second}: they must be of one kind (pyels encode makes latents of pictures, "
            "with --like on the scale of others)"
        )


def check_wiring(denoiser: Denoiser, bank: PatchBank) -> list[str]:
    """A quick check of a network before it is compared: its doubts, which are told too.

    Raises ValueError for a network that answers differently from call to call.
    """
    checked = check_network(denoiser, bank, levels=JUDGED, drawn=0, try_all=False)
    if not checked["repeatable"]:
        raise ValueError(f"the network cannot be compared: {checked['doubts'][0]}")
    for doubt in checked["doubts"]:
        report(f"pyels: the network may not be what it should be: {doubt} (pyels check says more)")
    doubts: list[str] = checked["doubts"]
    return doubts


def boundary_of(record: Mapping[str, Any]) -> str:
    """The boundary with which a machine sees the border as the network does, as far as its record tells."""
    return "circular" if record.get("config", {}).get("padding") == "circular" else "zeros"


def record_of_data(dataset: str, reading: Mapping[str, Any], bank: PatchBank) -> dict[str, Any]:
    """What is enough to load a bank again, and to see whether it is the same."""
    at = {"root": str(path_of(reading["root"]).resolve())} if "root" in reading else {}
    return {"dataset": where(dataset), "limit": None, "size": None, **reading, **at, "bank": describe(bank)}


def where(dataset: str) -> str:
    """A data set as any folder knows it."""
    return dataset if dataset in datasets.NAMES else str(path_of(dataset).resolve())


def describe(bank: PatchBank) -> dict[str, Any]:
    said = {} if bank.latents is None else {"latents": bank.latents.record()}
    return {"images": len(bank), "shape": list(bank.shape), "crc32": bank.fingerprint(), **said}


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Settings):
    """How pictures are made of what is drawn."""

    autoencoder: str | None = option(
        None,
        "Of a bank of latents: what decodes them, a folder or FILE.py:NAME.  [default: where it was then]",
        recorded=False,
    )

    def decoder(self, bank: PatchBank) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes pictures of images of the bank; raises ValueError or FileNotFoundError where it is not there."""
        return decoder_of(bank, self.autoencoder)


# ---- Seeds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SeedOptions(Settings):
    num: int = option(50, "Number of seeds.")
    seed: int = option(0, "First seed.")

    def __post_init__(self) -> None:
        resumable.check_seeds(self.seed, self.num)
        super().__post_init__()

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.num)]


@dataclass(frozen=True, kw_only=True)
class LabelOptions(SeedOptions):
    labels: str | None = option(
        None,
        "n classes, as 0,1,7,9, of which seed s gets number s % n. Machines then draw on the images of that class "
        "alone, also beside a network that is not class-conditional.  [default: all classes where it is, else all "
        "images]",
    )

    def classes(self, denoiser: Denoiser | None, bank: PatchBank) -> list[int] | None:
        """The class of each seed, which depends on the seed alone; None where classes play no part."""
        conditional = getattr(denoiser, "conditional", False)
        if self.labels is None and not conditional:
            return None
        if self.labels is None and bank.labels is None and getattr(denoiser, "null_label", None) is not None:
            return None
        if self.labels is None and bank.labels is None:
            raise ValueError("the network is class-conditional, but the data set has no labels")
        classes = bank.classes if self.labels is None else integers("labels", self.labels)
        for c in classes:
            bank.class_range(c)
        return [classes[seed % len(classes)] for seed in self.seeds]


def values_of(name: str, text: str, parameter: str) -> list[Any]:
    """Values of a parameter, in the text of an option."""
    if parameter == "patch_size":
        return integers(name, text)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag(name)} must be numbers separated by commas, such as .02,.05, got {text!r}") from None


def integers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
        if all(abs(number) < 1 << 63 for number in numbers):
            return numbers
        raise ValueError
    except ValueError:
        raise ValueError(f"{flag(name)} must be integers separated by commas, such as 3,3,5, got {text!r}") from None


# ---- Machines and their engines ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(Settings):
    threads: int | None = option(None, "Number of threads.  [default: all CPUs this process may use]")

    @property
    def all_threads(self) -> int:
        return default_threads() if self.threads is None else self.threads

    def tell_torch(self, jobs: int = 1) -> int:
        """The threads of each of so many jobs, which torch is told too."""
        check("threads", self.threads, AT_LEAST_1)
        each = max(1, self.all_threads // jobs)
        torch.set_num_threads(each)
        return each


@dataclass(frozen=True, kw_only=True)
class JobOptions(ThreadOptions):
    jobs: int | None = option(
        None,
        f"Seeds worked on at the same time.  [default: one a thread, up to {_MOST_JOBS}; 1 beyond --memory-limit]",
        must_be=AT_LEAST_1,
    )

    def jobs_and_threads(self, count: int, bank: PatchBank) -> tuple[int, int]:
        """The number of jobs, and the threads of each."""
        jobs = self.jobs
        if jobs is None:  # jobs on a streamed bank would wait for each other to read it
            jobs = 1 if bank.streamed else max(1, min(self.all_threads, count, _MOST_JOBS))
        return jobs, self.tell_torch(jobs)


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
    ) -> Denoiser:
        """The machine of a name; where it has a boundary, with the one asked for, or otherwise that of the command."""
        if boundary is not None and name not in BOUNDED:
            raise ValueError(f"--boundary {boundary} was given, but only {in_words(BOUNDED)} have one")
        if window is not None and name not in WINDOWED:
            raise ValueError(f"--window {window} was given, but only {in_words(WINDOWED)} have a choice")
        self.check_engine(name)
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
        """The machines of an option --machines, by the names given there, some of which name a boundary, window or fold."""
        machines = {}
        for spec in dict.fromkeys(part.strip().lower() for part in names.split(",")):
            if spec not in SPECS:
                raise ValueError(f"--machines must be of {', '.join(SPECS)}, got {spec!r}")
            name, _, said = spec.partition(":")
            of_it = {} if not said else _OF_SPECS.get(said, {"boundary": said})
            machines[spec] = self.machine_of(name, bank, threads, otherwise=otherwise, **of_it)
        return machines

    def check_engine(self, name: str) -> None:
        """Raise ValueError where an option was given that does nothing for this machine, or that its engine lacks."""
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata["elsewhere"] and value != one.default and not (name in BOUNDED and self._has(one.name)):
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
class MachinesOptions(EngineOptions):
    """Several machines, and what they are told at each step of a schedule."""

    machines: str = option(
        "els,ls,is",
        f"Of {', '.join(MACHINES)}; {in_words(SPECS[len(MACHINES) :])} name the boundary, the window, or the "
        "fold (all windows over a pixel answer, as their mean); "
        f"{in_words(BOUNDED)} take the boundary of the network's padding (zeros where it is not known).",
    )
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
