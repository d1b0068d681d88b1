"""One vector for each block of tokens, and its gradient: serves block scores.

With weights w_i >= 0 of the tokens i of block L, W = Σ w_i (w = 1 where none are given):

    mean:  p_L = Σ w_i x_i / W            dx_i = w_i / W · dp_L
    max:   p_Ld = max_{i: w_i > 0} x_id   dx_id = dp_Ld at the first i that reaches it, else 0

A token of weight 0 is never used, be it NaN; a block without weight has p = 0 and gives no
gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from . import tuning


@triton.jit
def token_weights(weights_ptr, tokens, length, HAS_WEIGHTS: tl.constexpr):
    """Return the weights of tokens, float32; 0 past the end."""
    if HAS_WEIGHTS:
        return tl.load(weights_ptr + tokens, mask=tokens < length, other=0.0)
    return (tokens < length).to(tl.float32)


@triton.jit(do_not_specialize=["weights_stride", "num_heads", "num_blocks", "length"])
def block_pool_fwd_kernel(
    x_ptr, weights_ptr, pooled_ptr, x_strides, weights_stride, num_heads, num_blocks, length,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    IS_MAX: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Pool the tokens of a block. One program: one block of one head."""
    line = tl.program_id(0).to(tl.int64)
    block = line % num_blocks
    head = (line // num_blocks) % num_heads
    batch = line // num_blocks // num_heads
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    weights_ptr += batch * weights_stride
    columns = tl.arange(0, COLUMNS)
    pooled = tl.full([COLUMNS], float("-inf") if IS_MAX else 0.0, tl.float32)
    total = tl.sum(tl.zeros([TILE], tl.float32), 0)
    for start in range(0, BLOCK, TILE):
        tokens = block * BLOCK + start + tl.arange(0, TILE)
        weight = token_weights(weights_ptr, tokens, length, HAS_WEIGHTS)
        used = (weight > 0)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_strides[2] + columns[None, :], mask=used, other=0.0)
        x = x.to(tl.float32)  # [TILE, COLUMNS]
        if IS_MAX:
            pooled = tl.maximum(pooled, tl.max(tl.where(used, x, float("-inf")), 0))
        else:
            pooled += tl.sum(x * weight[:, None], 0)
        total += tl.sum(weight, 0)
    if IS_MAX:
        pooled = tl.where(total > 0, pooled, 0.0)
    else:
        pooled = pooled / tl.where(total > 0, total, 1.0)
    tl.store(pooled_ptr + line * D + columns, pooled, mask=columns < D)


@triton.jit(do_not_specialize=["weights_stride", "num_heads", "num_blocks", "length"])
def block_pool_bwd_kernel(
    dpooled_ptr, x_ptr, weights_ptr, pooled_ptr, dx_ptr, x_strides, weights_stride, dx_strides,
    num_heads, num_blocks, length,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    IS_MAX: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Give a block's gradient to its tokens. One program: one block of one head."""
    line = tl.program_id(0).to(tl.int64)
    block = line % num_blocks
    head = (line // num_blocks) % num_heads
    batch = line // num_blocks // num_heads
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    dx_ptr += batch * dx_strides[0] + head * dx_strides[1]
    weights_ptr += batch * weights_stride
    columns = tl.arange(0, COLUMNS)
    dpooled = tl.load(dpooled_ptr + line * D + columns, mask=columns < D, other=0.0)
    total = tl.sum(tl.zeros([TILE], tl.float32), 0)
    if IS_MAX:
        pooled = tl.load(pooled_ptr + line * D + columns, mask=columns < D, other=0.0)
        open_columns = tl.full([COLUMNS], 1, tl.int32)  # whose largest has not been met
    else:
        for start in range(0, BLOCK, TILE):
            tokens = block * BLOCK + start + tl.arange(0, TILE)
            total += tl.sum(token_weights(weights_ptr, tokens, length, HAS_WEIGHTS), 0)
        dpooled = dpooled / tl.where(total > 0, total, 1.0)
    for start in range(0, BLOCK, TILE):
        tokens = block * BLOCK + start + tl.arange(0, TILE)
        weight = token_weights(weights_ptr, tokens, length, HAS_WEIGHTS)
        used = (weight > 0)[:, None] & (columns < D)[None, :]
        if IS_MAX:
            at = tokens[:, None] * x_strides[2] + columns[None, :]
            x = tl.load(x_ptr + at, mask=used, other=0.0).to(tl.float32)
            hit = (used & (x == pooled[None, :])).to(tl.int32)  # [TILE, COLUMNS]
            first = (hit != 0) & (tl.cumsum(hit, 0) == 1) & (open_columns != 0)[None, :]
            dx = tl.where(first, dpooled[None, :], 0.0)
            open_columns = tl.where(tl.max(hit, 0) != 0, 0, open_columns)
        else:
            dx = tl.where(used, dpooled[None, :] * weight[:, None], 0.0)
        target = dx_ptr + tokens[:, None] * dx_strides[2] + columns[None, :]
        inside = (tokens < length)[:, None] & (columns < D)[None, :]
        tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def pool(x: Tensor, weights: Tensor | None, block: int, kind: str) -> Tensor:
    """Return float32 [B, H, ceil(N / block), D]: the "mean" or "max" of each block of x.

    x: [B, H, N, D], float32, float16 or bfloat16. weights: float32 [B, N], >= 0.
    """
    launch = _launch(x, weights, block, kind)
    x, weights = _prepare(x, weights)
    shape = (*x.shape[:2], triton.cdiv(x.shape[2], block), x.shape[3])
    pooled = x.new_empty(shape, dtype=torch.float32)
    if pooled.numel() == 0:
        return pooled
    with torch.cuda.device_of(x):
        block_pool_fwd_kernel[(shape[0] * shape[1] * shape[2],)](
            x, weights, pooled, x.stride()[:3], weights.stride(0),
            *shape[1:3], x.shape[2], **launch,
        )  # fmt: skip
    return pooled


def pool_backward(
    dpooled: Tensor, x: Tensor, weights: Tensor | None, pooled: Tensor, block: int, kind: str
) -> Tensor:
    """Return dx, dtype and layout of x; pooled is what `pool` returned."""
    dx = torch.empty_like(x)
    launch = _launch(x, weights, block, kind)
    x, weights = _prepare(x, weights)
    if pooled.numel() == 0:
        return dx
    target = dx if dx.dtype == x.dtype and dx.stride(-1) == 1 else torch.empty_like(x)
    with torch.cuda.device_of(x):
        block_pool_bwd_kernel[(pooled.shape[0] * pooled.shape[1] * pooled.shape[2],)](
            dpooled.contiguous(), x, weights, pooled, target,
            x.stride()[:3], weights.stride(0), target.stride()[:3],
            *pooled.shape[1:3], x.shape[2], **launch,
        )  # fmt: skip
    return dx if target is dx else dx.copy_(target)


def _prepare(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring both to unit column stride; absent weights are stood in for by a small tensor."""
    x = launching.unit_stride(launching.raise_bfloat16(x, bool(triton.knobs.runtime.interpret)))
    if weights is None:
        return x, x.new_zeros((1, 1), dtype=torch.float32)
    return x, launching.unit_stride(weights)


def _launch(x: Tensor, weights: Tensor | None, block: int, kind: str) -> dict[str, int | bool]:
    row = tuning.pick_pool(x.shape[3])
    return {
        "D": x.shape[3],
        "COLUMNS": triton.next_power_of_2(x.shape[3]),
        "BLOCK": block,
        "TILE": launching.fit_tile(row.tile, block),
        "IS_MAX": kind == "max",
        "HAS_WEIGHTS": weights is not None,
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
    }
