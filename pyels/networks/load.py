"""Networks from disk."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pyels.denoiser import Denoiser
from pyels.files import TensorFile
from pyels.networks import NETWORKS
from pyels.networks.adapters import NetworkDenoiser, from_diffusers, from_pyels
from pyels.networks.identity import checksum
from pyels.networks.network import HEADER, Network
from pyels.records import parse_record, short

_SIZE = range(1, 1 << 16)
_READING = {"split?": ("train", "test", None), "root?": (str, None), "mode?": (str, None)}
_SIZES = {"limit?": (range(1, 1 << 40), None), "size?": (_SIZE, None), "crop?": bool, "skip_unreadable?": bool}
_DATA = {"dataset": str, **_READING, **_SIZES, "bank?": {"crc32": str}}
_CONFIG = {"channels": _SIZE, "width": _SIZE, "depth": range(1, 1000), "num_classes": (range(1, 1 << 31), None)}
_KINDS = tuple(kind.__name__ for kind in NETWORKS.values())
_RECORD = {"kind": _KINDS, "config": _CONFIG, "training?": {"data?": _DATA}}


def load(source: str | Path) -> tuple[Denoiser, dict[str, Any]]:
    """A network from disk, and what identifies it: its source, a checksum, and the record saved with it.

    Parameters
    ----------
    source  a file written by `pyels train`, or the folder it is in; a folder in which diffusers saved a pipeline with
            a UNet2DModel (its weights as safetensors); or FILE.py:NAME, a Python file of your own and the name in it of
            a `pyels.Denoiser` or of a function without arguments that returns one. No pickle is read. The checksum is
            that of the file, or of all weights that the network reaches and of the texts that it was made from

    Raises
    ------
    FileNotFoundError, ValueError  there is no network there; ImportError: diffusers is needed and not installed
    """
    file, _, name = str(source).rpartition(":")
    if file.endswith(".py"):
        python = Path(file).expanduser().resolve()
        denoiser = _load_python(python, name)
        return denoiser, {"source": f"{python}:{name}", "crc32": checksum(denoiser, python)}
    if str(source).endswith(".py"):
        raise ValueError(f"{source}: say which name in it is the network, as {source}:NAME")
    path = Path(source).expanduser().resolve()
    if path.is_dir() and (path / "model_index.json").exists():
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
            network = {kind.__name__: kind for kind in NETWORKS.values()}[record["kind"]](**record["config"])
        for name, weights in file.tensors.items():
            if not (weights.is_floating_point() and torch.isfinite(weights).all()):
                raise ValueError(f"{name} is {weights.dtype}, or holds NaN or infinite weights")
        network.load_state_dict({name: value.float() for name, value in file.tensors.items()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a network saved by pyels ({short(error)})") from error
    return network.eval(), record


def _load_diffusers(folder: Path) -> NetworkDenoiser:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{folder} holds a diffusers pipeline: pip install diffusers to read it") from error
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler_kind = getattr(diffusers, index.get("scheduler", ["", ""])[1], None)
    if index.get("unet", ["", ""])[1] != "UNet2DModel" or scheduler_kind is None:
        raise ValueError(f"{folder}: needed is a pipeline of a UNet2DModel and a scheduler, got {index}")
    kind: Any = diffusers.UNet2DModel
    unet = kind.from_pretrained(folder, subfolder="unet", use_safetensors=True, low_cpu_mem_usage=False)
    return from_diffusers(unet, scheduler_kind.from_pretrained(folder, subfolder="scheduler"))


def _load_python(path: Path, name: str) -> Denoiser:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"_pyels_network_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does; data classes need it
    sys.path.insert(0, str(path.parent))  # and stays there, as with `python FILE`
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, name):
            raise ValueError(f"nothing of the name {name!r} in it")
        value = getattr(module, name)
        denoiser = value if isinstance(value, Denoiser) else value()
    except Exception as error:  # it may fail in any way
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"{path}:{name} gave {type(denoiser).__name__}; it must be or return a "
            "pyels.Denoiser: wrap a network in pyels.NetworkDenoiser"
        )
    return denoiser
