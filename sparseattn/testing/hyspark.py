"""The convolutional encoder of HySparK, written densely, and what it means under a mask.

After *HySparK* (2024, arXiv:2408.05815): five levels of MedNeXt-like blocks, 3x3x3 convolutions
that widen the channels between them, and pools of two voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseattn.structures.patch_mask import PatchMask

CHANNELS, DEPTHS, RATIOS = (32, 64, 128, 256, 384), (1, 1, 3, 3, 1), (2, 4, 4, 4, 2)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, X, Y, Z]."""

    data_format = "channels_first"

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every site."""
        mean, centred = x.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        y = centred / torch.sqrt(variance + self.eps)
        return self.weight.view(-1, 1, 1, 1) * y + self.bias.view(-1, 1, 1, 1)


class Block(nn.Module):
    """Depthwise 3x3x3, norm, 1x1x1 to `ratio` times the channels, GELU, 1x1x1 back, residual."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
        self.norm = ChannelNorm(channels)
        self.up = nn.Conv3d(channels, channels * ratio, 1)
        self.act = nn.GELU()
        self.down = nn.Conv3d(channels * ratio, channels, 1)

    def forward(self, x: Any) -> Any:
        """Add what the branch makes of x."""
        return x + self.down(self.act(self.up(self.norm(self.spatial(x)))))


class Encoder(nn.Module):
    """The encoder: [B, 1, X, Y, Z] to one map a level, with half the voxels along each axis."""

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        depths: Sequence[int] = DEPTHS,
        ratios: Sequence[int] = RATIOS,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(Block(width, ratio) for _ in range(depth)))
            for width, depth, ratio in zip(channels, depths, ratios, strict=True)
        )
        self.widen = nn.ModuleList(
            nn.Conv3d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels)
        )
        self.pool = nn.MaxPool3d(2) if pool is None else pool

    def forward(self, x: Any) -> list[Any]:
        """Return the maps of all levels."""
        x, maps = self.stem(x), []
        for level, widen in zip(self.levels, [*self.widen, None], strict=True):
            maps.append(level(x))
            x = None if widen is None else self.pool(widen(maps[-1]))
        return maps


def mask_after_every_op(model: nn.Module, mask: PatchMask) -> list[Any]:
    """Make a dense model hide what the mask hides behind every module; return hooks to remove.

    That is how SparK and HySparK define it. Hidden is 0 here, where they multiply by 0.
    """

    def hide(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        patch = [size // cells for size, cells in zip(y.shape[2:], mask.grid, strict=True)]
        active = mask.to_dense((patch[0], patch[1], patch[2]))[:, None]
        return torch.where(active, y, 0)

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    return [leaf.register_forward_hook(hide) for leaf in leaves]


def masked_encoder(encoder: Any, images: Tensor, mask: PatchMask) -> list[Tensor]:
    """Return the maps [B, C, X, Y, Z] of a ``HySparKEncoder``, by dense operations.

    All of them are multiplied by the mask, as in the released code; the ViT sees the kept cells.
    """
    active = (mask.table >= 0)[:, None].to(images.dtype)

    def masked(x: Tensor) -> Tensor:
        return x * F.interpolate(active, size=x.shape[2:])

    def conv(layer: Any, x: Tensor) -> Tensor:
        return masked(F.conv3d(x, layer.weight, layer.bias, padding=1, groups=layer.groups))

    maps, x = [], conv(encoder.stem, masked(images))
    for i, stage in enumerate(encoder.stages):
        x = x if i == 0 else masked(F.max_pool3d(x, 2))
        for block in stage:
            y, norm = conv(block.depthwise, x).movedim(1, -1), block.norm
            y = F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias)
            x = masked(x + block.down(F.gelu(block.up(y))).movedim(-1, 1))
        if i < len(encoder.widen):
            x = conv(encoder.widen[i], x)
            maps.append(x)
    deepest = torch.zeros_like(x)
    for b in range(len(x)):  # the ViT on the kept cells of each volume by itself
        kept = (mask.table[b] >= 0).flatten()
        tokens = (x[b].flatten(1).mT + encoder.positions.to(x.dtype))[kept][None]
        found = encoder.norm(encoder.blocks(tokens))[0]
        deepest[b] = deepest[b].flatten(1).T.index_put((kept,), found).T.view_as(x[b])
    return [*maps, deepest]
