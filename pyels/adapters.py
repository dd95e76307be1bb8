"""Networks as denoisers: anything that was trained to denoise, behind the interface of a machine."""

from pyels.networks.adapters import NetworkDenoiser, NoiseLevel, from_diffusers, from_edm, from_pyels
from pyels.networks.load import load

__all__ = ["NetworkDenoiser", "NoiseLevel", "from_diffusers", "from_edm", "from_pyels", "load"]
