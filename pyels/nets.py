"""The reference networks: the paper's fully convolutional ResNet, and a UNet of three scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyels.files import write_tensors

_FREQUENCIES = 16
_EMBEDDING = 128
_METADATA = "pyels-network"

Padding = Literal["zeros", "circular"]


class ConvNetwork(nn.Module):
    """What the reference networks share: the embedding of noise level and class, and their file.

    They predict v = alpha * eps - sigma * x0, which is well scaled at both ends of the noise range, from an input
    scaled so that alpha^2 + sigma^2 = 1. The noise level enters as the angle atan2(sigma, alpha).
    """

    def __init__(self, num_classes: int | None, padding: Padding, **config: int) -> None:
        super().__init__()
        if padding not in ("zeros", "circular"):
            raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None, got {num_classes}")
        for name, value in config.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config: dict[str, Any] = {**config, "num_classes": num_classes, "padding": padding}
        self.embed_noise = nn.Linear(2 * _FREQUENCIES, _EMBEDDING)
        self.embed_class = nn.Embedding(num_classes, _EMBEDDING) if num_classes else None

    def _conv(self, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode=self.config["padding"])

    def embedding(self, angle: Tensor, labels: Tensor | None) -> Tensor:
        """What the layers are told of noise level and class, (B, 128)."""
        phases = angle[:, None] * torch.arange(1, _FREQUENCIES + 1, device=angle.device, dtype=angle.dtype)
        embedding: Tensor = self.embed_noise(torch.cat([phases.cos(), phases.sin()], dim=1))
        if self.embed_class is not None:
            if labels is None:
                raise ValueError("labels: this network is class-conditional and needs a label for every image")
            embedding = embedding + self.embed_class(labels)
        return nn.functional.silu(embedding)

    def save(self, path: str | Path, record: dict[str, Any] | None = None, half: bool = False) -> None:
        """Write weights and configuration to one safetensors file.

        Parameters
        ----------
        record  what else the header should say as JSON, such as how the network was trained
        half    store the weights in float16, half the size; `load_network` makes them float32 again
        """
        header = {"kind": type(self).__name__, "config": self.config, **(record or {})}
        weights = {name: value.half() if half else value for name, value in self.state_dict().items()}
        write_tensors(path, weights, metadata={_METADATA: json.dumps(header)})


class ResNet(ConvNetwork):
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
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = 6,
        num_classes: int | None = None,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__(num_classes, padding, channels=channels, width=width, depth=depth)
        self.up = self._conv(channels, width)
        self.layers = nn.ModuleList(self._conv(width, width) for _ in range(depth))
        self.down = self._conv(width, channels)
        self.embed = nn.Linear(_EMBEDDING, width * depth)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """v (B, C, H, W) from x (B, C, H, W), angle (B,) in (0, pi/2] and labels (B,) where class-conditional."""
        biases = self.embed(self.embedding(angle, labels)).chunk(len(self.layers), dim=1)
        h = self.up(x)
        for layer, bias in zip(self.layers, biases, strict=True):
            h = h + layer(nn.functional.relu(h + bias[:, :, None, None]))
        out: Tensor = self.down(h)
        return out


class _Block(nn.Module):
    """Two 3x3 convolutions around the embedding, added to their input; no normalisation."""

    def __init__(self, net: ConvNetwork, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = net._conv(inputs, outputs)
        self.embed = nn.Linear(_EMBEDDING, outputs)
        self.second = net._conv(outputs, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second.weight)  # without normalisation, deep stacks must start as the identity

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        relu = nn.functional.relu
        inner = self.second(relu(self.first(relu(h)) + self.embed(embedding)[:, :, None, None]))
        out: Tensor = self.skip(h) + inner
        return out


class UNet(ConvNetwork):
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
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = 1,
        num_classes: int | None = None,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__(num_classes, padding, channels=channels, width=width, depth=depth)
        fine, middle, coarse = width, 2 * width, 4 * width

        def blocks(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(_Block(self, inputs if i == 0 else outputs, outputs) for i in range(depth))

        self.up = self._conv(channels, fine)
        self.fine_in, self.to_middle = blocks(fine, fine), self._conv(fine, middle, stride=2)
        self.middle_in, self.to_coarse = blocks(middle, middle), self._conv(middle, coarse, stride=2)
        self.coarse = blocks(coarse, coarse)
        self.from_coarse, self.middle_out = self._conv(coarse, middle), blocks(2 * middle, middle)
        self.from_middle, self.fine_out = self._conv(middle, fine), blocks(2 * fine, fine)
        self.down = self._conv(fine, channels)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """v (B, C, H, W) from x (B, C, H, W), angle (B,) in (0, pi/2] and labels (B,) where class-conditional."""
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


NETWORKS: dict[str, type[ResNet] | type[UNet]] = {"resnet": ResNet, "unet": UNet}


def load_network(path: str | Path) -> tuple[ResNet | UNet, dict[str, Any]]:
    """Read a network that `save` wrote, and the record in its header: kind, config, and what was saved with it.

    Raises FileNotFoundError, or ValueError naming the file when it is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_METADATA])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        network = NETWORKS[record["kind"].lower()](**record["config"])
        network.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a network saved by pyels ({error})") from error
    return network.eval(), record
