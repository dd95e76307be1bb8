"""Networks as denoisers: pyels' own and other people's, on disk and in training."""

from pyels.networks.convolutional import ResNet, UNet
from pyels.networks.network import Network

# The kinds that `pyels train` knows. A file names the class, which is the same but for capitals.
NETWORKS: dict[str, type[Network]] = {"resnet": ResNet, "unet": UNet}

__all__ = ["NETWORKS", "Network", "ResNet", "UNet"]
