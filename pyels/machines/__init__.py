"""Machines: closed-form denoisers over a bank."""

from pyels.machines.locality import PSPC, PCALocality
from pyels.machines.machine import Machine
from pyels.machines.named import ELS, ES, IS, LS, MACHINES

__all__ = ["ELS", "ES", "IS", "LS", "MACHINES", "PSPC", "Machine", "PCALocality"]
