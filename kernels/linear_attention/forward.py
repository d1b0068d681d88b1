"""Forward kernels of linear_attention.

    S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),   o_i = f(q_i) S / (f(q_i).z)

S and z stay float32, one [D, D + 1] a head, z last. Products take float32 operands, TF32 for 16-bit
inputs: their sums are not bound to the range of float16.
"""

import triton
import triton.language as tl

from ..tiles import in_elements
from .features import feature, load_S, load_tokens, load_z, store_tokens, vanishes


@triton.jit(do_not_specialize=["num_heads", "length", "chunk"])
def linear_attention_sums_kernel(
    x_ptr, y_ptr, mask_ptr, inverse_ptr, weight_ptr, part_ptr,
    x_strides, y_strides, mask_stride, num_heads, length, chunk,
    STEP: tl.constexpr, HAS_MASK: tl.constexpr, IS_BACKWARD: tl.constexpr, GROUP: tl.constexpr,
    MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of sum_n f(x_n) y_n^T and sum_n f(x_n): of S and z, or with IS_BACKWARD of dS and dz.

    There x is q, y is do times 1 / (f(q).z), and f(q_n) in the second sum has a weight.
    One program: one part of the tokens of one head, or of the GROUP query heads of a key head.
    """
    part = tl.program_id(1)
    head_at = tl.program_id(0).to(tl.int64)  # b * H + h, or of key heads with GROUP
    heads = num_heads // GROUP
    batch, head = head_at // heads, head_at % heads
    mask_ptr += batch * mask_stride
    x_strides, y_strides = in_elements(x_strides, STEP), in_elements(y_strides, STEP)
    S = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    first = part * chunk
    last = tl.minimum(first + chunk, length)
    for member in range(GROUP):
        of_x = x_ptr + batch * x_strides[0] + (head * GROUP + member) * x_strides[1]
        of_y = y_ptr + batch * y_strides[0] + (head * GROUP + member) * y_strides[1]
        row_at = (batch * num_heads + head * GROUP + member) * length
        for start in range(first, last, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            is_shown = tokens < last
            if HAS_MASK:
                is_shown = tl.load(mask_ptr + tokens, mask=is_shown, other=0) != 0
            x = load_tokens(of_x, start, x_strides[2], is_shown, 0, D, BLOCK_N, BLOCK_D)
            y = load_tokens(of_y, start, y_strides[2], is_shown, 0, D, BLOCK_N, BLOCK_D)
            # past column D and for hidden tokens x is 0, but elu(0) + 1 is not
            kept = is_shown[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
            f = tl.where(kept, feature(x, MAP), 0.0)  # [BLOCK_N, BLOCK_D]
            if IS_BACKWARD:
                inverse = tl.load(inverse_ptr + row_at + tokens, mask=is_shown, other=0.0)
                weight = tl.load(weight_ptr + row_at + tokens, mask=is_shown, other=0.0)
                y *= inverse[:, None]
                z += tl.sum(f * weight[:, None], 0)
            else:
                z += tl.sum(f, 0)
            S = tl.dot(tl.trans(f), y, S, input_precision=PRECISION)
    part_ptr += (head_at + part * tl.num_programs(0).to(tl.int64)) * (D * (D + 1))
    rows = tl.arange(0, BLOCK_D)
    columns = rows[None, :]
    kept = (rows < D)[:, None] & (columns < D)
    tl.store(part_ptr + rows[:, None] * (D + 1) + columns, S, mask=kept)
    tl.store(part_ptr + rows * (D + 1) + D, z, mask=rows < D)


@triton.jit(do_not_specialize=["num_heads", "length", "num_tiles"])
def linear_attention_fwd_kernel(
    q_ptr, sums_ptr, o_ptr, q_strides, o_strides, num_heads, length, num_tiles,
    STEP: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o, 0 where the denominator is. One program: BLOCK_N queries of one head; S by COLUMNS."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_N
    in_range = start + tl.arange(0, BLOCK_N) < length
    sums_ptr += head_at // GROUP * (D * (D + 1))
    q_strides, o_strides = in_elements(q_strides, STEP), in_elements(o_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    q = load_tokens(q_ptr, start, q_strides[2], in_range, 0, D, BLOCK_N, BLOCK_D)
    f = feature(q, MAP)  # past column D the sums are 0
    below = tl.sum(f * load_z(sums_ptr, D, BLOCK_D)[None, :], 1)
    is_zero = vanishes(below)[:, None]
    below = tl.where(is_zero, 1.0, below[:, None])
    o_ptr += batch * o_strides[0] + head * o_strides[1]
    for first in range(0, BLOCK_D, COLUMNS):
        S = load_S(sums_ptr, first, D, BLOCK_D, COLUMNS)
        o = tl.where(is_zero, 0.0, tl.dot(f, S, input_precision=PRECISION) / below)
        store_tokens(o_ptr, start, o_strides[2], o, length, first, D, BLOCK_N, COLUMNS)
