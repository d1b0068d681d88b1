"""Backward kernels of linear_attention.

c_i = 1 / (f(q_i).z),   g_i = -c_i do_i.o_i,   o_i = c_i f(q_i) S made anew
dq_i = f'(q_i) (c_i S do_i + g_i z)
dS = sum_i c_i f(q_i) do_i^T,   dz = sum_i g_i f(q_i)         linear_attention_sums_kernel
dk_j = f'(k_j) (dS v_j + dz),   dv_j = dS^T f(k_j)
"""

import triton
import triton.language as tl

from ..tiles import in_elements
from .features import feature, load_S, load_tokens, load_z, slope, store_tokens, vanishes


@triton.jit(do_not_specialize=["num_heads", "length", "num_tiles"])
def linear_attention_bwd_dq_kernel(
    q_ptr, sums_ptr, do_ptr, dq_ptr, inverse_ptr, weight_ptr,
    q_strides, do_strides, dq_strides, num_heads, length, num_tiles,
    STEP: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, c and g. One program: BLOCK_N queries of one head; S by COLUMNS."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_N
    tokens = start + tl.arange(0, BLOCK_N)
    in_range = tokens < length
    sums_ptr += head_at // GROUP * (D * (D + 1))
    z = load_z(sums_ptr, D, BLOCK_D)
    q_strides, do_strides = in_elements(q_strides, STEP), in_elements(do_strides, STEP)
    dq_strides = in_elements(dq_strides, STEP)
    q_ptr += batch * q_strides[0] + head * q_strides[1]
    do_ptr += batch * do_strides[0] + head * do_strides[1]
    q = load_tokens(q_ptr, start, q_strides[2], in_range, 0, D, BLOCK_N, BLOCK_D)
    f = feature(q, MAP)
    below = tl.sum(f * z[None, :], 1)
    is_zero = vanishes(below)
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, below))
    df = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, BLOCK_D, COLUMNS):
        S = load_S(sums_ptr, first, D, BLOCK_D, COLUMNS)
        do = load_tokens(do_ptr, start, do_strides[2], in_range, first, D, BLOCK_N, COLUMNS)
        df = tl.dot(do, tl.trans(S), df, input_precision=PRECISION)
    weight = -tl.sum(df * f, 1) * inverse * inverse
    df = df * inverse[:, None] + weight[:, None] * z[None, :]
    dq = df * slope(f, MAP)
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1]
    store_tokens(dq_ptr, start, dq_strides[2], dq, length, 0, D, BLOCK_N, BLOCK_D)
    tl.store(inverse_ptr + head_at * length + tokens, inverse, mask=in_range)
    tl.store(weight_ptr + head_at * length + tokens, weight, mask=in_range)


@triton.jit(do_not_specialize=["num_heads", "length", "num_tiles"])
def linear_attention_bwd_dkv_kernel(
    k_ptr, v_ptr, mask_ptr, dsums_ptr, dk_ptr, dv_ptr,
    k_strides, v_strides, dk_strides, dv_strides, mask_stride, num_heads, length, num_tiles,
    STEP: tl.constexpr, HAS_MASK: tl.constexpr, MAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, 0 for hidden keys. One program: BLOCK_N keys of one head; dS by COLUMNS."""
    head_at = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_at // num_heads, head_at % num_heads
    start = (tl.program_id(0) % num_tiles) * BLOCK_N
    tokens = start + tl.arange(0, BLOCK_N)
    in_range = tokens < length
    is_shown = in_range
    if HAS_MASK:
        is_shown = tl.load(mask_ptr + batch * mask_stride + tokens, mask=in_range, other=0) != 0
    dsums_ptr += head_at * (D * (D + 1))
    k_strides, v_strides = in_elements(k_strides, STEP), in_elements(v_strides, STEP)
    dk_strides, dv_strides = in_elements(dk_strides, STEP), in_elements(dv_strides, STEP)
    k_ptr += batch * k_strides[0] + head * k_strides[1]
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    k = load_tokens(k_ptr, start, k_strides[2], is_shown, 0, D, BLOCK_N, BLOCK_D)
    f = feature(k, MAP)
    dk_ptr += batch * dk_strides[0] + head * dk_strides[1]
    dv_ptr += batch * dv_strides[0] + head * dv_strides[1]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + load_z(dsums_ptr, D, BLOCK_D)[None, :]
    for first in range(0, BLOCK_D, COLUMNS):
        dS = load_S(dsums_ptr, first, D, BLOCK_D, COLUMNS)
        v = load_tokens(v_ptr, start, v_strides[2], is_shown, first, D, BLOCK_N, COLUMNS)
        dk = tl.dot(v, tl.trans(dS), dk, input_precision=PRECISION)
        dv = tl.dot(f, dS, input_precision=PRECISION)
        dv = tl.where(is_shown[:, None], dv, 0.0)
        store_tokens(dv_ptr, start, dv_strides[2], dv, length, first, D, BLOCK_N, COLUMNS)
    dk = tl.where(is_shown[:, None], dk * slope(f, MAP), 0.0)
    store_tokens(dk_ptr, start, dk_strides[2], dk, length, 0, D, BLOCK_N, BLOCK_D)
