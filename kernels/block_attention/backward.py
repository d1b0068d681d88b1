"""Backward of block_sparse_attention, in two passes that recompute p from lse.

    p_ij  = exp(scale * q_i.k_j + bias_j + gate_RC - lse_i)
    ds_ij = p_ij (do_i.v_j - delta_i),      delta_i = do_i.o_i - dlse_i
    dv_j  = sum_i p_ij do_i                 dk_j = scale * sum_i ds_ij q_i      over column lists
    dq_i  = scale * sum_j ds_ij k_j                                             over row lists
    dbias_j = sum_i ds_ij                   dgate_RC = sum_{i in R, j in C} ds_ij

Every sum has one owner and a fixed order: no atomics, equal bits on every launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from ..tiles import in_elements
from . import tuning
from .backward_dkv import block_attention_bwd_dkv_kernel
from .backward_dq import block_attention_bwd_dq_kernel
from .call import Call


@triton.jit(do_not_specialize=["num_heads", "q_len", "num_tiles"])
def block_attention_bwd_delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, o_strides, do_strides,
    num_heads, q_len, num_tiles,
    STEP: tl.constexpr, HAS_DLSE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta_i = do_i.o_i - dlse_i, 0 where nothing is seen. One program: BLOCK_Q queries."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    queries = (tl.program_id(0) % num_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_ok = queries < q_len
    columns = tl.arange(0, BLOCK_D)[None, :]
    kept = query_ok[:, None] & (columns < D)
    at = queries[:, None].to(tl.int64)
    o_strides, do_strides = in_elements(o_strides, STEP), in_elements(do_strides, STEP)
    o_ptr += batch * o_strides[0] + head * o_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    o = tl.load(o_ptr + at * o_strides[2] + columns, mask=kept, other=0.0)
    do = tl.load(do_ptr + at * do_strides[2] + columns, mask=kept, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + head_at * q_len + queries, mask=query_ok, other=0.0)
    lse = tl.load(lse_ptr + head_at * q_len + queries, mask=query_ok, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + head_at * q_len + queries, delta, mask=query_ok)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    block_gate: Tensor | None,
    rows: launching.IndexLists,
    columns: launching.IndexLists,
    token_bits: Tensor | None,
    block_size: tuple[int, int],
    scale: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv like q, k, v, and float32 dbias and dgate where `needs` says so."""
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call = Call.prepare(q, k, v, key_bias, block_gate, rows, token_bits, block_size, scale)
    if q.numel() == 0 or k.numel() == 0:
        dbias = torch.zeros_like(key_bias) if key_bias is not None and needs[0] else None
        dgate = torch.zeros_like(block_gate) if block_gate is not None and needs[1] else None
        for gradient in gradients:
            gradient.zero_()
        return *gradients, dbias, dgate
    with call.device:
        delta, dout = _delta(call, dout, dlse, out, lse)
        dbias = _launch_dkv(call, columns, dout, lse, delta, *gradients[1:], scale, needs[0])
        dgate = _launch_dq(call, dout, lse, delta, gradients[0], scale, needs[1])
    if dbias is not None and key_bias is not None and key_bias.shape[1] == 1:
        dbias = dbias.sum(1, keepdim=True)
    if dgate is not None and block_gate is not None and block_gate.shape[1] == 1:
        dgate = dgate.sum(1, keepdim=True)
    return *gradients, dbias, dgate


def _delta(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    interpreting = bool(triton.knobs.runtime.interpret)
    dout, out = (
        launching.unit_stride(launching.raise_bfloat16(t, interpreting)) for t in (dout, out)
    )
    batch, heads, q_len, head_dim = out.shape
    delta = torch.empty_like(lse)
    num_tiles = triton.cdiv(q_len, tuning.DELTA_ROWS)
    step, strides = launching.in_steps(out, dout)
    block_attention_bwd_delta_kernel[(batch * heads * num_tiles,)](
        out, dout, lse, lse if dlse is None else dlse.contiguous(), delta,
        *strides, heads, q_len, num_tiles,
        STEP=step, HAS_DLSE=dlse is not None, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_Q=tuning.DELTA_ROWS,
    )  # fmt: skip
    return delta, dout


def _launch_dkv(
    call: Call, columns: launching.IndexLists, dout: Tensor, lse: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, scale: float, needs_bias: bool,
) -> Tensor | None:  # fmt: skip
    q, k, v, *others = call.tensors
    # a query that sees nothing may hold NaN, and only partial blocks and gates have such
    plain = not call.flags["HAS_PARTIAL"] and not call.flags["HAS_GATE"]
    launch, options = call.pick(tuning.BACKWARD_DKV, q, dout, may_describe=plain)
    q_source, do_source = call.sources(launch.tile_q, options, q, dout)
    num_tiles = triton.cdiv(k.shape[2], launch.tile_k)
    dbias = lse.new_empty((*q.shape[:2], k.shape[2])) if needs_bias else lse
    step, strides = launching.in_steps(q, k, v, dout, dk, dv)
    block_attention_bwd_dkv_kernel[(k.shape[0] * k.shape[1] * num_tiles,)](
        q_source, k, v, *others, do_source, lse, delta, *call.filled(columns), call.bits,
        dk, dv, dbias,
        *strides, *call.extra_strides,
        q.shape[1], q.shape[2], k.shape[2], call.num_columns, num_tiles, call.num_rows,
        *call.mask_steps, *call.capacities(columns), scale,
        STEP=step, NEEDS_BIAS=needs_bias, **call.backward_flags, **options,
    )  # fmt: skip
    return dbias if needs_bias else None


def _launch_dq(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, scale: float,
    needs_gate: bool,
) -> Tensor | None:  # fmt: skip
    q, k, v, *extras = call.tensors
    launch, options = call.pick(tuning.BACKWARD_DQ, k, v)
    k_source, v_source = call.sources(launch.tile_k, options, k, v)
    num_tiles = triton.cdiv(q.shape[2], launch.tile_q)
    step, strides = launching.in_steps(q, k, v, dout, dq)
    shares = lse
    if needs_gate:
        shares = lse.new_zeros((*q.shape[:2], num_tiles, call.num_columns))
    block_attention_bwd_dq_kernel[(q.shape[0] * q.shape[1] * num_tiles,)](
        q, k_source, v_source, *extras, dout, lse, delta, *call.row_lists, call.bits, dq, shares,
        *strides, *call.extra_strides,
        q.shape[1], q.shape[2], k.shape[2], call.num_rows, num_tiles, call.num_columns,
        *call.mask_steps, *call.row_capacities, scale,
        STEP=step, NEEDS_GATE=needs_gate, **call.backward_flags, **options,
    )  # fmt: skip
    if not needs_gate:
        return None
    per_block = call.block_size[0] // launch.tile_q
    spare = call.num_rows * per_block - num_tiles
    shares = torch.nn.functional.pad(shares, (0, 0, 0, spare))
    return shares.unflatten(2, (call.num_rows, per_block)).sum(3)
