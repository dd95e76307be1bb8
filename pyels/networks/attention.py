"""Networks whose pixels see the whole image: a UNet with self-attention, and a small diffusion transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyels.networks.convolutional import UNet
from pyels.networks.network import EMBEDDING, Network

_HEAD = 32  # channels of an attention head, where they divide the width


class _Attention(nn.Module):
    """Self-attention between tokens (B, n, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = math.gcd(width, max(1, width // _HEAD))
        self.ask, self.answer = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.ask(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.answer(seen.transpose(1, 2).flatten(2))
        return out


class _ImageAttention(nn.Module):
    """Self-attention between the pixels of an image (B, width, H, W), added to it; at first it adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), _Attention(width)
        nn.init.zeros_(self.attention.answer.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        seen = self.attention(self.norm(h.flatten(2).transpose(1, 2)))
        out: Tensor = h + seen.transpose(1, 2).unflatten(2, h.shape[2:])
        return out


class UNetAttention(UNet):
    """`UNet` with self-attention after every block of its two coarser scales. Parameters as there."""

    def after(self, width: int, coarser: bool) -> list[nn.Module]:
        return [_ImageAttention(width)] if coarser else []


class _TransformerBlock(nn.Module):
    """Attention and two layers, each normalised, scaled and shifted as the embedding says (adaLN-zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = _Attention(width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.embed = nn.Linear(EMBEDDING, 6 * width)
        nn.init.zeros_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, *second = self.embed(embedding)[:, None].chunk(6, dim=2)
        tokens = tokens + gate * self.attention(self.norm(tokens) * (1 + scale) + shift)
        shift, scale, gate = second
        out: Tensor = tokens + gate * self.layers(self.norm(tokens) * (1 + scale) + shift)
        return out


class DiT(Network):
    """A diffusion transformer (Peebles & Xie, arXiv 2212.09748): squares of `patch` pixels are the tokens, places are
    told by sines and cosines, noise level and class by adaLN-zero. Images may be of any size that `patch` divides.

    Parameters
    ----------
    channels     image channels C
    width        of a token, a multiple of 4
    depth        blocks of attention and two layers
    num_classes  number of classes of a class-conditional network, or None
    patch        side of a token's square
    common       predicts and null_label, see `Network`
    """

    DEPTH, DEPTH_COUNTS = 6, "blocks"
    LARGEST_SIZE = 27
    PADDED = False

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = DEPTH,
        num_classes: int | None = None,
        patch: int = 2,
        **common: Any,
    ) -> None:
        if patch < 1:
            raise ValueError(f"patch must be at least 1, got {patch}")
        if width % 4:
            raise ValueError(f"width must be a multiple of 4 for a DiT, got {width}")
        super().__init__(channels, width, depth, num_classes, **common, patch=patch)
        self.patch = patch
        self.tokens = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(_TransformerBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.embed, self.pixels = nn.Linear(EMBEDDING, 2 * width), nn.Linear(width, channels * patch**2)
        for layer in (self.embed, self.pixels):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, angle: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, shaped as x (B, C, H, W), at angle (B,) in (0, pi/2], with labels (B,) if conditional."""
        height, width = x.shape[2:]
        side = self.patch
        if height % side or width % side:
            raise ValueError(
                f"images of {height}x{width} pixels are not made of the transformer's squares of {side}x{side} pixels; "
                "resize them"
            )
        embedding = self.embedding(angle, labels)
        tokens = self.tokens(nn.functional.pixel_unshuffle(x, side).flatten(2).transpose(1, 2))
        tokens = tokens + _places(height // side, width // side, tokens)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        shift, scale = self.embed(embedding)[:, None].chunk(2, dim=2)
        out = self.pixels(self.norm(tokens) * (1 + scale) + shift).transpose(1, 2)
        return nn.functional.pixel_shuffle(out.unflatten(2, (height // side, width // side)), side)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of a token's row and column, (height * width, its width)."""
    quarter = like.shape[2] // 4
    rates = 10_000.0 ** (-torch.arange(quarter, device=like.device) / quarter)

    def waves(count: int) -> Tensor:
        phases = torch.arange(count, device=like.device)[:, None] * rates
        return torch.cat([phases.sin(), phases.cos()], dim=1)

    rows, columns = waves(height)[:, None], waves(width)[None, :]
    both = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
    return both.flatten(0, 1).to(like.dtype)
