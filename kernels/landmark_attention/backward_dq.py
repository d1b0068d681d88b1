"""Gradient of the rows of landmark attention: queries in stage 2, landmarks in stage 1.

    p_ij = exp(z_ij - lse_i),   dz_ij = p_ij (do_i.v_j - delta_i),   dq_i = scale * sum_j dz_ij k_j

Stage 2 keeps neither o nor lse: a first walk over the few landmarks finds lse_i and
delta_i = sum_j p_ij do_i.v_j, and leaves them for the gradient of the columns.
"""

import triton
import triton.language as tl

from ..tiles import add_dot, in_elements, load_rows, store_rows, zero_chunks
from .weights import load_row, log_weight, row_tile, squares, through_weight


@triton.jit
def fold_tile(m, l, t, peak, logits, dweights, products, scale, NEEDS_PEAK: tl.constexpr):
    """Fold a tile into the running maximum, sum, weighted sum of do.v, and largest product."""
    if NEEDS_PEAK:
        bare = tl.where(logits == float("-inf"), logits, log_weight(products, scale, False))
        peak = tl.maximum(peak, tl.max(bare, 1))
    m_new = tl.maximum(m, tl.max(logits, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p, fade = tl.exp2(logits - m_safe[:, None]), tl.exp2(m - m_safe)
    return m_new, l * fade + tl.sum(p, 1), t * fade + tl.sum(p * dweights, 1), peak


@triton.jit
def floor_logit(peak, do0, do1, q0, q1, v_ptr, bias_ptr, square, D: tl.constexpr,
                D0: tl.constexpr, D1: tl.constexpr):  # fmt: skip
    """Return the logit of the floor, and do . its value."""
    z = peak + (squares(q0, q1, D1) * square + tl.load(bias_ptr)) * 1.4426950408889634
    v0, v1 = load_row(v_ptr, D, D0, D1)
    dweight = tl.sum(do0.to(tl.float32) * v0, 1)
    if D1 > 0:
        dweight += tl.sum(do1.to(tl.float32) * v1, 1)
    return z, dweight


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "num_tiles", "chunk", "part_rows"])
def landmark_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, do_strides, dq_strides, bias_strides, part_rows,
    num_heads, q_len, k_len, num_tiles, chunk, scale, square,
    STEP: tl.constexpr, STAGE: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SQUARE: tl.constexpr, HAS_FLOOR: tl.constexpr, IS_RELU: tl.constexpr,
    IS_ONE_TILE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, lse (base 2, +inf for empty rows) and delta of stage 2; parts of dq of stage 1.

    A part of dq has part_rows rows of all samples and heads.

    One program: BLOCK_Q rows of one head, over one part of the columns.
    """
    part = tl.program_id(1)
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_len
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, do_strides = in_elements(v_strides, STEP), in_elements(do_strides, STEP)
    dq_strides = in_elements(dq_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + start.to(tl.int64) * q_strides[2]
    do_ptr += batch * do_strides[0] + head * do_strides[1] + start.to(tl.int64) * do_strides[2]
    k_ptr += batch * k_strides[0] + (head // GROUP) * k_strides[1]
    v_ptr += batch * v_strides[0] + (head // GROUP) * v_strides[1]
    bias_ptr += batch * bias_strides[0] + (head // GROUP) * bias_strides[1]
    keys_at = (k_ptr, v_ptr, bias_ptr, k_strides[2], v_strides[2], square)
    floor_at = (v_ptr + k_len * v_strides[2], bias_ptr + k_len)
    q0, q1 = load_rows(q_ptr, q_strides[2], row_ok, BLOCK_Q, D, D0, D1, True)
    do0, do1 = load_rows(do_ptr, do_strides[2], row_ok, BLOCK_Q, D, D0, D1, True)
    dq0, dq1 = zero_chunks(BLOCK_Q, D0, D1)
    first = part * chunk
    last = tl.minimum(first + chunk, k_len)
    dfloor = tl.zeros([BLOCK_Q], tl.float32)
    if STAGE == 1:
        lse = tl.load(lse_ptr + head_at * q_len + rows, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_ptr + head_at * q_len + rows, mask=row_ok, other=0.0)
    else:
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)
        t = tl.zeros([BLOCK_Q], tl.float32)
        if IS_ONE_TILE:
            logits, dweights, products, k0, k1 = row_tile(
                q0, q1, do0, do1, keys_at, first, last, scale,
                HAS_BIAS, HAS_SQUARE, IS_RELU, D, D0, D1, BLOCK_K, PRECISION,
            )  # fmt: skip
            m, l, t, peak = fold_tile(m, l, t, peak, logits, dweights, products, scale, HAS_FLOOR)
        else:
            for column in range(first, last, BLOCK_K):
                logits, dweights, products, k0, k1 = row_tile(
                    q0, q1, do0, do1, keys_at, column, last, scale,
                    HAS_BIAS, HAS_SQUARE, IS_RELU, D, D0, D1, BLOCK_K, PRECISION,
                )  # fmt: skip
                m, l, t, peak = fold_tile(
                    m, l, t, peak, logits, dweights, products, scale, HAS_FLOOR
                )
        if HAS_FLOOR:
            z, dweight = floor_logit(
                peak, do0, do1, q0, q1, floor_at[0], floor_at[1], square, D, D0, D1
            )
            m_new = tl.maximum(m, z)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p, fade = tl.exp2(z - m_safe), tl.exp2(m - m_safe)
            m, l, t = m_new, l * fade + p, t * fade + p * dweight
        is_empty = l == 0.0
        lse = tl.where(is_empty, float("inf"), m + tl.log2(l))
        delta = t / tl.where(is_empty, 1.0, l)
        tl.store(lse_ptr + head_at * q_len + rows, lse, mask=row_ok)
        tl.store(delta_ptr + head_at * q_len + rows, delta, mask=row_ok)
        if HAS_FLOOR:
            dfloor = tl.exp2(z - lse) * (dweight - delta)
    if IS_ONE_TILE and STAGE == 2:
        dlogits = tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])
        dlogits = through_weight(dlogits, products, scale, IS_RELU)
        dq0, dq1 = add_dot(dq0, dq1, dlogits, k0, k1, D1, PRECISION)
    else:
        for column in range(first, last, BLOCK_K):
            logits, dweights, products, k0, k1 = row_tile(
                q0, q1, do0, do1, keys_at, column, last, scale,
                HAS_BIAS, HAS_SQUARE, IS_RELU, D, D0, D1, BLOCK_K, PRECISION,
            )  # fmt: skip
            dlogits = tl.exp2(logits - lse[:, None]) * (dweights - delta[:, None])
            dlogits = through_weight(dlogits, products, scale, IS_RELU)
            dq0, dq1 = add_dot(dq0, dq1, dlogits, k0, k1, D1, PRECISION)
    dq0 *= scale
    if D1 > 0:
        dq1 *= scale
    if HAS_FLOOR:
        dq0 += (dfloor * 2.0 * square)[:, None] * q0.to(tl.float32)
        if D1 > 0:
            dq1 += (dfloor * 2.0 * square)[:, None] * q1.to(tl.float32)
    dq_ptr += part.to(tl.int64) * part_rows * D
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1] + start.to(tl.int64) * dq_strides[2]
    store_rows(dq_ptr, dq_strides[2], q_len - start, dq0, dq1, BLOCK_Q, D, D0, D1)
