"""One score for each pair of blocks, from pooled queries and keys, with exact gradients."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def block_scores(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    block_size: tuple[int, int],
    pooling: str,
    scale: float,
    impl: str,
) -> Tensor:
    """Return scale * pooled q . pooled k, [B, H, R, C], float32, or float64 for float64 inputs.

    weights: of the queries and of the keys, >= 0, [B, N], in the dtype of the scores. pooling:
    "mean" or "max". impl: "triton" or "torch".
    """
    pool = _BlockPool.apply if impl == "triton" else pool_blocks
    pooled_q, pooled_k = (
        pool(x, w, block, pooling) for x, w, block in zip((q, k), weights, block_size, strict=True)
    )
    batch, heads, rows, _ = pooled_q.shape
    key_heads = pooled_k.shape[1]
    if key_heads == 0:
        return pooled_q.new_zeros((batch, 0, rows, pooled_k.shape[2]))
    grouped = pooled_q.view(batch, key_heads, heads // key_heads * rows, q.shape[3])
    with _full_precision(q.device.type):
        scores = (grouped @ pooled_k.mT) * scale
    return scores.view(batch, heads, rows, pooled_k.shape[2])


def pool_blocks(x: Tensor, weights: Tensor | None, block: int, kind: str) -> Tensor:
    """Return the "mean" or "max" of each block of x [B, H, N, D]: [B, H, ceil(N / block), D].

    weights: [B, N], >= 0; a token of weight 0 is never used, be it NaN. A block without weight
    gives 0. The result is float32, or float64 for float64 x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = x.shape[2]
    spare = -length % block
    if weights is None and kind == "mean":
        starts = torch.arange(0, length, block, device=x.device)
        sizes = (length - starts).clamp(max=block).to(wide)
        return _blocks(x, spare, block).sum(3, dtype=wide) / sizes[:, None]
    if weights is None:
        weights = x.new_ones((1, length), dtype=wide)
    part = _blocks(weights[:, None, :, None], spare, block)  # [B or 1, 1, L, block, 1]
    used, total = part > 0, part.sum(3)
    values = _blocks(x, spare, block)
    if kind == "max":
        values = values.masked_fill(~used, -math.inf).max(3).values
        return values.to(wide).masked_fill(total == 0, 0)
    sums = (values.masked_fill(~used, 0) * part).sum(3)
    return sums / torch.where(total > 0, total, 1)


def has_weight(weights: Tensor, block: int) -> Tensor:
    """Return which blocks hold a token of some weight, bool [B, L], for weights [B, N]."""
    tokens = weights[:, None, :, None] > 0
    return _blocks(tokens, -weights.shape[1] % block, block).any(3)[:, 0, :, 0]


def _blocks(x: Tensor, spare: int, block: int) -> Tensor:
    """Split dim 2 into blocks; the last is filled up with zeros."""
    # while tracing the branch would be a guard on the length: a compile for each of both
    if torch.compiler.is_compiling() or spare:
        x = torch.nn.functional.pad(x, (0, 0, 0, spare))
    return x.unflatten(2, (-1, block))


def _full_precision(device: str) -> Any:
    """Leave autocast, if it is on: a score of 16 bits would make ties."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


class _BlockPool(torch.autograd.Function):
    """`pool_blocks` by kernels; weights get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, block: int, kind: str) -> Tensor:
        pooled = torch.ops.sparseattn.block_pool.default(x, weights, block, kind)
        ctx.save_for_backward(x, weights, pooled)
        ctx.options = (block, kind)
        return pooled

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor, None, None, None]:
        # not differentiated again: pooled values reach a loss through block_sparse_attention alone,
        # which refuses a second derivative
        with torch.no_grad():
            dx = torch.ops.sparseattn.block_pool_backward.default(
                dpooled, *ctx.saved_tensors, *ctx.options
            )
        return dx, None, None, None


_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "block_pool(Tensor x, Tensor? weights, int block, str kind) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "block_pool_backward(Tensor dpooled, Tensor x, Tensor? weights, Tensor pooled, int block, "
    "str kind) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _pool(x: Tensor, weights: Tensor | None, block: int, kind: str) -> Tensor:
    from sparseattn.kernels.block_select import pool

    return pool.pool(x, weights, block, kind)


def _pool_backward(
    dpooled: Tensor, x: Tensor, weights: Tensor | None, pooled: Tensor, block: int, kind: str
) -> Tensor:
    from sparseattn.kernels.block_select import pool

    return pool.pool_backward(dpooled, x, weights, pooled, block, kind)


def _pool_fake(x: Tensor, weights: Tensor | None, block: int, kind: str) -> Tensor:
    batch, heads, length, head_dim = x.shape
    return x.new_empty((batch, heads, -(-length // block), head_dim), dtype=torch.float32)


def _pool_backward_fake(dpooled: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


for _device in ("CPU", "CUDA"):
    _library.impl("block_pool", _pool, _device)
    _library.impl("block_pool_backward", _pool_backward, _device)
torch.library.register_fake("sparseattn::block_pool", _pool_fake, lib=_library)
torch.library.register_fake("sparseattn::block_pool_backward", _pool_backward_fake, lib=_library)
