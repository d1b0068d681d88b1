"""The highest block scores of every row, without a sort: serves every top-k mask.

A row has scores s_c, whole weights w_c >= 0 and a budget b. Kept is the shortest head of the list
of its blocks, ordered by falling score (equal scores by rising index), whose weights sum to b or
more; with w = 1 these are the b highest. Scores of -inf and NaN are never kept.

    key(s)   = the bits of the float as an integer that orders as the floats do
    bar      = the largest integer with sum of w_c over key(s_c) >= bar at least b, else the lowest
    kept_c   = key(s_c) > bar, or key(s_c) = bar and the weights of equal blocks before c leave room

The bar is found bit by bit, in 32 sums over the row. The sums are whole numbers, so every order of
adding gives the same set.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from . import tuning


@triton.jit
def ordered_keys(scores):
    """Return int32 that order as the floats do; -0.0 is 0.0, and NaN is -inf."""
    scores = tl.where(scores == scores, scores, float("-inf"))
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_row(scores, weights, ids, id_ok, strides, HAS_WEIGHTS: tl.constexpr):
    """Return keys and weights [CHUNK] of a part of a row; a block that may not be kept weighs 0."""
    values = tl.load(scores + ids.to(tl.int64) * strides[3], mask=id_ok, other=float("-inf"))
    may = (values > float("-inf")) & (values == values)
    if HAS_WEIGHTS:
        weight = tl.where(may, tl.load(weights + ids, mask=id_ok, other=0), 0)
    else:
        weight = may.to(tl.int32)
    return ordered_keys(values), weight, may


@triton.jit
def keep_part(
    kept_ptr, always, ids, id_ok, always_strides, keys, weight, may, bar, room, before,
    HAS_ALWAYS: tl.constexpr,
):  # fmt: skip
    """Write which blocks of a part of a row are kept; return the weight of its equal blocks."""
    level = tl.where(may & (keys == bar), weight, 0)
    fits = tl.cumsum(level, 0) - level + before < room
    kept = may & ((keys > bar) | ((keys == bar) & fits))
    if HAS_ALWAYS:
        forced = tl.load(always + ids.to(tl.int64) * always_strides[3], mask=id_ok, other=0)
        kept = kept | (forced != 0)
    tl.store(kept_ptr + ids, kept.to(tl.uint8), mask=id_ok)
    return tl.sum(level, 0)


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_ids", "budget"])
def block_select_kernel(
    scores_ptr, weights_ptr, budgets_ptr, always_ptr, kept_ptr,
    scores_strides, budgets_strides, always_strides, num_heads, num_rows, num_ids, budget,
    HAS_WEIGHTS: tl.constexpr, HAS_BUDGETS: tl.constexpr, HAS_ALWAYS: tl.constexpr,
    IS_SHORT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Mark the blocks that a row keeps. One program: one row of one head.

    IS_SHORT: the row fits one chunk and is read once; else every sum walks over it in chunks.
    """
    line = tl.program_id(0).to(tl.int64)
    row = line % num_rows
    head = (line // num_rows) % num_heads
    batch = line // num_rows // num_heads
    scores = scores_ptr + batch * scores_strides[0] + head * scores_strides[1]
    scores += row * scores_strides[2]
    always = always_ptr + batch * always_strides[0] + head * always_strides[1]
    always += row * always_strides[2]
    weights = weights_ptr + line * num_ids
    kept_ptr += line * num_ids
    if HAS_BUDGETS:
        budgets_ptr += batch * budgets_strides[0] + head * budgets_strides[1]
        budget = tl.load(budgets_ptr + row * budgets_strides[2])

    ids = tl.arange(0, CHUNK)
    one = tl.full([], 1, tl.int32)
    bar = one << 31  # the lowest integer; from the sign down, a bit is flipped where that pays
    above = one - one  # the weight above the bar
    if IS_SHORT:
        id_ok = ids < num_ids
        keys, weight, may = load_row(scores, weights, ids, id_ok, scores_strides, HAS_WEIGHTS)
        for bit in range(32):
            tried = bar ^ (one << (31 - bit))
            if tl.sum(tl.where(keys >= tried, weight, 0), 0) >= budget:
                bar = tried
        above = tl.sum(tl.where(keys > bar, weight, 0), 0)
        keep_part(
            kept_ptr, always, ids, id_ok, always_strides, keys, weight, may, bar, budget - above,
            0, HAS_ALWAYS,
        )  # fmt: skip
    else:
        for bit in range(32):
            tried = bar ^ (one << (31 - bit))
            total = one - one
            for start in range(0, num_ids, CHUNK):
                id_ok = start + ids < num_ids
                keys, weight, may = load_row(
                    scores, weights, start + ids, id_ok, scores_strides, HAS_WEIGHTS
                )
                total += tl.sum(tl.where(keys >= tried, weight, 0), 0)
            if total >= budget:
                bar = tried
        for start in range(0, num_ids, CHUNK):
            id_ok = start + ids < num_ids
            keys, weight, may = load_row(
                scores, weights, start + ids, id_ok, scores_strides, HAS_WEIGHTS
            )
            above += tl.sum(tl.where(keys > bar, weight, 0), 0)
        before = one - one  # the weight of equal blocks in the chunks before
        for start in range(0, num_ids, CHUNK):
            id_ok = start + ids < num_ids
            keys, weight, may = load_row(
                scores, weights, start + ids, id_ok, scores_strides, HAS_WEIGHTS
            )
            before += keep_part(
                kept_ptr, always, start + ids, id_ok, always_strides, keys, weight, may, bar,
                budget - above, before, HAS_ALWAYS,
            )  # fmt: skip


def select(
    scores: Tensor,
    budget: int,
    budgets: Tensor | None = None,
    weights: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Return which blocks are kept, bool [B, H, R, C], contiguous.

    scores: float32 [B, H, R, C], any strides. budget: of every row, at most C; or budgets: int32,
    one a row, [B or 1, H or 1, R]. weights: int32 like scores, >= 0, a row's sum below 2**31;
    default 1. always: bool [B or 1, H or 1, R or 1, C or 1], kept besides.
    """
    batch, heads, num_rows, num_ids = scores.shape
    kept = scores.new_empty(scores.shape, dtype=torch.uint8)
    if kept.numel() == 0:
        return kept.view(torch.bool)
    blank = scores.new_zeros((1, 1, 1, 1), dtype=torch.int32)
    octets = (blank if always is None else always).view(torch.uint8)
    per_row = blank[0] if budgets is None else budgets
    row = tuning.pick_select(num_ids)
    with torch.cuda.device_of(scores):
        block_select_kernel[(batch * heads * num_rows,)](
            scores, blank if weights is None else weights.contiguous(), per_row, octets, kept,
            scores.stride(), launching.shared_strides(per_row, 3),
            launching.shared_strides(octets, 4), heads, num_rows, num_ids, budget,
            HAS_WEIGHTS=weights is not None, HAS_BUDGETS=budgets is not None,
            HAS_ALWAYS=always is not None, IS_SHORT=num_ids <= row.chunk, CHUNK=row.chunk,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return kept.view(torch.bool)
