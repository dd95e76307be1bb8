"""pyels: what a convolutional diffusion model draws, in closed form.

The equivariant local score machine of Kamb & Ganguli (ICML 2025, arXiv 2412.20292) and its siblings, exact and fast.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyels import adapters, datasets, distributed, metrics, novelty, presets, provenance
    from pyels.adapters import NetworkDenoiser
    from pyels.bank import PatchBank
    from pyels.bank.selection import Selection
    from pyels.definition import Definition, Fold, Gaussian, Masks, Square, WholeImage
    from pyels.denoiser import Denoiser, Query
    from pyels.guided import Guided
    from pyels.machines import (
        ASELS,
        ASLS,
        ELS,
        ES,
        IS,
        LS,
        PSPC,
        Golden,
        Machine,
        Mixture,
        PCALocality,
        SmoothedIS,
        Wiener,
    )
    from pyels.networks import DiT, ResNet, UNet, UNetAttention
    from pyels.posterior import PartialPosterior, Posterior, Want
    from pyels.sampling import sample
    from pyels.schedules import make_schedule

    __version__: str

if find_spec("pyels._core") is None:
    raise ImportError(
        f"pyels is imported from a source folder, {__path__[0]}, where its compiled module was not built: start Python "
        "in another folder to use the installed pyels, or install this one with pip install -e ."
    )

# Where the public names are, which are imported when first used: torch takes seconds.
_NAMES = {
    "pyels": "adapters datasets distributed metrics novelty presets provenance",
    "pyels.adapters": "NetworkDenoiser",
    "pyels.bank": "PatchBank",
    "pyels.bank.selection": "Selection",
    "pyels.definition": "Definition Fold Gaussian Masks Square WholeImage",
    "pyels.denoiser": "Denoiser Query",
    "pyels.guided": "Guided",
    "pyels.machines": "ASELS ASLS ELS ES IS LS PSPC Golden Machine Mixture PCALocality SmoothedIS Wiener",
    "pyels.networks": "DiT ResNet UNet UNetAttention",
    "pyels.posterior": "PartialPosterior Posterior Want",
    "pyels.sampling": "sample",
    "pyels.schedules": "make_schedule",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "ASELS",
    "ASLS",
    "ELS",
    "ES",
    "IS",
    "LS",
    "PSPC",
    "Definition",
    "Denoiser",
    "DiT",
    "Fold",
    "Gaussian",
    "Golden",
    "Guided",
    "Machine",
    "Masks",
    "Mixture",
    "NetworkDenoiser",
    "PCALocality",
    "PartialPosterior",
    "PatchBank",
    "Posterior",
    "Query",
    "ResNet",
    "Selection",
    "SmoothedIS",
    "Square",
    "UNet",
    "UNetAttention",
    "Want",
    "WholeImage",
    "Wiener",
    "adapters",
    "datasets",
    "distributed",
    "make_schedule",
    "metrics",
    "novelty",
    "presets",
    "provenance",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("pyels")
    elif _HOMES.get(name, "pyels") == "pyels":  # a module, public or not
        if name.startswith("_") or find_spec(f"pyels.{name}") is None:
            raise AttributeError(f"module 'pyels' has no attribute {name!r}")
        return import_module(f"pyels.{name}")
    else:
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
