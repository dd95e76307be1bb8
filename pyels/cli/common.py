"""What several commands need: options, names of things, progress."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from tqdm import tqdm

import pyels
from pyels import adapters, distributed, presets
from pyels.bank import datasets
from pyels.denoiser import Denoiser
from pyels.engines import NAMES, default_threads
from pyels.engines.cuda import PRECISIONS
from pyels.machines import ELS, ES, IS, LS, Machine
from pyels.sampling import Step
from pyels.studies import resumable

F = TypeVar("F", bound=Callable[..., Any])
GO_ON = "finished samples are kept: repeat the command to go on"
_MOST_JOBS = 8  # each holds its own part of a posterior, up to 130 MB

dataset_option = click.option(
    "--dataset", default=datasets.EMBEDDED, show_default=True, help="A name (see `pyels info`) or a path."
)
engine_option = click.option("--engine", type=click.Choice(NAMES), default="auto", show_default=True)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="Of ELS with engine cuda: high may use tensor cores for small windows.",
)
threads_option = click.option(
    "--threads", type=int, help="Number of threads.  [default: all CPUs this process may use]"
)
tolerance_option = click.option(
    "--tolerance",
    type=float,
    help="Of engine sampled: how far a pixel's mean may be from the exact one, half a 95% interval.  [default: 0.01]",
)
index_option = click.option(
    "--index",
    type=click.Path(path_type=Path, file_okay=False),
    help="Of engine sampled: the folder of its indexes, built when first needed.  [default: beside the file of the "
    "data set, or in the user's cache]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
limit_option = click.option("--limit", type=int, help="Use only the first so many images.")
size_option = click.option("--size", type=int, help="Resize the images to so many pixels.")
memory_limit_option = click.option(
    "--memory-limit",
    help="Memory that the images may take, of each process where there are several, as 500MB or 2GB. A saved bank that "
    "takes more is read from its file again and again, a part at a time.  [default: no limit]",
)
jobs_option = click.option(
    "--jobs",
    type=int,
    help="Seeds worked on at the same time.  [default: one a thread, up to 8; 1 beyond --memory-limit]",
)
seeds_labels_option = click.option(
    "--labels",
    help="n classes, as 0,1,7,9, of which seed s gets number s % n. Machines then draw on the images of that class "
    "alone, also beside a network that is not class-conditional.  [default: all classes where it is, else all images]",
)


def out_option(default: str) -> Callable[[F], F]:
    return click.option("--out", type=click.Path(path_type=Path), default=Path(default), show_default=True)


def work_in(out: Path) -> None:
    """Hold the output folder until the command ends."""
    context = click.get_current_context()
    context.with_resource(resumable.result_folder(out, str(context.command.name)))


def network_options(command: F) -> F:
    """--network, and --dataset, --limit, --size and --memory-limit of the bank to hold it against."""
    for option in (
        memory_limit_option,
        size_option,
        limit_option,
        click.option("--dataset", help="A name (see `pyels info`) or a path.  [default: what it was trained on]"),
        click.option(
            "--network",
            "source",
            required=True,
            help="A file or folder written by pyels train, a folder written by diffusers, or FILE.py:NAME, a "
            "pyels.Denoiser of your own (a resumed run sees changes in FILE.py, but not in what it loads).",
        ),
    ):
        command = option(command)
    return command


def load_network_and_bank(
    source: str, dataset: str | None, limit: int | None, size: int | None, memory_limit: str | None
) -> tuple[Denoiser, pyels.PatchBank, dict[str, Any], dict[str, Any]]:
    """The network, the bank, the record of the network, and what of both belongs into a run's settings."""
    denoiser, record = adapters.load(source)
    channels = getattr(denoiser, "channels", None)
    trained_on = record.get("training", {}).get("data")
    same = dataset is None and limit is None and size is None
    if dataset is None:
        if trained_on is None:
            raise ValueError(f"--dataset is needed: {source} does not say what it was trained on")
        dataset = trained_on["dataset"]
        limit = trained_on["limit"] if limit is None else limit
        size = trained_on["size"] if size is None else size
    bank = datasets.load(dataset, limit=limit, size=size, memory_limit=memory_limit)
    if channels not in (None, bank.shape[0]):
        raise ValueError(f"the network takes {channels} channels, but the images of {dataset} have {bank.shape[0]}")
    data = data_settings(dataset, limit, size, bank)
    if same and trained_on.get("bank", data["bank"])["crc32"] != data["bank"]["crc32"]:
        raise ValueError(
            f"{dataset} has changed since {source} was trained on it; give --dataset to use it all the same"
        )
    settings = {
        "version": pyels.__version__,
        "network": {key: record[key] for key in ("source", "crc32")},
        "data": data,
    }
    return denoiser, bank, record, settings


def data_settings(dataset: str, limit: int | None, size: int | None, bank: pyels.PatchBank) -> dict[str, Any]:
    """What is enough to load a bank again, and to see whether it is the same."""
    where = dataset if dataset in datasets.NAMES else str(Path(dataset).resolve())
    return {"dataset": where, "limit": limit, "size": size, "bank": describe(bank)}


def describe(bank: pyels.PatchBank) -> dict[str, Any]:
    return {"images": len(bank), "shape": list(bank.shape), "crc32": bank.fingerprint()}


def classes_of_seeds(
    labels: str | None, denoiser: Denoiser, bank: pyels.PatchBank, seeds: Sequence[int]
) -> list[int] | None:
    """The class of each seed, which depends on the seed alone; None where classes play no part."""
    conditional = getattr(denoiser, "num_classes", None) is not None
    if labels is None and not conditional:
        return None
    if labels is None and bank.labels is None:
        raise ValueError("the network is class-conditional, but the data set has no labels")
    classes = bank.classes if labels is None else integers("--labels", labels)
    for c in classes:
        bank.class_range(c)
    return [classes[seed % len(classes)] for seed in seeds]


def boundary_of(record: dict[str, Any]) -> str:
    """The boundary of ELS that sees the border as the network does, as far as its record tells."""
    return "circular" if record.get("config", {}).get("padding") == "circular" else "zeros"


def make_machine(
    kind: str,
    bank: pyels.PatchBank,
    boundary: str = "zeros",
    engine: str = "auto",
    threads: int | None = None,
    tolerance: float | None = None,
    index: Path | None = None,
    precision: str = PRECISIONS[0],
) -> Machine:
    if (kind != "els" or engine not in ("sampled", "faiss")) and (tolerance is not None or index is not None):
        raise ValueError("--tolerance and --index are for --machine els with --engine sampled; the rest is exact")
    check_precision(kind, engine, precision)
    if kind == "els":
        return ELS(bank, None, boundary, engine, threads, tolerance=tolerance, index=index, precision=precision)
    if kind == "ls":
        return LS(bank, engine=engine, threads=threads)
    return (IS if kind == "is" else ES)(bank, engine=engine, threads=threads)


def check_precision(kind: str, engine: str, precision: str) -> None:
    if (kind, engine) != ("els", "cuda") and precision != PRECISIONS[0]:
        raise ValueError(f"--precision {precision} is for ELS with --engine cuda")


def engine_settings(machine: Machine) -> dict[str, Any]:
    """What the bits of a result depend on, beside its inputs."""
    settings = machine.engine.settings()
    return settings if machine.bank.memory_limit is None else {**settings, "memory_limit": machine.bank.memory_limit}


def split_threads(jobs: int | None, threads: int | None, count: int, bank: pyels.PatchBank) -> tuple[int, int]:
    """The number of jobs, and the threads of each; torch is told too."""
    threads = default_threads() if threads is None else threads
    if jobs is None:  # jobs on a streamed bank would wait for each other to read it
        jobs = 1 if bank.streamed else max(1, min(threads, count, _MOST_JOBS))
    for option, number in (("--jobs", jobs), ("--threads", threads)):
        if number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    each = max(1, threads // jobs)
    torch.set_num_threads(each)
    return jobs, each


def named_sizes(text: str, steps: int | None, schedule: str) -> list[int]:
    """Patch sizes for `steps` steps along `schedule`, from numbers, a scales.json of `pyels calibrate`, or a preset's
    name (20 steps where none are given). A folder stands for the scales.json in it."""
    if text.endswith(".json"):
        sizes = sizes_of_file(Path(text), schedule)
    elif re.search(r"^[-+\d]|,", text):  # before it is looked up as a folder: many numbers are too long for a name
        sizes = integers("--patch-sizes", text)
    elif text and (Path(text) / "scales.json").is_file():
        sizes = sizes_of_file(Path(text) / "scales.json", schedule)
    else:
        sizes = presets.patch_sizes(text, 20 if steps is None else steps)
    if steps is not None and steps != len(sizes):
        raise ValueError(f"--patch-sizes has {len(sizes)} entries for {steps} steps; give one for each")
    return sizes


def sizes_of_file(path: Path, schedule: str) -> list[int]:
    """`patch_sizes` of a scales.json, which must have been calibrated along `schedule`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        scales = json.loads(path.read_text(encoding="utf-8"))
        sizes, along = [int(k) for k in scales["patch_sizes"]], scales["schedule"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a scales.json of pyels calibrate ({error!r})") from error
    if along != schedule:
        raise ValueError(f"{path} was calibrated along schedule {along}, but --schedule is {schedule}")
    return sizes


def default_preset(dataset: str, boundary: str) -> str:
    base = "fashion-mnist" if dataset == datasets.EMBEDDED else dataset
    padding = "circular" if boundary in ("circular", "interior") else "zeros"
    for name in (f"{base}-resnet-{padding}", f"{base}-resnet-zeros"):
        if name in presets.PATCH_SIZES:
            return name
    raise ValueError(
        f"--patch-size or --patch-sizes is needed for data set {dataset}: give numbers, a scales.json of pyels "
        f"calibrate, or one of {', '.join(presets.PATCH_SIZES)}"
    )


def check_sizes(machine: Machine, sizes: Sequence[int]) -> None:
    """Fail on a bad size before anything is written."""
    for k in sizes:
        machine.check_size(k)


def integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, such as 3,3,5, got {text!r}") from None


def report(line: str) -> None:
    """Print on standard error why the program ends; of several processes, the first that ends says it."""
    if distributed.launched() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as another one has ended
        if not distributed.first_to_report():
            return
        line = "\n" + line  # not behind the progress bar that a killed process left
    tqdm.write(line, file=sys.stderr)  # nor behind one of this process


def join_processes() -> None:
    """`distributed.join`; from then on, what torchrun does when one of the processes has ended is reported."""
    distributed.join()  # where the default action of the signal ends the wait for the others
    if distributed.size() > 1:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: Any) -> None:
    report(f"pyels: error: another process of this run ended, or it was stopped from outside; {GO_ON}")
    sys.exit(1)  # which lets files be closed and threads end


class StepBar:
    """Progress in steps of denoisers over samples of `steps` steps each. May be told by several threads."""

    def __init__(self, samples: int, steps: int, what: str = "sampling") -> None:
        self._bar = tqdm(total=samples * steps, desc=what, unit="step", file=sys.stderr)
        self._steps = steps
        self._lock = threading.Lock()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def skip(self) -> None:
        with self._lock:
            self._bar.update(self._steps)

    def step(self, step: Step) -> None:
        with self._lock:
            self._bar.update()
