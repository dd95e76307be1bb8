"""What a network needs to be one of pyels' own: the embedding of noise level and class, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyels.files import write_tensors

EMBEDDING = 128
HEADER = "pyels-network"  # the name in a file's metadata under which its kind, configuration and record stand
_FREQUENCIES = 16


class Network(nn.Module):
    """A network that `pyels train` can train; a kind of its own defines forward(x, angle, labels).

    They predict v = alpha * eps - sigma * x0, which is well scaled at both ends of the noise range, from an input
    scaled so that alpha^2 + sigma^2 = 1. The noise level enters as the angle atan2(sigma, alpha).
    """

    predicts: ClassVar[str] = "v"
    DEPTH: ClassVar[int]  # by default
    DEPTH_COUNTS: ClassVar[str]  # what depth is the number of
    LARGEST_SIZE: ClassVar[int] = 17  # of the patches that a calibration tries by default

    def __init__(self, channels: int, width: int, depth: int, num_classes: int | None, **config: Any) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None, got {num_classes}")
        sizes = {"channels": channels, "width": width, "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config: dict[str, Any] = {**sizes, "num_classes": num_classes, **config}
        self.embed_noise = nn.Linear(2 * _FREQUENCIES, EMBEDDING)
        self.embed_class = nn.Embedding(num_classes, EMBEDDING) if num_classes else None

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
        write_tensors(path, weights, metadata={HEADER: json.dumps(header)})
