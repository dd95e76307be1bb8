"""A class-conditional transformer that draws MNIST by flow matching, as sofia-dominguezc/MNIST-diffusion published it
(MIT licence), for `pyels compare --network network.py:build`.

Its weights are not here: build() reads mnist-flow-vit.safetensors, the published tensors under their published names,
in the folder where it is called.

The image, in [0, 1], is there at t = 1 and the noise at t = 0; it predicts the image. Label 10 stands for no class.
"""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pyels


class ViT(nn.Module):
    """16 tokens of 7x7 pixels, two of time and two of the class, through four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 64, 7, stride=7)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, 64))
        self.y_encoder = nn.Embedding(11, 128)
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True) for _ in range(4)
        )
        self.unpatch = nn.ConvTranspose2d(64, 1, 7, stride=7)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angles = t[:, None] * 10_000 ** (-torch.arange(64, device=t.device) / 63)
        time = torch.cat([angles.sin(), angles.cos()], dim=1).unflatten(1, (2, 64))
        image = self.patch_embed(z).flatten(2).transpose(1, 2) + self.pos_embed
        tokens = torch.cat([image, time, self.y_encoder(labels).unflatten(1, (2, 64))], dim=1)
        for layer in self.transformer:
            tokens = layer(tokens)
        return self.unpatch(tokens[:, :16].transpose(1, 2).unflatten(2, (4, 4)))


def build() -> pyels.NetworkDenoiser:
    network = ViT()
    network.load_state_dict(load_file("mnist-flow-vit.safetensors"))
    network.eval()
    return pyels.NetworkDenoiser(
        lambda z, t, labels: network(z, 1 - t, labels), "x0", "flow", num_classes=10, pixel_range=(0, 1), null_label=10
    )
