"""What a bank of latents says of itself: which autoencoder made them of which pictures, and how they were scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_SIDE = range(1, 1 << 16)
# A network that was trained on latents keeps the same record.
SCHEMA = {"source": str, "crc32": str, "shape": [_SIDE], "shift": [float], "scale": float}


@dataclass(frozen=True)
class Latents:
    """The space that latents of an autoencoder lie in: what is stored of its z is (z - shift) * scale.

    The shift, by channel, changes no distance, and the one scale changes all alike: which of the images a query is
    likely to be is as the autoencoder has it.

    Attributes
    ----------
    source  where the autoencoder was: a folder, or FILE.py:NAME
    crc32   its checksum
    shape   (C, H, W) of the pictures that it makes of them
    shift   (c,) of every channel of the latents
    scale   of all values
    """

    source: str
    crc32: str
    shape: tuple[int, ...]
    shift: tuple[float, ...]
    scale: float

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or not self.shift or not self.scale > 0:
            raise ValueError(f"latents are of pictures (C, H, W), and scaled by a number > 0, got {self.record()}")

    def scaled(self, z: Tensor) -> Tensor:
        """What is stored of latents (B, c, h, w) as the autoencoder gives them."""
        return (z - self._column(z)) * self.scale

    def unscaled(self, stored: Tensor) -> Tensor:
        return stored / self.scale + self._column(stored)

    def _column(self, like: Tensor) -> Tensor:
        return torch.tensor(self.shift, dtype=like.dtype, device=like.device)[:, None, None]

    def is_space_of(self, other: Latents | None) -> bool:
        """Whether the latents of the other are of this autoencoder and scale, wherever it was."""
        return other is not None and all(getattr(self, n) == getattr(other, n) for n in ("crc32", "shift", "scale"))

    def __str__(self) -> str:
        return f"latents of {self.source} (checksum {self.crc32}, scale {self.scale:.4g})"

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "shift": list(self.shift)}

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Latents | None:
        """What gave a record, as SCHEMA has it."""
        if record is None:
            return None
        one = {name: record[name] for name in SCHEMA}
        return cls(**{**one, "shape": tuple(one["shape"]), "shift": tuple(one["shift"])})
