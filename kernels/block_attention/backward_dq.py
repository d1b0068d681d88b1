"""dq and the gradient of block_gate of block_sparse_attention, over row lists.

p_ij = exp(scale * q_i.k_j + bias_j + gate_RC - lse_i),   ds_ij = p_ij (do_i.v_j - delta_i)
dq_i = scale * sum_j ds_ij k_j,   dgate_RC = sum_{i in R, j in C} ds_ij
"""

import triton
import triton.language as tl

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


@triton.jit
def walk_row(
    dq0, dq1, q0, q1, do0, do1, peak, delta, first, last,
    keys_at, extras_at, list_at, bits_at, scale,
    IS_PARTIAL: tl.constexpr, CHECK_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, NEEDS_GATE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, MASK_BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Add what the tiles `first` to `last` of one row's list give to dq, and store dgate."""
    k_ptr, v_ptr, k_stride, v_stride, k_len, place = keys_at
    bias_ptr, gate_ptr, dgate_ptr = extras_at
    indices_ptr, slots_ptr = list_at
    bits_ptr, bits_slot_stride, bits_row_stride = bits_at
    TILES: tl.constexpr = MASK_BLOCK_K // BLOCK_K
    CHECKED: tl.constexpr = CHECK_KEYS or HAS_BIAS
    dgate = 0.0
    for tile in range(first, last):
        entry = tile // TILES
        in_block = (tile % TILES) * BLOCK_K
        column = tl.load(indices_ptr + entry)
        key = column * MASK_BLOCK_K + in_block
        keys = key + tl.arange(0, BLOCK_K)
        key_ok = keys < k_len
        if HAS_BIAS:
            bias = tl.load(bias_ptr + keys, mask=key_ok, other=float("-inf"))
            key_ok = bias != float("-inf")
        k0, k1 = load_tile(k_ptr, place, key, k_stride, key_ok, BLOCK_K, D, D0, D1, CHECKED, IS_TMA)
        v0, v1 = load_tile(v_ptr, place, key, v_stride, key_ok, BLOCK_K, D, D0, D1, CHECKED, IS_TMA)
        shift = 0.0
        if HAS_GATE:
            shift = tl.load(gate_ptr + column) * 1.4426950408889634
        s = dot_rows(q0, q1, k0, k1, D1, PRECISION) * scale + (shift - peak)[:, None]
        if HAS_BIAS:
            s += bias[None, :] * 1.4426950408889634
        if CHECKED:
            visible = tl.broadcast_to(key_ok[None, :], [BLOCK_Q, BLOCK_K])
            if IS_PARTIAL:
                bits = bits_ptr + tl.load(slots_ptr + entry).to(tl.int64) * bits_slot_stride
                visible &= token_is_visible(
                    bits, bits_row_stride, in_block, BLOCK_Q, BLOCK_K, False
                )
            s = tl.where(visible, s, float("-inf"))
        p = tl.exp2(s)  # [BLOCK_Q, BLOCK_K]
        ds = p * (dot_rows(do0, do1, v0, v1, D1, PRECISION) - delta[:, None])
        dq0, dq1 = add_dot(dq0, dq1, ds, k0, k1, D1, PRECISION)
        if NEEDS_GATE:  # the tiles of one block follow each other; the last store has their sum
            dgate = tl.where(in_block == 0, 0.0, dgate) + tl.sum(ds)
            tl.store(dgate_ptr + column, dgate)
    return dq0, dq1


@triton.jit(do_not_specialize=[
    "num_heads", "q_len", "k_len", "num_rows", "num_tiles", "num_columns", "mask_batch_step",
    "mask_head_step", "capacity", "partial_capacity",
])  # fmt: skip
def block_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, gate_ptr, do_ptr, lse_ptr, delta_ptr,
    offsets_ptr, indices_ptr, partial_offsets_ptr, partial_indices_ptr, slots_ptr, bits_ptr,
    dq_ptr, dgate_ptr,
    q_strides, k_strides, v_strides, do_strides, dq_strides, bias_strides, gate_strides,
    bits_strides,
    num_heads, q_len, k_len, num_rows, num_tiles, num_columns,
    mask_batch_step, mask_head_step, capacity, partial_capacity,
    scale,
    STEP: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, NEEDS_GATE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK_BLOCK_Q: tl.constexpr, MASK_BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """dq, and each tile's share of dgate, [B, H, tiles, C]. One program: BLOCK_Q queries."""
    TILES: tl.constexpr = MASK_BLOCK_K // BLOCK_K
    tile = tl.program_id(0) % num_tiles
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    start = tile * BLOCK_Q
    row = start // MASK_BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    in_range = queries < q_len
    mask_head = batch * mask_batch_step + head * mask_head_step
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, do_strides = in_elements(v_strides, STEP), in_elements(do_strides, STEP)
    dq_strides = in_elements(dq_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + start.to(tl.int64) * q_strides[2]
    do_ptr += batch * do_strides[0] + head * do_strides[1] + start.to(tl.int64) * do_strides[2]
    if not IS_TMA:
        k_ptr += batch * k_strides[0] + (head // GROUP) * k_strides[1]
        v_ptr += batch * v_strides[0] + (head // GROUP) * v_strides[1]
    bias_ptr += batch * bias_strides[0] + head * bias_strides[1]
    gate_ptr += batch * gate_strides[0] + head * gate_strides[1]
    gate_ptr += row.to(tl.int64) * gate_strides[2]
    dgate_ptr += (head_at * num_tiles + tile) * num_columns
    bits_ptr += batch * bits_strides[0] + head * bits_strides[1]
    bits_ptr += (start % MASK_BLOCK_Q) * bits_strides[3]
    keys_at = (k_ptr, v_ptr, k_strides[2], v_strides[2], k_len, (batch, head // GROUP))
    extras_at = (bias_ptr, gate_ptr, dgate_ptr)
    bits_at = (bits_ptr, bits_strides[2], bits_strides[3])

    lse = tl.load(lse_ptr + head_at * q_len + queries, mask=in_range, other=float("-inf"))
    delta = tl.load(delta_ptr + head_at * q_len + queries, mask=in_range, other=0.0)
    query_ok = lse != float("-inf")
    peak = tl.where(query_ok, lse * 1.4426950408889634, float("inf"))
    q0, q1 = load_rows(q_ptr, q_strides[2], query_ok, BLOCK_Q, D, D0, D1, True)
    do0, do1 = load_rows(do_ptr, do_strides[2], query_ok, BLOCK_Q, D, D0, D1, True)
    dq0, dq1 = zero_chunks(BLOCK_Q, D0, D1)
    if HAS_PARTIAL:
        first, last = list_range(partial_offsets_ptr + mask_head * (num_rows + 1), row, TILES)
        at = mask_head * partial_capacity
        dq0, dq1 = walk_row(
            dq0, dq1, q0, q1, do0, do1, peak, delta, first, last,
            keys_at, extras_at, (partial_indices_ptr + at, slots_ptr + at), bits_at,
            scale * 1.4426950408889634,
            True, True, HAS_BIAS, HAS_GATE, NEEDS_GATE, D, D0, D1, MASK_BLOCK_K,
            BLOCK_Q, BLOCK_K, PRECISION, IS_TMA,
        )  # fmt: skip
    list_at = (indices_ptr + mask_head * capacity, slots_ptr)
    first, last = list_range(offsets_ptr + mask_head * (num_rows + 1), row, TILES)
    ragged = ragged_tile(list_at[0], first, last, num_columns, k_len, MASK_BLOCK_K, TILES)
    if HAS_BIAS:  # the bias already ends at k_len
        ragged = last
    for is_ragged in tl.static_range(1 if HAS_BIAS else 2):
        dq0, dq1 = walk_row(
            dq0, dq1, q0, q1, do0, do1, peak, delta,
            ragged if is_ragged else first, last if is_ragged else ragged,
            keys_at, extras_at, list_at, bits_at, scale * 1.4426950408889634,
            False, is_ragged == 1, HAS_BIAS, HAS_GATE, NEEDS_GATE, D, D0, D1, MASK_BLOCK_K,
            BLOCK_Q, BLOCK_K, PRECISION, IS_TMA,
        )  # fmt: skip
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1] + start.to(tl.int64) * dq_strides[2]
    store_rows(dq_ptr, dq_strides[2], q_len - start, dq0 * scale, dq1 * scale, BLOCK_Q, D, D0, D1)
