"""Forward kernels of landmark attention: one attention of rows over columns, for both stages.

    z_ij = log weight(scale * q_i.k_j) + b_j - square * |k_j|^2,    o_i = sum_j softmax_j(z_ij) v_j

Stage 1 has landmarks as rows and splits the long side, the columns, into parts that are combined in
order. Stage 2 has landmarks as columns; b_j is the lse of stage 1.
"""

import triton
import triton.language as tl

from ..tiles import add_dot, dot_rows, in_elements, load_rows, store_rows, zero_chunks
from .weights import load_columns, load_row, log_weight, squares


@triton.jit
def fold_floor(
    acc0, acc1, m, l, peak, q0, q1, v_ptr, bias_ptr, square,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Fold the floor into a finished row: one more column, of logit max_j u_ij + square * |q_i|^2.

    It stands for what is added to every feature: its value is weighed against the largest.
    """
    z = peak + (squares(q0, q1, D1) * square + tl.load(bias_ptr)) * 1.4426950408889634
    m_new = tl.maximum(m, z)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p, fade = tl.exp2(z - m_safe), tl.exp2(m - m_safe)
    v0, v1 = load_row(v_ptr, D, D0, D1)
    acc0 = acc0 * fade[:, None] + p[:, None] * v0
    if D1 > 0:
        acc1 = acc1 * fade[:, None] + p[:, None] * v1
    return acc0, acc1, l * fade + p


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "num_tiles", "chunk"])
def landmark_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, segment_ptr, o_ptr, lse_ptr, peak_ptr, sums_ptr,
    q_strides, k_strides, v_strides, o_strides, bias_strides, segment_stride,
    num_heads, q_len, k_len, num_tiles, chunk, scale, square,
    STEP: tl.constexpr, STAGE: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_FLOOR: tl.constexpr,
    NEEDS_PEAK: tl.constexpr, IS_RELU: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of stage 2, or the parts of o, lse and peak of stage 1 (float32, base 2).

    With segments also parts of the sums of k over the columns whose segment is the row's number.

    One program: BLOCK_Q rows of one head, over one part of the columns.
    """
    part = tl.program_id(1)
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)  # b * H + h; offsets pass 2**31
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    row_ok = rows < q_len
    q_strides, k_strides = in_elements(q_strides, STEP), in_elements(k_strides, STEP)
    v_strides, o_strides = in_elements(v_strides, STEP), in_elements(o_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + start.to(tl.int64) * q_strides[2]
    k_ptr += batch * k_strides[0] + (head // GROUP) * k_strides[1]
    v_ptr += batch * v_strides[0] + (head // GROUP) * v_strides[1]
    bias_ptr += batch * bias_strides[0] + (head // GROUP) * bias_strides[1]
    keys_at = (k_ptr, v_ptr, bias_ptr, k_strides[2], v_strides[2], square)
    q0, q1 = load_rows(q_ptr, q_strides[2], row_ok, BLOCK_Q, D, D0, D1, True)
    acc0, acc1 = zero_chunks(BLOCK_Q, D0, D1)
    sums0, sums1 = zero_chunks(BLOCK_Q, D0, D1)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    first = part * chunk
    last = tl.minimum(first + chunk, k_len)
    for column in range(first, last, BLOCK_K):
        k0, k1, v0, v1, shift = load_columns(
            keys_at, column, last, HAS_BIAS, HAS_SQUARE, D, D0, D1, BLOCK_K
        )
        z = log_weight(dot_rows(q0, q1, k0, k1, D1, PRECISION), scale, IS_RELU)
        if NEEDS_PEAK:
            shown = tl.where((shift == float("-inf"))[None, :], float("-inf"), z)
            peak = tl.maximum(peak, tl.max(shown, 1))
        z += shift[None, :]  # [BLOCK_Q, BLOCK_K]
        m_new = tl.maximum(m, tl.max(z, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(z - m_safe[:, None])
        fade = tl.exp2(m - m_safe)
        l = l * fade + tl.sum(p, 1)
        acc0 = acc0 * fade[:, None]
        if D1 > 0:
            acc1 = acc1 * fade[:, None]
        acc0, acc1 = add_dot(acc0, acc1, p, v0, v1, D1, PRECISION)
        m = m_new
        if HAS_SEGMENTS:
            columns = column + tl.arange(0, BLOCK_K)
            segment = tl.load(
                segment_ptr + batch * segment_stride + columns, mask=columns < last, other=-1
            )
            is_member = segment[None, :] == rows[:, None]  # [BLOCK_Q, BLOCK_K]
            sums0, sums1 = add_dot(sums0, sums1, is_member, k0, k1, D1, PRECISION)
    if HAS_FLOOR:  # its value and bias follow those of the columns
        acc0, acc1, l = fold_floor(
            acc0, acc1, m, l, peak, q0, q1, v_ptr + k_len * v_strides[2], bias_ptr + k_len,
            square, D, D0, D1,
        )  # fmt: skip
    share = 1.0 / tl.where(l == 0.0, 1.0, l)
    acc0 *= share[:, None]
    if D1 > 0:
        acc1 *= share[:, None]
    if STAGE == 1:
        at = (head_at + part * (tl.num_programs(0) // num_tiles).to(tl.int64)) * q_len + start
        o_ptr += at * D
        store_rows(o_ptr, D, q_len - start, acc0, acc1, BLOCK_Q, D, D0, D1)
        if HAS_SEGMENTS:
            store_rows(sums_ptr + at * D, D, q_len - start, sums0, sums1, BLOCK_Q, D, D0, D1)
        lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
        tl.store(lse_ptr + at + tl.arange(0, BLOCK_Q), lse, mask=row_ok)
        if NEEDS_PEAK:
            tl.store(peak_ptr + at + tl.arange(0, BLOCK_Q), peak, mask=row_ok)
    else:
        o_ptr += batch * o_strides[0] + head * o_strides[1] + start.to(tl.int64) * o_strides[2]
        store_rows(o_ptr, o_strides[2], q_len - start, acc0, acc1, BLOCK_Q, D, D0, D1)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def landmark_attention_fwd_combine_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, num_rows, num_parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """o = sum_t w_t o_t / sum_t w_t with w_t = exp(lse_t), in the order of the parts.

    One program: BLOCK_Q of the num_rows = B * H * m rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = rows < num_rows
    columns = tl.arange(0, BLOCK_D)[None, :]
    kept = row_ok[:, None] & (columns < D)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    for part in range(num_parts):
        at = rows + part * num_rows.to(tl.int64)
        part_lse = tl.load(part_lse_ptr + at, mask=row_ok, other=float("-inf"))
        part_o = tl.load(part_ptr + at[:, None] * D + columns, mask=kept, other=0.0)
        m_new = tl.maximum(m, part_lse)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, fade = tl.exp2(part_lse - m_safe), tl.exp2(m - m_safe)
        acc = acc * fade[:, None] + part_o * weight[:, None]
        l = l * fade + weight
        m = m_new
    acc /= tl.where(l == 0.0, 1.0, l)[:, None]
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)
    tl.store(o_ptr + rows[:, None] * D + columns, acc, mask=kept)
    tl.store(lse_ptr + rows, lse, mask=row_ok)
