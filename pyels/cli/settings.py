"""The options that several commands share, in groups, and what they come to: results, a bank, a network, seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click
import torch

from pyels import adapters, datasets
from pyels.bank import PatchBank
from pyels.bank.latents import Latents
from pyels.bank.pictures import MODES
from pyels.checks import check_device
from pyels.cli.options import AT_LEAST_1, Settings, check, integers, option
from pyels.cli.progress import report
from pyels.denoiser import Denoiser
from pyels.engines import default_threads
from pyels.files import path_of
from pyels.guided import Guided
from pyels.networks.latent import decoder_of
from pyels.studies import resumable
from pyels.studies.check import JUDGED, limit_of
from pyels.studies.check import check as check_network

_MOST_JOBS = 8  # each holds its own part of a posterior, up to 130 MB


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


def unit_of(bank: PatchBank) -> str:
    """What the images of a bank are made of, and errors are of."""
    return "pixels" if bank.latents is None else "latents"


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


# ---- Threads -------------------------------------------------------------------------------------------------------


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
