"""Gradients of the columns of landmark attention: keys in stage 1, landmarks in stage 2.

p_ij = exp(z_ij - lse_i),   dz_ij = p_ij (do_i.v_j - delta_i)
dv_j = sum_i p_ij do_i,     db_j = sum_i dz_ij,
dk_j = scale * sum_i dz_ij q_i - 2 * square * db_j k_j + dsums of the segment of j
"""

import triton
import triton.language as tl

from ..tiles import add_dot, dot_rows, in_elements, load_rows, store_rows, zero_chunks
from .weights import load_columns, log_weight, through_weight


@triton.jit
def add_segment_rows(
    dk, dsums_ptr, segment, is_shown,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add to each key the gradient of its segment's sum, from column FIRST on."""
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    kept = (is_shown & (segment >= 0))[:, None] & (columns < D)
    at = segment.to(tl.int64)[:, None] * D + columns
    return dk + tl.load(dsums_ptr + at, mask=kept, other=0.0)


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "num_tiles", "chunk", "part_rows"])
def landmark_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, segment_ptr, do_ptr, lse_ptr, delta_ptr, unit_ptr, dsums_ptr,
    dk_ptr, dv_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    bias_strides, segment_stride, part_rows,
    num_heads, q_len, k_len, num_tiles, chunk, scale, square,
    STEP: tl.constexpr, STAGE: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, NEEDS_DK: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, IS_RELU: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbias of stage 1; their parts over the queries in stage 2, of part_rows rows each.

    One program: BLOCK_K columns of one head, over one part of the rows of its query heads.
    """
    part = tl.program_id(1)
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)  # of the columns
    key_heads = num_heads // GROUP
    batch, key_head = head_at // key_heads, head_at % key_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)
    in_range = columns < k_len
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, do_strides = in_elements(v_strides, STEP), in_elements(do_strides, STEP)
    dk_strides, dv_strides = in_elements(dk_strides, STEP), in_elements(dv_strides, STEP)
    k_ptr += batch * k_strides[0] + key_head * k_strides[1]
    v_ptr += batch * v_strides[0] + key_head * v_strides[1]
    bias_ptr += batch * bias_strides[0] + key_head * bias_strides[1]
    keys_at = (k_ptr, v_ptr, bias_ptr, k_strides[2], v_strides[2], square)
    k0, k1, v0, v1, shift = load_columns(
        keys_at, start, k_len, HAS_BIAS, HAS_SQUARE, D, D0, D1, BLOCK_K
    )
    dk0, dk1 = zero_chunks(BLOCK_K, D0, D1)
    dv0, dv1 = zero_chunks(BLOCK_K, D0, D1)
    dbias = tl.zeros([BLOCK_K], tl.float32)
    first = part * chunk
    last = tl.minimum(first + chunk, q_len)
    for member in range(GROUP):
        head = key_head * GROUP + member
        row_head = (batch * num_heads + head) * q_len
        q_at = q_ptr + batch * q_strides[0] + head * q_strides[1]
        do_at = do_ptr + batch * do_strides[0] + head * do_strides[1]
        for row in range(first, last, BLOCK_Q):
            at = tl.cast(row, tl.int64)
            rows = row + tl.arange(0, BLOCK_Q)
            row_ok = rows < last
            lse = tl.load(lse_ptr + row_head + rows, mask=row_ok, other=float("inf"))
            delta = tl.load(delta_ptr + row_head + rows, mask=row_ok, other=0.0)
            q0, q1 = load_rows(
                q_at + at * q_strides[2], q_strides[2], row_ok, BLOCK_Q, D, D0, D1, True
            )
            do0, do1 = load_rows(
                do_at + at * do_strides[2], do_strides[2], row_ok, BLOCK_Q, D, D0, D1, True
            )
            products = dot_rows(k0, k1, q0, q1, D1, PRECISION)  # [BLOCK_K, BLOCK_Q]
            p = tl.exp2(log_weight(products, scale, IS_RELU) + (shift[:, None] - lse[None, :]))
            dv0, dv1 = add_dot(dv0, dv1, p, do0, do1, D1, PRECISION)
            dz = p * (dot_rows(v0, v1, do0, do1, D1, PRECISION) - delta[None, :])
            if NEEDS_BIAS or HAS_SQUARE:
                dbias += tl.sum(dz, 1)
            if NEEDS_DK:
                dz = through_weight(dz, products, scale, IS_RELU)
                dk0, dk1 = add_dot(dk0, dk1, dz, q0, q1, D1, PRECISION)
    at = start.to(tl.int64)
    unit = 1.0
    if STAGE == 1:
        unit = tl.load(unit_ptr + head_at)
    if NEEDS_BIAS:
        bias_at = (head_at + part * (tl.num_programs(0) // num_tiles).to(tl.int64)) * k_len
        tl.store(dbias_ptr + bias_at + columns, dbias * unit, mask=in_range)
    part_at = part.to(tl.int64) * part_rows * D
    dv_ptr += part_at + batch * dv_strides[0] + key_head * dv_strides[1] + at * dv_strides[2]
    store_rows(dv_ptr, dv_strides[2], k_len - start, dv0 * unit, dv1 * unit, BLOCK_K, D, D0, D1)
    if NEEDS_DK:
        dk0 *= scale * unit
        if D1 > 0:
            dk1 *= scale * unit
        if HAS_SQUARE:
            pull = (dbias * (2.0 * square * unit))[:, None]
            dk0 -= pull * k0.to(tl.float32)
            if D1 > 0:
                dk1 -= pull * k1.to(tl.float32)
        if HAS_SEGMENTS:
            is_shown = shift != float("-inf")
            segment_ptr += batch * segment_stride
            segment = tl.load(segment_ptr + columns, mask=in_range, other=-1)
            dsums_ptr += head_at * q_len * D
            dk0 = add_segment_rows(dk0, dsums_ptr, segment, is_shown, 0, D0, D)
            if D1 > 0:
                dk1 = add_segment_rows(dk1, dsums_ptr, segment, is_shown, D0, D1, D)
        dk_ptr += part_at + batch * dk_strides[0] + key_head * dk_strides[1] + at * dk_strides[2]
        store_rows(dk_ptr, dk_strides[2], k_len - start, dk0, dk1, BLOCK_K, D, D0, D1)
