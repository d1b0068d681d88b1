"""dk, dv and the gradient of key_bias of block_sparse_attention, over column lists.

p_ij = exp(scale * q_i.k_j + bias_j + gate_RC - lse_i),   ds_ij = p_ij (do_i.v_j - delta_i)
dv_j = sum_i p_ij do_i,   dk_j = scale * sum_i ds_ij q_i,   dbias_j = sum_i ds_ij
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
def walk_column(
    dk0, dk1, dv0, dv1, dbias, k0, k1, v0, v1, bias, first, last,
    queries_at, gate_at, list_at, bits_at, scale,
    IS_PARTIAL: tl.constexpr, CHECK_QUERIES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, NEEDS_BIAS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, MASK_BLOCK_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Add what the tiles `first` to `last` of one column's list give to dk, dv and dbias."""
    q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, q_len, place = queries_at
    gate_ptr, gate_stride = gate_at
    indices_ptr, slots_ptr = list_at
    bits_ptr, bits_slot_stride, bits_row_stride, key_in_block = bits_at
    TILES: tl.constexpr = MASK_BLOCK_Q // BLOCK_Q
    CHECKED: tl.constexpr = CHECK_QUERIES or HAS_GATE or HAS_BIAS
    for tile in range(first, last):
        entry = tile // TILES
        in_block = (tile % TILES) * BLOCK_Q
        row = tl.load(indices_ptr + entry)
        query = row * MASK_BLOCK_Q + in_block
        queries = query + tl.arange(0, BLOCK_Q)
        if CHECK_QUERIES:
            lse = tl.load(lse_ptr + queries, mask=queries < q_len, other=float("-inf"))
            delta = tl.load(delta_ptr + queries, mask=queries < q_len, other=0.0)
        else:
            lse = tl.load(lse_ptr + queries)
            delta = tl.load(delta_ptr + queries)
        shift = 0.0
        query_ok = lse != float("-inf")
        if HAS_GATE:
            gate = tl.load(gate_ptr + row.to(tl.int64) * gate_stride)
            shift = gate * 1.4426950408889634
            query_ok = lse + gate != float("-inf")
        # a query that sees nothing is never loaded where queries are checked: its NaN stays there
        q0, q1 = load_tile(
            q_ptr, place, query, q_stride, query_ok, BLOCK_Q, D, D0, D1, CHECKED, IS_TMA
        )
        do0, do1 = load_tile(
            do_ptr, place, query, do_stride, query_ok, BLOCK_Q, D, D0, D1, CHECKED, IS_TMA
        )
        peak = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        s = dot_rows(k0, k1, q0, q1, D1, PRECISION) * scale + (shift - peak)[None, :]
        if HAS_BIAS:
            s += bias[:, None]
        if IS_PARTIAL:
            bits = bits_ptr + tl.load(slots_ptr + entry).to(tl.int64) * bits_slot_stride
            bits += in_block * bits_row_stride
            visible = token_is_visible(bits, bits_row_stride, key_in_block, BLOCK_Q, BLOCK_K, True)
            s = tl.where(visible, s, float("-inf"))
        p = tl.exp2(s)  # [BLOCK_K, BLOCK_Q]
        dv0, dv1 = add_dot(dv0, dv1, p, do0, do1, D1, PRECISION)
        ds = p * (dot_rows(v0, v1, do0, do1, D1, PRECISION) - delta[None, :])
        dk0, dk1 = add_dot(dk0, dk1, ds, q0, q1, D1, PRECISION)
        if NEEDS_BIAS:
            dbias += tl.sum(ds, 1)
    return dk0, dk1, dv0, dv1, dbias


@triton.jit(do_not_specialize=[
    "num_heads", "q_len", "k_len", "num_columns", "num_tiles", "num_rows", "mask_batch_step",
    "mask_head_step", "capacity", "partial_capacity",
])  # fmt: skip
def block_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, gate_ptr, do_ptr, lse_ptr, delta_ptr,
    offsets_ptr, indices_ptr, partial_offsets_ptr, partial_indices_ptr, slots_ptr, bits_ptr,
    dk_ptr, dv_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, bias_strides,
    gate_strides, bits_strides,
    num_heads, q_len, k_len, num_columns, num_tiles, num_rows,
    mask_batch_step, mask_head_step, capacity, partial_capacity,
    scale,
    STEP: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK_BLOCK_Q: tl.constexpr, MASK_BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias. One program: BLOCK_K keys of one key head, all its query heads in turn."""
    TILES: tl.constexpr = MASK_BLOCK_Q // BLOCK_Q
    key_head_at = (tl.program_id(0) // num_tiles).to(tl.int64)  # b * G + g
    key_heads = num_heads // GROUP
    batch, key_head = key_head_at // key_heads, key_head_at % key_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_K
    column = start // MASK_BLOCK_K
    keys = start + tl.arange(0, BLOCK_K)
    in_range = keys < k_len
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, do_strides = in_elements(v_strides, STEP), in_elements(do_strides, STEP)
    dk_strides, dv_strides = in_elements(dk_strides, STEP), in_elements(dv_strides, STEP)
    k_ptr += batch * k_strides[0] + key_head * k_strides[1] + start.to(tl.int64) * k_strides[2]
    v_ptr += batch * v_strides[0] + key_head * v_strides[1] + start.to(tl.int64) * v_strides[2]
    dk0, dk1 = zero_chunks(BLOCK_K, D0, D1)
    dv0, dv1 = zero_chunks(BLOCK_K, D0, D1)
    key_seen = tl.zeros([BLOCK_K], tl.int32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        head_at = batch * num_heads + head
        mask_head = batch * mask_batch_step + head * mask_head_step
        key_ok = in_range
        bias = tl.zeros([BLOCK_K], tl.float32)
        if HAS_BIAS:
            bias_at = bias_ptr + batch * bias_strides[0] + head * bias_strides[1] + keys
            bias = tl.load(bias_at, mask=in_range, other=float("-inf"))
            key_ok = bias != float("-inf")
            key_seen |= key_ok.to(tl.int32)
            bias *= 1.4426950408889634
        k0, k1 = load_rows(k_ptr, k_strides[2], key_ok, BLOCK_K, D, D0, D1, True)
        v0, v1 = load_rows(v_ptr, v_strides[2], key_ok, BLOCK_K, D, D0, D1, True)
        dbias = tl.zeros([BLOCK_K], tl.float32)
        q_at, do_at = q_ptr, do_ptr
        if not IS_TMA:
            q_at = q_ptr + batch * q_strides[0] + head * q_strides[1]
            do_at = do_ptr + batch * do_strides[0] + head * do_strides[1]
        queries_at = (
            q_at, do_at, lse_ptr + head_at * q_len, delta_ptr + head_at * q_len,
            q_strides[2], do_strides[2], q_len, (batch, head),
        )  # fmt: skip
        gate_at = gate_ptr + batch * gate_strides[0] + head * gate_strides[1]
        gate_at = (gate_at + column, gate_strides[2])
        bits_at = bits_ptr + batch * bits_strides[0] + head * bits_strides[1]
        bits_at = (bits_at, bits_strides[2], bits_strides[3], start % MASK_BLOCK_K)
        line = mask_head * (num_columns + 1) + column
        if HAS_PARTIAL:
            first, last = list_range(partial_offsets_ptr, line, TILES)
            at = mask_head * partial_capacity
            dk0, dk1, dv0, dv1, dbias = walk_column(
                dk0, dk1, dv0, dv1, dbias, k0, k1, v0, v1, bias, first, last,
                queries_at, gate_at, (partial_indices_ptr + at, slots_ptr + at), bits_at,
                scale * 1.4426950408889634,
                True, True, HAS_BIAS, HAS_GATE, NEEDS_BIAS, D, D0, D1, MASK_BLOCK_Q,
                BLOCK_Q, BLOCK_K, PRECISION, IS_TMA,
            )  # fmt: skip
        list_at = (indices_ptr + mask_head * capacity, slots_ptr)
        first, last = list_range(offsets_ptr, line, TILES)
        ragged = ragged_tile(list_at[0], first, last, num_rows, q_len, MASK_BLOCK_Q, TILES)
        for is_ragged in tl.static_range(2):
            dk0, dk1, dv0, dv1, dbias = walk_column(
                dk0, dk1, dv0, dv1, dbias, k0, k1, v0, v1, bias,
                ragged if is_ragged else first, last if is_ragged else ragged,
                queries_at, gate_at, list_at, bits_at, scale * 1.4426950408889634,
                False, is_ragged == 1, HAS_BIAS, HAS_GATE, NEEDS_BIAS, D, D0, D1, MASK_BLOCK_Q,
                BLOCK_Q, BLOCK_K, PRECISION, IS_TMA,
            )  # fmt: skip
        if NEEDS_BIAS:
            tl.store(dbias_ptr + head_at * k_len + keys, dbias, mask=in_range)
    if HAS_BIAS:  # what a hidden key holds, and what is in a query that saw only such keys, is gone
        dk0 = tl.where(key_seen[:, None] > 0, dk0, 0.0)
        dv0 = tl.where(key_seen[:, None] > 0, dv0, 0.0)
        if D1 > 0:
            dk1 = tl.where(key_seen[:, None] > 0, dk1, 0.0)
            dv1 = tl.where(key_seen[:, None] > 0, dv1, 0.0)
    dk_ptr += batch * dk_strides[0] + key_head * dk_strides[1]
    dv_ptr += batch * dv_strides[0] + key_head * dv_strides[1]
    dk_ptr += start.to(tl.int64) * dk_strides[2]
    dv_ptr += start.to(tl.int64) * dv_strides[2]
    store_rows(dk_ptr, dk_strides[2], k_len - start, dk0 * scale, dk1 * scale, BLOCK_K, D, D0, D1)
    store_rows(dv_ptr, dv_strides[2], k_len - start, dv0, dv1, BLOCK_K, D, D0, D1)
