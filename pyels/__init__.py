"""pyels: what a convolutional diffusion model draws, in closed form.

The equivariant local score machine of Kamb & Ganguli (ICML 2025, arXiv 2412.20292) and its siblings, exact and fast.
"""

from importlib.metadata import version

from pyels import adapters, datasets, distributed, metrics, presets
from pyels.adapters import NetworkDenoiser
from pyels.bank import PatchBank
from pyels.bank.selection import Selection
from pyels.definition import Definition, Masks, Square, WholeImage
from pyels.denoiser import Denoiser, Query
from pyels.guided import Guided
from pyels.machines import ELS, ES, IS, LS, Machine
from pyels.networks import ResNet, UNet
from pyels.posterior import PartialPosterior, Posterior, Want
from pyels.sampling import sample
from pyels.schedules import make_schedule

__version__ = version("pyels")

__all__ = [
    "ELS",
    "ES",
    "IS",
    "LS",
    "Definition",
    "Denoiser",
    "Guided",
    "Machine",
    "Masks",
    "NetworkDenoiser",
    "PartialPosterior",
    "PatchBank",
    "Posterior",
    "Query",
    "ResNet",
    "Selection",
    "Square",
    "UNet",
    "Want",
    "WholeImage",
    "adapters",
    "datasets",
    "distributed",
    "make_schedule",
    "metrics",
    "presets",
    "sample",
]
