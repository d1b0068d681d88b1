"""What the demo runs: a ViT-S/16-shaped stack with random weights, dense or tile-sparse.

Tokens are ordered tile by tile, so that one block of the mask is one square tile of the picture
(64 tokens = 8 x 8 patches). Nothing here is trained. Two choices make the attention of random
weights depend on the picture: patches are contrast-normalised before they are embedded, and the
query and key projections share their weights, so a query looks for patches like its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from sparseattn import BlockMask, block_sparse_attention

EMBED, HEADS, PATCH, MLP_RATIO = 384, 6, 16, 4
SHARPNESS = 3.0  # factor on the logits: random weights alone attend almost evenly
CONTRAST_WEIGHT = 0.5  # of a tile's local contrast, beside the query-key score
FLAT_PATCH = 0.05  # a patch whose deviation is below this share of the picture's counts as flat

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all keys, by torch."""
    return F.scaled_dot_product_attention(q, k, v)


def all_tiles(q: Tensor, block: int) -> BlockMask:
    """Return the mask that keeps every tile, for self-attention of q [B, H, N, D]."""
    length = q.shape[2]
    kept = torch.ones(1, 1, length // block, length // block, dtype=torch.bool, device=q.device)
    return BlockMask.from_dense(kept, length, length, (block, block))


def full_attention(block: int, impl: Literal["torch", "triton"]) -> Attend:
    """Return block-sparse attention that keeps every tile: must equal `dense_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, all_tiles(q, block), impl=impl)

    return attend


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, N, D] and the log of each query's sum of weights [B, H, N]."""
    both = block_sparse_attention(q, k, v, mask, return_lse=True)
    return both


@dataclass
class TileAttention:
    """Block-sparse attention that chooses its key tiles anew on every call.

    The score of a key tile, for one query tile and one head, is the product of the mean query and
    the mean key, standardised over the key tiles, plus `contrast_weight` times the key tile's
    local contrast. The best `keep` of a row's tiles are kept, and the query's own tile always.

    contrast  [tiles] standardised local contrast     masks  filled with each mask when a list
    """

    contrast: Tensor
    keep: float
    block: int
    contrast_weight: float = CONTRAST_WEIGHT
    score_weight: float = 1.0
    masks: list[BlockMask] | None = None

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor) -> BlockMask:
        """Return the mask of the kept tiles for q and k [B, H, N, D]."""
        mean_q = reduce(q, "b h (r t) d -> b h r d", "mean", t=self.block)
        mean_k = reduce(k, "b h (c t) d -> b h c d", "mean", t=self.block)
        scores = standardised((mean_q @ mean_k.mT).float())  # [B, H, R, C]
        scores = self.score_weight * scores + self.contrast_weight * self.contrast
        return self.from_scores(scores)

    def from_scores(self, scores: Tensor) -> BlockMask:
        """Return the mask that keeps the best tiles of `scores` [B, H, R, C]."""
        tiles = scores.shape[-1]
        own = torch.eye(tiles, dtype=torch.bool, device=scores.device)
        length, size = tiles * self.block, (self.block, self.block)
        return BlockMask.from_block_scores(scores, self.keep, length, length, size, always=own)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Choose the tiles and attend to them."""
        mask = self.select(q, k)
        if self.masks is not None:
            self.masks.append(mask)
        return block_sparse_attention(q, k, v, mask)


def standardised(values: Tensor) -> Tensor:
    """Return `values` less their mean, over their standard deviation, along the last axis."""
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def picture_tokens(picture: Tensor, block: int) -> Tensor:
    """Cut `picture` [S, S] into patches in tile order: [1, N, PATCH * PATCH]."""
    side = isqrt(block)
    return rearrange(
        picture, "(y a p) (x b q) -> 1 (y x a b) (p q)", a=side, b=side, p=PATCH, q=PATCH
    ).contiguous()


def tile_contrast(picture: Tensor, block: int) -> Tensor:
    """Return each tile's local contrast (standard deviation of its pixels), standardised."""
    pixels = PATCH * isqrt(block)
    tiles = rearrange(picture, "(y a) (x b) -> (y x) (a b)", a=pixels, b=pixels)
    return standardised(tiles.std(-1))


def to_picture_grid(values: Tensor, block: int) -> Tensor:
    """Put one value per token [N], in tile order, back on the grid of patches [G, G]."""
    side = isqrt(block)
    tiles = isqrt(values.numel() // block)
    return rearrange(values, "(y x a b) -> (y a) (x b)", y=tiles, x=tiles, a=side, b=side)


def positions(grid: int, block: int) -> Tensor:
    """Return fixed sine and cosine positions [N, EMBED] of grid x grid patches, in tile order."""
    rates = 10_000.0 ** (-torch.arange(EMBED // 4) / (EMBED // 4))
    angles = torch.arange(grid)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], -1)  # [grid, EMBED / 2]
    raster = torch.cat([axis[:, None].expand(grid, grid, -1), axis.expand(grid, grid, -1)], -1)
    side = isqrt(block)
    return rearrange(raster, "(y a) (x b) d -> (y x a b) d", a=side, b=side)


class Block(nn.Module):
    """A pre-norm transformer block whose attention is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(EMBED)
        self.qkv = nn.Linear(EMBED, 3 * EMBED)
        self.out = nn.Linear(EMBED, EMBED)
        self.norm_mlp = nn.LayerNorm(EMBED)
        self.mlp = nn.Sequential(
            nn.Linear(EMBED, MLP_RATIO * EMBED), nn.GELU(), nn.Linear(MLP_RATIO * EMBED, EMBED)
        )

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [B, HEADS, N, D] of the tokens x [B, N, EMBED]."""
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=HEADS)
        return q, k, v

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Return the tokens after attention and MLP, [B, N, EMBED]."""
        x = x + self.out(rearrange(attend(*self.heads(x)), "b h n d -> b n (h d)"))
        mixed: Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


class VitStack(nn.Module):
    """Patch embedding and `depth` blocks with random weights drawn from `seed`."""

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, EMBED)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                query, key, _ = block.qkv.weight.chunk(3)  # type: ignore[operator, union-attr]
                key.copy_(query.mul_(SHARPNESS**0.5))

    def tokens(self, patches: Tensor, where: Tensor) -> Tensor:
        """Embed `patches` [1, N, PATCH * PATCH] and add their positions `where` [N, EMBED]."""
        flat = F.layer_norm(patches, patches.shape[-1:], eps=FLAT_PATCH**2)
        embedded: Tensor = self.embed(flat) + where
        return embedded

    def forward(self, patches: Tensor, where: Tensor, attend: Attend) -> Tensor:
        """Return the tokens [1, N, EMBED] after the last block."""
        x = self.tokens(patches, where)
        for block in self.blocks:
            x = block(x, attend)
        return x
