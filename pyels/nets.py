"""The reference ResNet, and the adapter that lets a network denoise like a machine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyels.denoiser import Denoiser, check_labels, check_level, check_query
from pyels.files import write_tensors

_FREQUENCIES = 16
_EMBEDDING = 128


class ResNet(nn.Module):
    """The paper's fully convolutional ResNet: up-projection, `depth` residual 3x3 layers, down-projection.

    No normalisation, no pooling, no attention: what an output pixel sees is a window of 2 * depth + 5 pixels, and the
    only thing that tells positions apart is the zero padding (none with `padding="circular"`).

    The network predicts v = alpha * eps - sigma * x0, which is well scaled at both ends of the noise range, from an
    input scaled so that alpha^2 + sigma^2 = 1. The noise level enters as the angle atan2(sigma, alpha).

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
        padding: Literal["zeros", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        if padding not in ("zeros", "circular"):
            raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
        self.config: dict[str, Any] = dict(
            channels=channels, width=width, depth=depth, num_classes=num_classes, padding=padding
        )

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=padding)

        self.up = conv(channels, width)
        self.layers = nn.ModuleList(conv(width, width) for _ in range(depth))
        self.down = conv(width, channels)
        self.embed_noise = nn.Linear(2 * _FREQUENCIES, _EMBEDDING)
        self.embed_class = nn.Embedding(num_classes, _EMBEDDING) if num_classes else None
        self.embed = nn.Linear(_EMBEDDING, width * depth)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """v (B, C, H, W) from x (B, C, H, W), angle (B,) in (0, pi/2] and labels (B,) where class-conditional."""
        phases = angle[:, None] * torch.arange(1, _FREQUENCIES + 1, device=x.device, dtype=angle.dtype)
        embedding = self.embed_noise(torch.cat([phases.cos(), phases.sin()], dim=1))
        if self.embed_class is not None:
            if labels is None:
                raise ValueError("labels: this network is class-conditional and needs a label for every image")
            classes = self.embed_class.num_embeddings
            if not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"labels must lie in 0..{classes - 1} for this network, got {labels.tolist()}")
            embedding = embedding + self.embed_class(labels)
        biases = self.embed(nn.functional.silu(embedding)).chunk(len(self.layers), dim=1)
        h = self.up(x)
        for layer, bias in zip(self.layers, biases, strict=True):
            h = h + layer(nn.functional.relu(h + bias[:, :, None, None]))
        out: Tensor = self.down(h)
        return out

    def save(self, path: str | Path) -> None:
        """Write weights and configuration to one safetensors file (the configuration is JSON in its header)."""
        write_tensors(path, self.state_dict(), metadata={"resnet": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | Path) -> ResNet:
        """Read what `save` wrote. Raises ValueError naming the file when it is damaged or holds something else."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {})["resnet"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            network = cls(**config)
            network.load_state_dict(weights)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a ResNet saved by pyels ({error})") from error
        return network.eval()


class NetworkDenoiser(Denoiser):
    """A trained `ResNet` with the interface of a machine, so that one sampler serves both."""

    def __init__(self, network: ResNet) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        labels: Tensor | None = None,
        patch_size: int | None = None,
    ) -> Tensor:
        """x0_hat (B, C, H, W) float32; arguments as in `Machine.denoise`, of which patch_size has no meaning here.
        A network that is not class-conditional draws without regard to labels.

        Noise levels outside alpha^2 + sigma^2 = 1 are rescaled to it, which leaves x0_hat unchanged.
        """
        if patch_size is not None:
            self.check_size(patch_size)
        x = check_query(x, channels=self.network.config["channels"])
        a, s = check_level("alpha", alpha, len(x)), check_level("sigma", sigma, len(x))
        labels = check_labels(labels, len(x))
        scale = torch.hypot(a, s)
        column = (-1, 1, 1, 1)
        x = x / scale.float().view(column)
        v: Tensor = self.network(x, torch.atan2(s, a).float(), labels)
        return (a / scale).float().view(column) * x - (s / scale).float().view(column) * v
