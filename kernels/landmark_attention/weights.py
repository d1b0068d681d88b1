"""Device helpers of landmark attention: the weight of a pair, and one tile of the backward.

A weight is exp(u) or relu(u) + 0.001 of the scaled product u; kernels work with its log, base 2, so
that one softmax serves both. Rows ("q") are normalised, columns ("k") are summed over: landmarks
are the rows of stage 1 and the columns of stage 2.
"""

import triton
import triton.language as tl

from ..tiles import dot_rows, load_rows


@triton.jit
def log_weight(products, scale, IS_RELU: tl.constexpr):
    """Return log2 of the weight of scale * products."""
    if IS_RELU:
        weight = tl.log2(tl.maximum(products * scale, 0.0) + 0.001)
    else:
        weight = products * (scale * 1.4426950408889634)
    return weight


@triton.jit
def through_weight(dlogits, products, scale, IS_RELU: tl.constexpr):
    """Return the gradient by u of what has gradient dlogits by the natural log of its weight."""
    if IS_RELU:
        u = products * scale
        dlogits = tl.where(u > 0.0, dlogits / (u + 0.001), 0.0)
    return dlogits


@triton.jit
def squares(x0, x1, D1: tl.constexpr):
    """Return the squared length of every row, float32."""
    total = tl.sum(x0.to(tl.float32) * x0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(x1.to(tl.float32) * x1.to(tl.float32), 1)
    return total


@triton.jit
def load_columns(
    keys_at, start, last,
    HAS_BIAS: tl.constexpr, HAS_SQUARE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load a tile of columns, and what is added to its log-weights: base 2, -inf if hidden.

    A hidden column is never loaded: its NaN stays there.
    """
    k_ptr, v_ptr, bias_ptr, k_stride, v_stride, square = keys_at
    columns = start + tl.arange(0, BLOCK_K)
    is_shown = columns < last
    shift = tl.where(is_shown, 0.0, float("-inf"))
    if HAS_BIAS:
        shift = tl.load(bias_ptr + columns, mask=is_shown, other=float("-inf"))
        is_shown = shift != float("-inf")
        shift *= 1.4426950408889634
    at = tl.cast(start, tl.int64)
    k0, k1 = load_rows(k_ptr + at * k_stride, k_stride, is_shown, BLOCK_K, D, D0, D1, True)
    v0, v1 = load_rows(v_ptr + at * v_stride, v_stride, is_shown, BLOCK_K, D, D0, D1, True)
    if HAS_SQUARE:
        shift -= squares(k0, k1, D1) * (square * 1.4426950408889634)
    return k0, k1, v0, v1, shift


@triton.jit
def row_tile(
    q0, q1, do0, do1, keys_at, start, last, scale,
    HAS_BIAS: tl.constexpr, HAS_SQUARE: tl.constexpr, IS_RELU: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return logits, do.v and q.k of a tile of columns, [BLOCK_Q, BLOCK_K], and its k."""
    k0, k1, v0, v1, shift = load_columns(
        keys_at, start, last, HAS_BIAS, HAS_SQUARE, D, D0, D1, BLOCK_K
    )
    products = dot_rows(q0, q1, k0, k1, D1, PRECISION)
    logits = log_weight(products, scale, IS_RELU) + shift[None, :]
    dweights = dot_rows(do0, do1, v0, v1, D1, PRECISION)
    return logits, dweights, products, k0, k1


@triton.jit
def load_row(ptr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Load one row as two chunks in float32, [1, D0] and [1, D1]."""
    columns = tl.arange(0, D0)
    first = tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)
        second = tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    else:
        second = first
    return first, second
