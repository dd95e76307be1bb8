"""Networks as denoisers: pyels' own and other people's, on disk and in training."""

from pyels.networks.attention import DiT, UNetAttention
from pyels.networks.convolutional import ResNet, UNet
from pyels.networks.network import Network

NETWORKS: dict[str, type[Network]] = {"resnet": ResNet, "unet": UNet, "unet-attention": UNetAttention, "dit": DiT}
KINDS = {kind.__name__: kind for kind in NETWORKS.values()}  # as a file names them

__all__ = ["KINDS", "NETWORKS", "DiT", "Network", "ResNet", "UNet", "UNetAttention"]
