"""Rows of one, two tensors and a bias picked by one index list: compaction, and its way back.

    out[b, h, j] = rows[b, h, index[b, s, j]]      where index >= 0
                 = fill[b, h, j], or 0             elsewhere

with s the selection of head h. Kept tokens are in one slot each, so the gradient, and the way from
slots back to tokens, are the same gather with the inverse list: no sum, no atomics.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from . import tuning


@triton.jit
def copy_rows(
    rows_ptr, fill_ptr, out_ptr, source, target, row_ok, kept, strides, fill_strides, out_strides,
    HAS_FILL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy the rows `source` to the rows `target`; where not `kept`, the fill or 0."""
    for first in tl.static_range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)[None, :]
        inside = columns < D
        taken = tl.load(
            rows_ptr + source[:, None] * strides[2] + columns,
            mask=kept[:, None] & inside,
            other=0,
        )  # [BLOCK_ROWS, BLOCK_D]
        if HAS_FILL:
            other = tl.load(
                fill_ptr + target[:, None] * fill_strides[2] + columns,
                mask=(row_ok & (kept == 0))[:, None] & inside,
                other=0,
            )
            taken = tl.where(kept[:, None], taken, other)
        place = out_ptr + target[:, None] * out_strides[2] + columns
        tl.store(place, taken, mask=row_ok[:, None] & inside)


@triton.jit(do_not_specialize=["num_heads", "group", "num_slots", "num_tiles"])
def token_gather_kernel(
    rows_ptr, more_ptr, bias_ptr, fill_ptr, index_ptr, out_ptr, more_out_ptr, bias_out_ptr,
    rows_strides, more_strides, bias_strides, fill_strides, index_strides, out_strides,
    num_heads, group, num_slots, num_tiles, pad,
    HAS_MORE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FILL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out, more_out and bias_out. One program: BLOCK_ROWS slots of one head.

    Values are moved as integers of their size, so that no bit changes.
    """
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)  # b * H + h; offsets pass 2**31
    batch, head = head_at // num_heads, head_at % num_heads
    selection = head // group
    slots = (tl.program_id(0) % num_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = slots < num_slots
    index_ptr += batch * index_strides[0] + selection * index_strides[1]
    token = tl.load(index_ptr + slots, mask=row_ok, other=-1)
    kept = token >= 0
    source, target = token.to(tl.int64), slots.to(tl.int64)
    rows_ptr += batch * rows_strides[0] + head * rows_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    fill_ptr += batch * fill_strides[0] + head * fill_strides[1]
    copy_rows(
        rows_ptr, fill_ptr, out_ptr, source, target, row_ok, kept,
        rows_strides, fill_strides, out_strides, HAS_FILL, D, BLOCK_D,
    )  # fmt: skip
    if HAS_MORE:
        more_ptr += batch * more_strides[0] + head * more_strides[1]
        more_out_ptr += batch * out_strides[0] + head * out_strides[1]
        copy_rows(
            more_ptr, fill_ptr, more_out_ptr, source, target, row_ok, kept,
            more_strides, fill_strides, out_strides, False, D, BLOCK_D,
        )  # fmt: skip
    if HAS_BIAS:
        bias_ptr += batch * bias_strides[0] + selection * bias_strides[1]
        bias = tl.load(bias_ptr + source * bias_strides[2], mask=kept, other=0.0)
        line = batch * (num_heads // group) + selection
        first_of_group = row_ok & (head % group == 0)
        tl.store(
            bias_out_ptr + line * num_slots + slots,
            tl.where(kept, bias, pad),
            mask=first_of_group,
        )


def gather(
    rows: Tensor,
    more: Tensor | None,
    bias: Tensor | None,
    fill: Tensor | None,
    index: Tensor,
    pad: float,
    out: Tensor,
    more_out: Tensor,
    bias_out: Tensor,
) -> None:
    """Fill out and more_out [B, H, K, D] and bias_out [B, S, K] from lists index [B, S, K].

    rows, more [B, H, N, D], bias float32 [B, S, N], fill like out. Outputs of what is absent are
    left alone; out and more_out have the same strides.
    """
    if out.numel() == 0:
        bias_out.fill_(pad)
        return
    index = index.contiguous()
    rows, out, more_out = _bits(rows), _bits(out), _bits(more_out)
    more_rows = rows if more is None else _bits(more)
    fill_rows = rows if fill is None else _bits(fill)
    head_dim = rows.shape[3]
    row = tuning.pick(head_dim * rows.element_size())
    num_tiles = triton.cdiv(index.shape[2], row.tile_rows)
    with torch.cuda.device_of(rows) if rows.is_cuda else nullcontext():
        token_gather_kernel[(rows.shape[0] * rows.shape[1] * num_tiles,)](
            rows, more_rows, bias_out if bias is None else bias, fill_rows,
            index, out, more_out, bias_out,
            rows.stride()[:3], more_rows.stride()[:3], (0, 0, 0) if bias is None else bias.stride(),
            fill_rows.stride()[:3], index.stride()[:2], out.stride()[:3],
            rows.shape[1], rows.shape[1] // index.shape[1], index.shape[2], num_tiles, pad,
            HAS_MORE=more is not None, HAS_BIAS=bias is not None, HAS_FILL=fill is not None,
            D=head_dim, BLOCK_D=min(tuning.WIDEST, triton.next_power_of_2(head_dim)),
            BLOCK_ROWS=row.tile_rows, num_warps=row.num_warps,
        )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor as integers, with unit column stride."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return launching.unit_stride(tensor).view(kind)
