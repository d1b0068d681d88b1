"""Means over segments of tokens, and their way back.

mean_r = sum_{i in segment r} q_i / count_r,        dq_i += dmean_r / count_r
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from ..tiles import in_elements
from . import tuning
from .call import raised


@triton.jit(do_not_specialize=["num_heads", "num_segments"])
def segment_means_fwd_kernel(
    q_ptr, ids_ptr, starts_ptr, order_ptr, means_ptr, q_strides, ids_stride, starts_stride,
    num_heads, num_segments,
    STEP: tl.constexpr, HAS_ORDER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean_r [B, H, m, D], float32; 0 without tokens.

    One program: one segment of one head.
    """
    row = tl.program_id(0).to(tl.int64)
    segment, head = row % num_segments, row // num_segments % num_heads
    batch = row // num_segments // num_heads
    starts_ptr += batch * starts_stride + segment
    first, last = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    q_strides = in_elements(q_strides, STEP)
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    count = 0.0
    for at in range(first, last, BLOCK_N):
        tokens = at + tl.arange(0, BLOCK_N)
        is_member = tokens < last
        if HAS_ORDER:
            tokens = tl.load(order_ptr + tokens, mask=is_member, other=0)
        ids = tl.load(ids_ptr + batch * ids_stride + tokens, mask=is_member, other=-1)
        is_member = ids == segment
        ptrs = q_ptr + batch * q_strides[0] + head * q_strides[1]
        ptrs += tokens.to(tl.int64)[:, None] * q_strides[2] + columns[None, :]
        kept = is_member[:, None] & (columns < D)[None, :]
        acc += tl.sum(tl.load(ptrs, mask=kept, other=0.0).to(tl.float32), 0)
        count += tl.sum(is_member.to(tl.float32), 0)
    tl.store(means_ptr + row * D + columns, acc / tl.maximum(count, 1.0), mask=columns < D)


@triton.jit(do_not_specialize=["num_heads", "num_segments", "length", "num_tiles"])
def segment_means_bwd_kernel(
    dq_ptr, ids_ptr, dmeans_ptr, out_ptr, dq_strides, out_strides, ids_stride,
    num_heads, num_segments, length, num_tiles,
    STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_i = dq_i + dmeans_r of the segment r of i, which is divided by its count already.

    One program: BLOCK_N tokens of one head.
    """
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    tokens = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = tokens < length
    ids = tl.load(ids_ptr + batch * ids_stride + tokens, mask=in_range, other=-1)
    columns = tl.arange(0, BLOCK_D)[None, :]
    kept = in_range[:, None] & (columns < D)
    rows = tokens.to(tl.int64)[:, None]
    dq_strides, out_strides = in_elements(dq_strides, STEP), in_elements(out_strides, STEP)
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1]
    dq = tl.load(dq_ptr + rows * dq_strides[2] + columns, mask=kept, other=0.0).to(tl.float32)
    at = (head_at * num_segments + ids)[:, None] * D + columns
    dq += tl.load(dmeans_ptr + at, mask=kept & (ids >= 0)[:, None], other=0.0)
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    out_ptr += rows * out_strides[2] + columns
    tl.store(out_ptr, dq.to(out_ptr.dtype.element_ty), mask=kept)


def forward(q: Tensor, ids: Tensor, starts: Tensor, order: Tensor | None) -> Tensor:
    """Return the means [B, H, m, D] of q [B, H, N, D], float32."""
    shape = (q.shape[0], q.shape[1], starts.shape[1] - 1, q.shape[3])
    means = q.new_empty(shape, dtype=torch.float32)
    if means.numel() == 0:
        return means
    q, ids, starts = raised(q), launching.unit_stride(ids), launching.unit_stride(starts)
    step, strides = launching.in_steps(q)
    with torch.cuda.device_of(q) if q.is_cuda else nullcontext():
        segment_means_fwd_kernel[(shape[0] * shape[1] * shape[2],)](
            q, ids, starts, starts if order is None else order, means,
            *strides, *_batch_strides(ids, starts), shape[1], shape[2],
            STEP=step, HAS_ORDER=order is not None,
            D=shape[3], BLOCK_D=triton.next_power_of_2(shape[3]), BLOCK_N=tuning.SEGMENT_TOKENS,
        )  # fmt: skip
    return means


def backward(dq: Tensor, dmeans: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return dq [B, H, N, D] with the gradient through the means added."""
    out = torch.empty_like(dq)
    if out.numel() == 0:
        return out
    dmeans = (dmeans / counts.clamp(min=1)[:, None, :, None]).contiguous()
    dq, ids = raised(dq), launching.unit_stride(ids)
    num_tiles = triton.cdiv(dq.shape[2], tuning.SEGMENT_TOKENS)
    step, strides = launching.in_steps(dq, out)
    with torch.cuda.device_of(dq) if dq.is_cuda else nullcontext():
        segment_means_bwd_kernel[(dq.shape[0] * dq.shape[1] * num_tiles,)](
            dq, ids, dmeans, out, *strides, *_batch_strides(ids),
            dq.shape[1], dmeans.shape[2], dq.shape[2], num_tiles,
            STEP=step, D=dq.shape[3], BLOCK_D=triton.next_power_of_2(dq.shape[3]),
            BLOCK_N=tuning.SEGMENT_TOKENS,
        )  # fmt: skip
    return out


def _batch_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of samples, 0 where one serves all."""
    return tuple(launching.shared_strides(tensor, 1)[0] for tensor in tensors)
