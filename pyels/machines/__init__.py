"""Machines: a definition over a bank, and those that have a name; denoisers that are made of them, or of moments."""

from pyels.machines.golden import Golden
from pyels.machines.linear import Wiener
from pyels.machines.locality import PSPC, PCALocality
from pyels.machines.machine import Machine
from pyels.machines.mixtures import ASELS, ASLS, Mixture
from pyels.machines.named import ELS, ES, IS, LS, MACHINES
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
