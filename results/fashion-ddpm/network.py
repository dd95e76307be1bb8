"""An unconditional UNet that draws Fashion-MNIST, as BrianPulfer/PapersReimplementations published it (ddpm; MIT
licence), for `pyels compare --network network.py:build --clip`.

Its weights are not here: build() reads fashion-ddpm.safetensors, the published tensors under their published names, in
the folder where it is called.

It predicts eps at 1,000 times, along betas from 1e-4 to .02, of pixels in [-1, 1].
"""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

import pyels


class Block(nn.Module):
    """Normalise over all of (C, H, W), then two convolutions."""

    def __init__(self, channels: int, size: int, out: int, normalise: bool = True) -> None:
        super().__init__()
        self.ln = nn.LayerNorm((channels, size, size))  # has weights even where it is not used
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(x) if self.normalise else x
        return silu(self.conv2(silu(self.conv1(x))))


def stage(size: int, *channels: int, last_normalises: bool = True) -> nn.Sequential:
    blocks = len(channels) - 1
    return nn.Sequential(
        *(Block(channels[i], size, channels[i + 1], normalise=last_normalises or i < blocks - 1) for i in range(blocks))
    )


class UNet(nn.Module):
    """Stages of three blocks at 28, 14, 7 and 3 pixels; each is told the time, as a value for each of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        told = {"te1": 1, "te2": 10, "te3": 20, "te_mid": 40, "te4": 80, "te5": 40, "te_out": 20}
        for name, channels in told.items():
            self.add_module(name, nn.Sequential(nn.Linear(100, channels), nn.SiLU(), nn.Linear(channels, channels)))
        self.b1 = stage(28, 1, 10, 10, 10)
        self.b2 = stage(14, 10, 20, 20, 20)
        self.b3 = stage(7, 20, 40, 40, 40)
        self.b_mid = stage(3, 40, 20, 20, 40)
        self.b4 = stage(7, 80, 40, 20, 20)
        self.b5 = stage(14, 40, 20, 10, 10)
        self.b_out = stage(28, 20, 10, 10, 10, last_normalises=False)
        self.down1 = nn.Conv2d(10, 10, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(20, 20, 4, stride=2, padding=1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2), nn.SiLU(), nn.Conv2d(40, 40, 4, stride=2, padding=1))
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(40, 40, 4, stride=2, padding=1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2)
        )
        self.up2 = nn.ConvTranspose2d(20, 20, 4, stride=2, padding=1)
        self.up3 = nn.ConvTranspose2d(10, 10, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_embed(t)

        def told(h: Tensor, embed: nn.Module) -> Tensor:
            return h + embed(time)[:, :, None, None]

        fine = self.b1(told(x, self.te1))
        middle = self.b2(told(self.down1(fine), self.te2))
        coarse = self.b3(told(self.down2(middle), self.te3))
        h = self.b_mid(told(self.down3(coarse), self.te_mid))
        h = self.b4(told(torch.cat([coarse, self.up1(h)], dim=1), self.te4))
        h = self.b5(told(torch.cat([middle, self.up2(h)], dim=1), self.te5))
        return self.conv_out(self.b_out(told(torch.cat([fine, self.up3(h)], dim=1), self.te_out)))


def build() -> pyels.NetworkDenoiser:
    network = UNet()
    network.load_state_dict(load_file("fashion-ddpm.safetensors"))
    return pyels.NetworkDenoiser(network.eval(), "eps", "linear", timesteps=1000)
