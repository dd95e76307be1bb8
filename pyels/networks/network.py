"""What a network needs to be one of pyels' own: the embedding of noise level and class, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from pyels.files import write_tensors

EMBEDDING = 128
Predicts = Literal["v", "eps", "x0", "velocity"]
HEADER = "pyels-network"  # the name in a file's metadata under which its kind, configuration and record stand
_FREQUENCIES = 16


class Network(nn.Module):
    """A network that `pyels train` can train; a kind of its own defines forward(x, angle, labels).

    The input is scaled so that alpha^2 + sigma^2 = 1, and the noise level enters as the angle atan2(sigma, alpha).

    Parameters
    ----------
    channels, width, depth, num_classes  see the kinds
    predicts    "v" = alpha * eps - sigma * x0, well scaled at both ends of the noise range, "eps", "x0", or "velocity"
                = eps - x0
    null_label  whether label `num_classes` stands for no class, as guidance asks for (see `Recipe.label_dropout`)
    config      what else a kind is made from
    """

    DEPTH: ClassVar[int]  # by default
    DEPTH_COUNTS: ClassVar[str]  # what depth is the number of
    LARGEST_SIZE: ClassVar[int] = 17  # of the patches that a calibration tries by default
    PADDED: ClassVar[bool] = True  # has convolutions that look beyond the border

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        num_classes: int | None,
        predicts: Predicts = "v",
        null_label: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        if predicts not in get_args(Predicts):
            raise ValueError(f"predicts must be one of {', '.join(get_args(Predicts))}, got {predicts!r}")
        if null_label and num_classes is None:
            raise ValueError("null_label is of networks with classes; give num_classes")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None, got {num_classes}")
        sizes = {"channels": channels, "width": width, "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        said = {"predicts": predicts, "null_label": null_label, **config}
        self.config: dict[str, Any] = {**sizes, "num_classes": num_classes, **said}
        self.predicts: str = predicts
        self.null_label = num_classes if null_label else None
        self.embed_noise = nn.Linear(2 * _FREQUENCIES, EMBEDDING)
        self.embed_class = nn.Embedding(num_classes + null_label, EMBEDDING) if num_classes else None

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
