"""Networks from disk."""

from __future__ import annotations

import importlib.util
import io
import sys
import sysconfig
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyels.bank.latents import SCHEMA
from pyels.checks import warn
from pyels.denoiser import Denoiser
from pyels.files import TensorFile, path_of
from pyels.networks import KINDS
from pyels.networks.adapters import OWN, NetworkDenoiser, from_diffusers, from_pyels, in_words
from pyels.networks.identity import checksum
from pyels.networks.network import HEADER, Network
from pyels.records import parse_record, read_record, short

_SIZE = range(1, 1 << 16)
_READING = {"split?": ("train", "test", None), "root?": (str, None), "mode?": (str, None)}
_SIZES = {"limit?": (range(1, 1 << 40), None), "size?": (_SIZE, None), "crop?": bool, "skip_unreadable?": bool}
_DATA = {"dataset": str, **_READING, **_SIZES, "bank?": {"crc32": str, "latents?": SCHEMA}}
_CONFIG = {"channels": _SIZE, "width": _SIZE, "depth": range(1, 1000), "num_classes": (range(1, 1 << 31), None)}
_RECORD = {"kind": tuple(KINDS), "config": _CONFIG, "training?": {"data?": _DATA}}

_PIPELINE = {"unet?": ([(str, None)], None), "scheduler?": ([(str, None)], None)}
_UNREADABLE = (AttributeError, KeyError, TypeError, RuntimeError)
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def load(source: str | Path) -> tuple[Denoiser, dict[str, Any]]:
    """A network from disk, and what identifies it: its source, a checksum, and the record saved with it.

    Parameters
    ----------
    source  a file written by `pyels train`, or the folder it is in; a folder in which diffusers saved a pipeline with
            a UNet2DModel (its weights as safetensors), or such a model alone, beside its scheduler or with that of
            DDPMScheduler(); or FILE.py:NAME, a Python file of your own and the name in it of a `pyels.Denoiser` or of
            a function without arguments that returns one. No pickle is read. The checksum is that of the file, or of
            all weights that the network reaches and of the texts that it was made from

    Raises
    ------
    FileNotFoundError, ValueError  there is no network there; ImportError: diffusers is needed and not installed
    """
    path, name = place_of(source, "network", "the pyels.NetworkDenoiser")
    if name:
        denoiser = load_python(path, name)
        if not isinstance(denoiser, Denoiser):
            raise ValueError(
                f"{path}:{name} gave {kind_of(denoiser)}; it must be or return a pyels.Denoiser: wrap a network in "
                "pyels.NetworkDenoiser(network, predicts=.., schedule=..), or give one of diffusers to "
                "pyels.adapters.from_diffusers"
            )
        return denoiser, {"source": f"{path}:{name}", "crc32": checksum(denoiser, path)}
    beside = ("model_index.json", "scheduler/scheduler_config.json")
    if (path / "config.json").exists() and any((path.parent / name).exists() for name in beside):
        path = path.parent  # of the pipeline whose model this is
    if any((path / name).exists() for name in ("model_index.json", "unet/config.json", "config.json")):
        denoiser = _load_diffusers(path)
        return denoiser, {"source": str(path), "crc32": checksum(denoiser, *sorted(path.glob("**/*.json")))}
    if path.is_dir():
        path = path / "network.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"{source}: no network.safetensors, as pyels train writes it, and no model_index.json of diffusers"
            )
    network, record = load_network(path)
    return from_pyels(network), {**record, "source": str(path), "crc32": checksum(None, path)}


def place_of(source: str | Path, what: str, made: str) -> tuple[Path, str]:
    """The place of a network, and its name where that is a Python file. Raises ValueError for a pickle, which `made` of
    it may replace, and for a Python file without a name."""
    file, _, name = str(source).rpartition(":")
    if file.endswith(".py") and name:
        return path_of(file).resolve(), name
    if (python := str(source).rstrip(":")).endswith(".py"):
        raise ValueError(f"{python}: say which name in it is the {what}, as {python}:NAME")
    path = path_of(source).resolve()
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{source}: {path.suffix} files are pickles, which run code when they are read; load it in a Python "
            f"file of your own, and give FILE.py:NAME of {made} made of it"
        )
    return path, ""


def load_network(path: str | Path) -> tuple[Network, dict[str, Any]]:
    """Read a network that `Network.save` wrote, and the record in its header: kind, config, and what was saved with it.

    Raises FileNotFoundError, or ValueError naming the file when it is damaged or holds something else.
    """
    file = TensorFile.read(path)
    try:
        if HEADER not in file.metadata:
            raise ValueError(f"its metadata have no {HEADER!r}")
        record: dict[str, Any] = parse_record(file.metadata[HEADER], _RECORD)
        with torch.device("meta"):  # no memory, before the shapes are known to be those in the file
            network = KINDS[record["kind"]](**record["config"])
        for name, weights in file.tensors.items():
            if not (weights.is_floating_point() and torch.isfinite(weights).all()):
                raise ValueError(f"{name} is {weights.dtype}, or holds NaN or infinite weights")
        network.load_state_dict({name: value.float() for name, value in file.tensors.items()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a network saved by pyels ({short(error)})") from error
    return network.eval(), record


def _load_diffusers(folder: Path) -> NetworkDenoiser:
    """A UNet2DModel and its scheduler, each in a folder of its own or not."""
    diffusers = import_diffusers(folder)
    unet_folder, scheduler_folder = (
        folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler")
    )
    kinds = {"unet": class_name(unet_folder / "config.json")}
    kinds["scheduler"] = class_name(scheduler_folder / "scheduler_config.json") or "DDPMScheduler"
    if (folder / "model_index.json").exists():
        index = read_record(folder / "model_index.json", _PIPELINE, "the index of a pipeline of diffusers")
        kinds = {name: (index.get(name) or [""])[-1] or "" for name in kinds}
    scheduler_kind = getattr(diffusers, kinds["scheduler"], None)
    if kinds["unet"] != "UNet2DModel" or scheduler_kind is None:
        raise ValueError(f"{folder}: needed is a pipeline of a UNet2DModel and a scheduler, got {kinds}")
    unet = from_pretrained(diffusers.UNet2DModel, unet_folder)
    saved = (scheduler_folder / "scheduler_config.json").exists()
    try:
        scheduler = scheduler_kind.from_pretrained(scheduler_folder) if saved else scheduler_kind()
    except _UNREADABLE as error:
        raise ValueError(f"{folder}: diffusers cannot read it ({short(error)})") from error
    if not saved:
        warn(
            f"{folder} does not say with which scheduler its network was trained: DDPMScheduler() is assumed (predicts "
            "eps, 1,000 steps, linear betas); save the scheduler into the same folder, or the pipeline"
        )
    return from_diffusers(unet, scheduler)


def import_diffusers(folder: Path) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{folder} holds a model of diffusers: pip install diffusers to read it") from error
    return diffusers


def from_pretrained(kind: Any, folder: Path) -> Any:
    """A model of diffusers, of safetensors, in float32."""
    files = list(folder.glob("diffusion_pytorch_model*.safetensors"))
    variant = files[0].stem.removeprefix("diffusion_pytorch_model").strip(".") if len(files) == 1 else ""
    how = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        model, read = kind.from_pretrained(folder, variant=variant or None, **how)
    except _UNREADABLE as error:
        raise ValueError(f"{folder}: diffusers cannot read it ({short(error)})") from error
    if wrong := [*read["missing_keys"], *read["unexpected_keys"], *read["mismatched_keys"]]:
        raise ValueError(f"{folder}: config.json and the weights do not belong together ({short(wrong)})")
    return model


def class_name(file: Path) -> str:
    """Of a model or scheduler of diffusers, as its configuration says; empty where there is none."""
    if not file.exists():
        return ""
    return str(read_record(file, {"_class_name": str}, "a configuration of diffusers")["_class_name"])


def load_python(path: Path, name: str) -> Any:
    """What is called so in a Python file, or what a function of that name returns."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(OWN + path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does; data classes need it
    # Its folder stays on the path, as with `python FILE`, but behind the standard library: not all of that is imported.
    library = Path(sysconfig.get_path("stdlib"))
    behind = [i for i, entry in enumerate(sys.path, 1) if Path(entry) in (library, library / "lib-dynload")]
    sys.path.insert(max(behind, default=0), str(path.parent))
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [str(path)]  # it may be a script that reads options, of which it is given none
    try:
        with redirect_stderr(said):  # what an argument parser says before it exits
            spec.loader.exec_module(module)
            if not hasattr(module, name):
                raise ValueError(f"nothing of the name {name!r} in it")
            value = getattr(module, name)
            made = value if isinstance(value, (Denoiser, nn.Module)) or not callable(value) else value()
    except SystemExit as error:
        why = " ".join(said.getvalue().split()) or f"sys.exit({'' if error.code is None else error.code})"
        raise ValueError(
            f"{path}: it ends the program when it is imported ({why}); put what only a script does under "
            "if __name__ == '__main__':"
        ) from error
    except Exception as error:  # it may fail in any way
        raise ValueError(f"{path}: {in_words(error)}") from error
    finally:
        sys.argv = arguments
    sys.stderr.write(said.getvalue())
    return made


def kind_of(made: object) -> str:
    return ("the torch module " if isinstance(made, nn.Module) else "") + type(made).__name__
