"""Forward of block_sparse_attention (and of what is built on it: top-k, saliency, window).

    s_ij = scale * q_i.k_j + bias_j + gate_RC,   lse_i = log sum_j exp(s_ij),
    o_i  = sum_j exp(s_ij - lse_i) v_j           over the key blocks that row R keeps

Exponents are base 2: scale, bias and gate come multiplied by log2(e). The scale is >= 0 here; a
negative one is moved into q, which is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from ..tiles import (
    add_dot,
    dot_rows,
    in_elements,
    list_range,
    load_rows,
    load_tile,
    ragged_tile,
    store_rows,
    token_is_visible,
    zero_chunks,
)
from . import tuning
from .call import Call


@triton.jit
def softmax_step(
    acc0, acc1, m, l, s, v0, v1, scale, MASKED: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of scores into the running output, maximum and sum.

    With MASKED the logits are s, and a row may have seen nothing yet. Else they are scale * s, and
    one fused multiply-add takes them to the exponent.
    """
    if MASKED:
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])  # [BLOCK_Q, BLOCK_K]
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        m_safe = m_new
        p = tl.exp2(s * scale - m_safe[:, None])
    fade = tl.exp2(m - m_safe)
    l = l * fade + tl.sum(p, 1)
    acc0 = acc0 * fade[:, None]
    if D1 > 0:
        acc1 = acc1 * fade[:, None]
    acc0, acc1 = add_dot(acc0, acc1, p, v0, v1, D1, PRECISION)
    return acc0, acc1, m_new, l


@triton.jit
def walk_list(
    acc0, acc1, m, l, q0, q1, first, last,
    keys_at, extras_at, list_at, bits_at, scale,
    IS_PARTIAL: tl.constexpr, CHECK_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK_BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles `first` to `last` of one row's list."""
    k_ptr, v_ptr, k_stride, v_stride, k_len, place = keys_at
    bias_ptr, gate_ptr = extras_at
    indices_ptr, slots_ptr = list_at
    bits_ptr, bits_slot_stride, bits_row_stride = bits_at
    TILES: tl.constexpr = MASK_BLOCK_K // BLOCK_K
    CHECKED: tl.constexpr = CHECK_KEYS or HAS_BIAS
    MASKED: tl.constexpr = CHECKED or HAS_GATE
    for tile in range(first, last):
        entry = tile // TILES
        in_block = (tile % TILES) * BLOCK_K
        column = tl.load(indices_ptr + entry)
        key = column * MASK_BLOCK_K + in_block
        keys = key + tl.arange(0, BLOCK_K)
        key_ok = keys < k_len
        if HAS_BIAS:
            bias = tl.load(bias_ptr + keys, mask=key_ok, other=float("-inf"))
            key_ok = bias != float("-inf")  # a hidden key is never loaded: its NaN stays there
        k0, k1 = load_tile(k_ptr, place, key, k_stride, key_ok, BLOCK_K, D, D0, D1, CHECKED, IS_TMA)
        v0, v1 = load_tile(v_ptr, place, key, v_stride, key_ok, BLOCK_K, D, D0, D1, CHECKED, IS_TMA)
        s = dot_rows(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_Q, BLOCK_K]
        shift = 0.0
        if HAS_GATE:
            shift = tl.load(gate_ptr + column) * 1.4426950408889634
        if MASKED:
            s = s * scale + shift
            if HAS_BIAS:
                s += bias[None, :] * 1.4426950408889634
            if HAS_GATE:  # a block whose gate is -inf is hidden, even from a query that is NaN
                key_ok &= tl.zeros([BLOCK_K], tl.float32) + shift != float("-inf")
            visible = tl.broadcast_to(key_ok[None, :], [BLOCK_Q, BLOCK_K])
            if IS_PARTIAL:
                bits = bits_ptr + tl.load(slots_ptr + entry).to(tl.int64) * bits_slot_stride
                visible &= token_is_visible(
                    bits, bits_row_stride, in_block, BLOCK_Q, BLOCK_K, False
                )
            s = tl.where(visible, s, float("-inf"))
        acc0, acc1, m, l = softmax_step(
            acc0, acc1, m, l, s, v0, v1, scale, MASKED, D1, PRECISION
        )  # fmt: skip
    return acc0, acc1, m, l


@triton.jit
def split_range(first, last, split, num_splits):
    """Return the part of a range that one split walks."""
    step = (last - first + num_splits - 1) // num_splits
    return tl.minimum(first + split * step, last), tl.minimum(first + (split + 1) * step, last)


@triton.jit(do_not_specialize=[
    "num_heads", "q_len", "k_len", "num_rows", "num_tiles", "num_columns", "mask_batch_step",
    "mask_head_step", "capacity", "partial_capacity", "num_splits",
])  # fmt: skip
def block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, gate_ptr,
    offsets_ptr, indices_ptr, partial_offsets_ptr, partial_indices_ptr, slots_ptr, bits_ptr,
    o_ptr, lse_ptr,
    q_strides, k_strides, v_strides, o_strides, bias_strides, gate_strides, bits_strides,
    num_heads, q_len, k_len, num_rows, num_tiles, num_columns,
    mask_batch_step, mask_head_step, capacity, partial_capacity, num_splits,
    scale,
    STEP: tl.constexpr, GROUP: tl.constexpr, NEGATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PARTIAL: tl.constexpr, HAS_SPLITS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK_BLOCK_Q: tl.constexpr, MASK_BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """o and lse. One program: BLOCK_Q queries of one head, one part of their row's lists.

    With splits o and lse are a part's own, float32 [splits, B, H, Nq, D] and base 2; else final.
    """
    TILES: tl.constexpr = MASK_BLOCK_K // BLOCK_K
    split = tl.program_id(1)
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)  # b * H + h; offsets pass 2**31
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_Q
    row = start // MASK_BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    query_ok = queries < q_len
    mask_head = batch * mask_batch_step + head * mask_head_step
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, o_strides = in_elements(v_strides, STEP), in_elements(o_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + start.to(tl.int64) * q_strides[2]
    if not IS_TMA:
        k_ptr += batch * k_strides[0] + (head // GROUP) * k_strides[1]
        v_ptr += batch * v_strides[0] + (head // GROUP) * v_strides[1]
    bias_ptr += batch * bias_strides[0] + head * bias_strides[1]
    gate_ptr += batch * gate_strides[0] + head * gate_strides[1]
    gate_ptr += row.to(tl.int64) * gate_strides[2]
    bits_ptr += batch * bits_strides[0] + head * bits_strides[1]
    bits_ptr += (start % MASK_BLOCK_Q) * bits_strides[3]
    indices_ptr += mask_head * capacity
    at = mask_head * partial_capacity
    partial_list = (partial_indices_ptr + at, slots_ptr + at)
    keys_at = (k_ptr, v_ptr, k_strides[2], v_strides[2], k_len, (batch, head // GROUP))
    extras_at = (bias_ptr, gate_ptr)
    bits_at = (bits_ptr, bits_strides[2], bits_strides[3])

    q0, q1 = load_rows(q_ptr, q_strides[2], query_ok, BLOCK_Q, D, D0, D1, True)
    if NEGATE:
        q0, q1 = -q0, -q1
    acc0, acc1 = zero_chunks(BLOCK_Q, D0, D1)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    if HAS_PARTIAL:
        first, last = list_range(partial_offsets_ptr + mask_head * (num_rows + 1), row, TILES)
        if HAS_SPLITS:
            first, last = split_range(first, last, split, num_splits)
        acc0, acc1, m, l = walk_list(
            acc0, acc1, m, l, q0, q1, first, last,
            keys_at, extras_at, partial_list, bits_at, scale,
            True, True, HAS_BIAS, HAS_GATE, D, D0, D1, MASK_BLOCK_K, BLOCK_Q, BLOCK_K, PRECISION,
            IS_TMA,
        )  # fmt: skip
    first, last = list_range(offsets_ptr + mask_head * (num_rows + 1), row, TILES)
    ragged = ragged_tile(indices_ptr, first, last, num_columns, k_len, MASK_BLOCK_K, TILES)
    if HAS_SPLITS:
        first, last = split_range(first, last, split, num_splits)
    ragged = tl.maximum(first, tl.minimum(ragged, last))
    if HAS_BIAS:  # the bias already ends at k_len
        ragged = last
    acc0, acc1, m, l = walk_list(
        acc0, acc1, m, l, q0, q1, first, ragged,
        keys_at, extras_at, (indices_ptr, slots_ptr), bits_at, scale,
        False, False, HAS_BIAS, HAS_GATE, D, D0, D1, MASK_BLOCK_K, BLOCK_Q, BLOCK_K, PRECISION,
        IS_TMA,
    )  # fmt: skip
    if not HAS_BIAS:
        acc0, acc1, m, l = walk_list(
            acc0, acc1, m, l, q0, q1, ragged, last,
            keys_at, extras_at, (indices_ptr, slots_ptr), bits_at, scale,
            False, True, HAS_BIAS, HAS_GATE, D, D0, D1, MASK_BLOCK_K, BLOCK_Q, BLOCK_K, PRECISION,
            IS_TMA,
        )  # fmt: skip
    share = 1.0 / tl.where(l == 0.0, 1.0, l)
    acc0 *= share[:, None]
    if D1 > 0:
        acc1 *= share[:, None]
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
    if HAS_SPLITS:
        head_at += split * (tl.num_programs(0) // num_tiles).to(tl.int64)
        o_ptr += (head_at * q_len + start) * D
        store_rows(o_ptr, D, q_len - start, acc0, acc1, BLOCK_Q, D, D0, D1)
    else:
        o_ptr += batch * o_strides[0] + head * o_strides[1] + start.to(tl.int64) * o_strides[2]
        store_rows(o_ptr, o_strides[2], q_len - start, acc0, acc1, BLOCK_Q, D, D0, D1)
        lse *= 0.6931471805599453  # natural log for the caller
    is_query = tl.arange(0, BLOCK_Q) < q_len - start
    tl.store(lse_ptr + head_at * q_len + queries, lse, mask=is_query)


@triton.jit(do_not_specialize=["num_heads", "q_len", "num_tiles", "num_splits"])
def block_attention_fwd_combine_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, o_strides,
    num_heads, q_len, num_tiles, num_splits,
    STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """o = sum_s w_s o_s / sum_s w_s with w_s = exp(lse_s), in the order of the splits.

    One program: BLOCK_Q queries of one head.
    """
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    heads_in_all = (tl.num_programs(0) // num_tiles).to(tl.int64)
    start = (tl.program_id(0) % num_tiles) * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    is_query = rows < q_len - start
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    for split in range(num_splits):
        at = (head_at + split * heads_in_all) * q_len + start
        part_lse = tl.load(part_lse_ptr + at + rows, mask=is_query, other=float("-inf"))
        part, _ = load_rows(part_ptr + at * D, D, is_query, BLOCK_Q, D, BLOCK_D, 0, True)
        m_new = tl.maximum(m, part_lse)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.where(part_lse == float("-inf"), 0.0, tl.exp2(part_lse - m_safe))
        fade = tl.exp2(m - m_safe)
        acc = acc * fade[:, None] + part * weight[:, None]
        l = l * fade + weight
        m = m_new
    acc /= tl.where(l == 0.0, 1.0, l)[:, None]
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)
    o_strides = in_elements(o_strides, STEP)
    o_ptr += batch * o_strides[0] + head * o_strides[1] + start.to(tl.int64) * o_strides[2]
    store_rows(o_ptr, o_strides[2], q_len - start, acc, acc, BLOCK_Q, D, BLOCK_D, 0)
    tl.store(lse_ptr + head_at * q_len + start + rows, lse, mask=is_query)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    block_gate: Tensor | None,
    rows: launching.IndexLists,
    token_bits: Tensor | None,
    block_size: tuple[int, int],
    scale: float,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o like q, and the natural-log lse [B, H, Nq] in float32; -inf where nothing is seen.

    num_splits: parts that a row's list is cut into; by default what fills the GPU.
    """
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = Call.prepare(q, k, v, key_bias, block_gate, rows, token_bits, block_size, scale)
    if out.numel() == 0:
        return out, lse
    q, k, v, *extras = call.tensors
    launch, options = call.pick(tuning.FORWARD, k, v)
    k_source, v_source = call.sources(launch.tile_k, options, k, v)
    num_tiles = triton.cdiv(q.shape[2], launch.tile_q)
    programs = q.shape[0] * q.shape[1] * num_tiles
    if num_splits is None:
        num_splits = count_splits(q.device, programs, k.shape[2], launch.tile_k)
    o, o_lse = out, lse
    if num_splits > 1:
        o = q.new_empty((num_splits, *q.shape), dtype=torch.float32)
        o_lse = q.new_empty((num_splits, *q.shape[:3]), dtype=torch.float32)
    step, strides = launching.in_steps(q, k, v, out)
    with call.device:
        block_attention_fwd_kernel[(programs, num_splits)](
            q, k_source, v_source, *extras, *call.row_lists, call.bits, o, o_lse,
            *strides, *call.extra_strides,
            q.shape[1], q.shape[2], k.shape[2], call.num_rows, num_tiles, call.num_columns,
            *call.mask_steps, *call.row_capacities, num_splits, call.scale,
            STEP=step, HAS_SPLITS=num_splits > 1, **call.flags, **options,
        )  # fmt: skip
        if num_splits > 1:
            num_tiles = triton.cdiv(q.shape[2], tuning.COMBINE_ROWS)
            block_attention_fwd_combine_kernel[(q.shape[0] * q.shape[1] * num_tiles,)](
                o, o_lse, out, lse, strides[3],
                q.shape[1], q.shape[2], num_tiles, num_splits,
                STEP=step, D=q.shape[3], BLOCK_D=triton.next_power_of_2(q.shape[3]),
                BLOCK_Q=tuning.COMBINE_ROWS,
            )  # fmt: skip
    return out, lse


def count_splits(device: torch.device, programs: int, k_len: int, tile_k: int) -> int:
    """Return into how many parts to cut the key lists: from sizes alone, 1 if programs suffice."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    longest = triton.cdiv(k_len, tile_k)
    wanted = min(processors // programs, longest // tuning.SPLIT_TILES, tuning.MOST_SPLITS)
    return max(1, wanted)
