"""Machines: a definition over a bank, and those that have a name; denoisers that are made of them, or of moments."""

from collections.abc import Callable
from typing import Any

from pyels.bank import PatchBank
from pyels.denoiser import Denoiser
from pyels.machines.golden import Golden
from pyels.machines.linear import Wiener
from pyels.machines.locality import PSPC, PCALocality
from pyels.machines.machine import Machine
from pyels.machines.mixtures import ASELS, ASLS, Mixture
from pyels.machines.named import ELS, ES, IS, LS
from pyels.machines.smoothed import SmoothedIS

__all__ = [
    "ASELS",
    "ASLS",
    "ELS",
    "ES",
    "IS",
    "LS",
    "MACHINES",
    "PSPC",
    "Golden",
    "Machine",
    "Mixture",
    "PCALocality",
    "SmoothedIS",
    "Wiener",
]


def _golden(bank: PatchBank, threshold: float = 0.02, engine: str = "auto", **options: Any) -> Denoiser:
    return Golden(PCALocality(bank, threshold, engine=engine, **options))


# As the command line knows them: from a bank, and of these arguments those that they have: patch_size, boundary, engine
# and its options.
MACHINES: dict[str, Callable[..., Denoiser]] = {
    "is": IS,
    "es": ES,
    "ls": LS,
    "els": ELS,
    "pca": PCALocality,
    "pspc": PSPC,
    "wiener": Wiener,
    "smoothed": SmoothedIS,
    "golden": _golden,  # of what its authors choose subsets for
    "asls": ASLS,
    "asels": ASELS,
}
