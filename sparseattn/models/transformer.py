"""What the vision models share: patches, positions, random masks, and the pre-norm block."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sparseattn.layers.sparse_attention import SparseAttention


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); any method of ``SparseAttention``."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, method: str = "dense", **options: Any
    ) -> None:
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SparseAttention(dim, heads, batch_first=True, method=method, **options)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, dim]."""
        seen = self.attention_norm(x)
        x = x + self.attention(seen, seen, seen)[0]
        return x + self.mlp(self.mlp_norm(x))


def sincos_positions(grid: tuple[int, ...], dim: int) -> Tensor:
    """Return fixed positions [N, dim] of the cells of a grid, in raster order.

    Each axis has an equal share of the channels: sines, then cosines, of the cell's number times
    10000 ** (-i / n), i = 0 .. n - 1. Raises ValueError if dim is no multiple of 2 * axes.
    """
    axes = len(grid)
    if dim % (2 * axes):
        raise ValueError(f"sincos_positions: dim is {dim}; expected a multiple of {2 * axes}")
    count = dim // (2 * axes)
    rates = torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float64) / count)
    places = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in grid), indexing="ij")
    waves = [place.reshape(-1, 1) * rates for place in places]
    return torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], 1).float()


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, N, patch * patch * C], in raster order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def from_patches(patches: Tensor, patch: int, height: int) -> Tensor:
    """Undo ``to_patches``: images [B, C, H, W] that are `height` patches high."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=patch, q=patch, h=height)


def draw_kept(batch: int, tokens: int, kept: int, device: torch.device) -> Tensor:
    """Draw for each sample which tokens are kept: int [B, kept], ascending, from torch's generator.

    Every sample keeps the same number, and every subset is equally likely.
    """
    order = torch.rand(batch, tokens, device=device).argsort(1)
    return order[:, :kept].sort(1).values


def take(tokens: Tensor, kept: Tensor) -> Tensor:
    """Return the kept tokens [B, kept, dim] of [B, N, dim]."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))


def put_back(tokens: Tensor, kept: Tensor, count: int, token: Tensor) -> Tensor:
    """Return `count` tokens: those given at the kept places, and `token` [dim] everywhere else."""
    full = token.to(tokens.dtype).expand(tokens.shape[0], count, -1)
    return full.scatter(1, kept[..., None].expand(-1, -1, tokens.shape[2]), tokens)


def is_masked(kept: Tensor, tokens: int) -> Tensor:
    """Return which tokens are not kept, bool [B, N]."""
    shown = torch.zeros(kept.shape[0], tokens, dtype=torch.bool, device=kept.device)
    return ~shown.scatter(1, kept, True)


def normalised(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Subtract each patch's mean, and divide by its standard deviation (of count - 1)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def draw_weights(model: nn.Module) -> None:
    """Draw a transformer's weights: linear layers Glorot uniform, single tokens normal of 0.02."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            nn.init.normal_(parameter, std=0.02)
