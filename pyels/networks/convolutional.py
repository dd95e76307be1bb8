"""The reference networks: the paper's fully convolutional ResNet, and a UNet of three scales."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyels.networks.network import EMBEDDING, Network

Padding = Literal["zeros", "circular"]


def _conv(inputs: int, outputs: int, padding: Padding, stride: int = 1) -> nn.Conv2d:
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode=padding)


class ResNet(Network):
    """The paper's fully convolutional ResNet: up-projection, `depth` residual 3x3 layers, down-projection.

    No normalisation, no pooling, no attention: what an output pixel sees is a window of 2 * depth + 5 pixels, and the
    only thing that tells positions apart is the zero padding (none with `padding="circular"`). The paper's has 8 layers
    in all, which is depth 6, and width 256.

    Parameters
    ----------
    channels     image channels C
    width        hidden channels
    depth        number of residual layers
    num_classes  number of classes of a class-conditional network, or None
    padding      "zeros" or "circular"
    common       predicts and null_label, see `Network`
    """

    DEPTH, DEPTH_COUNTS = 6, "residual layers"

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = DEPTH,
        num_classes: int | None = None,
        padding: Padding = "zeros",
        **common: Any,
    ) -> None:
        super().__init__(channels, width, depth, num_classes, **common, padding=padding)
        self.up = _conv(channels, width, padding)
        self.layers = nn.ModuleList(_conv(width, width, padding) for _ in range(depth))
        self.down = _conv(width, channels, padding)
        self.embed = nn.Linear(EMBEDDING, width * depth)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, shaped as x (B, C, H, W), at angle (B,) in (0, pi/2], with labels (B,) if conditional."""
        biases = self.embed(self.embedding(angle, labels)).chunk(len(self.layers), dim=1)
        h = self.up(x)
        for layer, bias in zip(self.layers, biases, strict=True):
            h = h + layer(nn.functional.relu(h + bias[:, :, None, None]))
        out: Tensor = self.down(h)
        return out


class _Block(nn.Module):
    """Two 3x3 convolutions around the embedding, added to their input; no normalisation."""

    def __init__(self, inputs: int, outputs: int, padding: Padding) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, padding)
        self.embed = nn.Linear(EMBEDDING, outputs)
        self.second = _conv(outputs, outputs, padding)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)  # without normalisation, deep stacks must start as the identity

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        relu = nn.functional.relu
        inner = self.second(relu(self.first(relu(h)) + self.embed(embedding)[:, :, None, None]))
        out: Tensor = self.skip(h) + inner
        return out


class UNet(Network):
    """A UNet of three scales, as in the paper with `width`, 2 * `width` and 4 * `width` channels (64, 128, 256 there).

    Residual blocks of 3x3 convolutions, strided convolutions on the way down, nearest-neighbour upsampling on the way
    up, skips by concatenation; no normalisation, no attention. Height and width of the images must be multiples of 4.

    Parameters
    ----------
    channels     image channels C
    width        channels of the finest scale
    depth        residual blocks at each scale, on the way down and on the way up
    num_classes  number of classes of a class-conditional network, or None
    padding      "zeros" or "circular"
    common       predicts and null_label, see `Network`
    """

    DEPTH, DEPTH_COUNTS = 1, "blocks a scale"
    LARGEST_SIZE = 27

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = DEPTH,
        num_classes: int | None = None,
        padding: Padding = "zeros",
        **common: Any,
    ) -> None:
        super().__init__(channels, width, depth, num_classes, **common, padding=padding)
        fine, middle, coarse = width, 2 * width, 4 * width

        def blocks(inputs: int, outputs: int) -> nn.ModuleList:
            layers: list[nn.Module] = []
            for i in range(depth):
                layers += [_Block(outputs if i else inputs, outputs, padding), *self.after(outputs, outputs > width)]
            return nn.ModuleList(layers)

        self.up = _conv(channels, fine, padding)
        self.fine_in, self.to_middle = blocks(fine, fine), _conv(fine, middle, padding, stride=2)
        self.middle_in, self.to_coarse = blocks(middle, middle), _conv(middle, coarse, padding, stride=2)
        self.coarse = blocks(coarse, coarse)
        self.from_coarse, self.middle_out = _conv(coarse, middle, padding), blocks(2 * middle, middle)
        self.from_middle, self.fine_out = _conv(middle, fine, padding), blocks(2 * fine, fine)
        self.down = _conv(fine, channels, padding)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, shaped as x (B, C, H, W), at angle (B,) in (0, pi/2], with labels (B,) if conditional."""
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]} pixels do not fit the UNet's three scales: height and width must "
                "be multiples of 4; resize them"
            )
        embedding = self.embedding(angle, labels)

        def through(blocks: nn.ModuleList, h: Tensor) -> Tensor:
            for block in blocks:
                h = block(h, embedding)
            return h

        def double(h: Tensor) -> Tensor:
            return nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")

        fine = through(self.fine_in, self.up(x))
        middle = through(self.middle_in, self.to_middle(fine))
        coarse = through(self.coarse, self.to_coarse(middle))
        middle = through(self.middle_out, torch.cat([middle, self.from_coarse(double(coarse))], dim=1))
        fine = through(self.fine_out, torch.cat([fine, self.from_middle(double(middle))], dim=1))
        out: Tensor = self.down(nn.functional.relu(fine))
        return out

    def after(self, width: int, coarser: bool) -> list[nn.Module]:
        """The layers (h, embedding) -> h that follow a block of so many channels; none here."""
        return []
