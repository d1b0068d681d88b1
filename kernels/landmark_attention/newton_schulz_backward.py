"""Backward kernel of newton_schulz: the recurrence once more, then unrolled from its end.

With G_i the gradient of Z_i, T2 = 15 I - Y (7 I - Y) and T3 = 13 I - Y T2 of step i:

    X3 = Z_i^T G_{i+1} / 4,   X2 = -Y^T X3
    dY = -X3 T2^T - X2 (7 I - Y)^T + Y^T X2
    dA += dY Z_i^T,   G_i = G_{i+1} T3^T / 4 + A^T dY
"""

import triton
import triton.language as tl

from .matrices import add_product, apply, multiply, outer, places, polynomial, start


@triton.jit
def step_back(
    g_ptr, da_ptr, a_ptr, z_ptr, y_ptr, second_ptr, third_ptr, x3_ptr, x2_ptr, dy_ptr, next_ptr,
    M: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Put the gradient of Z_i to next, from that of Z_{i+1} in g, and add to da."""
    polynomial(y_ptr, second_ptr, third_ptr, a_ptr, z_ptr, M, TILE, PRECISION)
    multiply(x3_ptr, z_ptr, g_ptr, 0.25, g_ptr, 0.0, 0.0, True, False, False, M, TILE, PRECISION)
    multiply(x2_ptr, y_ptr, x3_ptr, -1.0, g_ptr, 0.0, 0.0, True, False, False, M, TILE, PRECISION)
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        acc = tl.zeros([TILE, TILE], tl.float32)
        acc = -add_product(acc, x3_ptr, second_ptr, i, j, False, True, M, TILE, PRECISION)
        acc = add_product(acc, x2_ptr, y_ptr, i, j, False, True, M, TILE, PRECISION)
        acc = add_product(acc, y_ptr, x2_ptr, i, j, True, False, M, TILE, PRECISION)
        at = places(i, j, M, TILE)
        tl.store(dy_ptr + at, acc - 7.0 * tl.load(x2_ptr + at))
    tl.debug_barrier()
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        at = places(i, j, M, TILE)
        da = tl.load(da_ptr + at)
        da = add_product(da, dy_ptr, z_ptr, i, j, False, True, M, TILE, PRECISION)
        tl.store(da_ptr + at, da)
        acc = tl.zeros([TILE, TILE], tl.float32)
        acc = 0.25 * add_product(acc, g_ptr, third_ptr, i, j, False, True, M, TILE, PRECISION)
        acc = add_product(acc, a_ptr, dy_ptr, i, j, True, False, M, TILE, PRECISION)
        tl.store(next_ptr + at, acc)
    tl.debug_barrier()


@triton.jit
def through_start(dz_ptr, da_ptr, a_ptr, z_ptr, sums, norm, M: tl.constexpr, TILE: tl.constexpr):
    """Turn the gradient of Z_0 = A^T / norm and da into the gradient of A's logits, in da.

    The norm is the largest sum of a column; equal columns share its gradient.
    """
    columns = tl.arange(0, M)
    along = tl.zeros([16], tl.float32)
    for row in range(0, M, 16):
        at = (row + tl.arange(0, 16))[:, None] * M + columns[None, :]
        along += tl.sum(tl.load(dz_ptr + at) * tl.load(z_ptr + at), 1)
    is_largest = sums == norm
    ties = tl.maximum(tl.sum(is_largest.to(tl.float32), 0), 1.0)
    of_column = tl.where(is_largest, -tl.sum(along, 0) / (norm * ties), 0.0)
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        at = places(i, j, M, TILE)
        dz = tl.trans(tl.load(dz_ptr + places(j, i, M, TILE)))
        tl.store(da_ptr + at, tl.load(da_ptr + at) + dz / norm)
    tl.debug_barrier()
    for row in range(0, M, 16):
        at = (row + tl.arange(0, 16))[:, None] * M + columns[None, :]
        weights = tl.load(a_ptr + at)
        da = tl.load(da_ptr + at) + of_column[None, :]
        tl.store(da_ptr + at, weights * (da - tl.sum(weights * da, 1)[:, None]))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_heads", "length", "iterations"])
def newton_schulz_bwd_kernel(
    do_ptr, q_ptr, k_ptr, s_ptr, mask_ptr, dq_ptr, dk_ptr, ds_ptr, work_ptr,
    num_heads, length, iterations, scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, ds [B, H, m, D], float32, from do; all contiguous.

    One program: one head, with iterations + 11 matrices of its own to work in.
    """
    head_at = tl.program_id(0).to(tl.int64)
    rows_at = head_at * length * D
    a_ptr = work_ptr + head_at * (iterations + 11) * M * M
    y_ptr, second_ptr, third_ptr = a_ptr + M * M, a_ptr + 2 * M * M, a_ptr + 3 * M * M
    x3_ptr, x2_ptr, dy_ptr = a_ptr + 4 * M * M, a_ptr + 5 * M * M, a_ptr + 6 * M * M
    da_ptr, g_ptr, next_ptr = a_ptr + 7 * M * M, a_ptr + 8 * M * M, a_ptr + 9 * M * M
    z_ptr = a_ptr + 10 * M * M  # and those of the following steps behind it
    sums, norm = start(
        a_ptr, z_ptr, q_ptr + rows_at, k_ptr + rows_at, mask_ptr + head_at // num_heads * length,
        length, scale, HAS_MASK, D, M, TILE, PRECISION,
    )  # fmt: skip
    for _ in range(iterations):
        polynomial(y_ptr, second_ptr, third_ptr, a_ptr, z_ptr, M, TILE, PRECISION)
        multiply(
            z_ptr + M * M, z_ptr, third_ptr, 0.25, z_ptr, 0.0, 0.0, False, False, False,
            M, TILE, PRECISION,
        )  # fmt: skip
        z_ptr += M * M
    apply(
        ds_ptr + rows_at, z_ptr, do_ptr + rows_at, length, 1.0, True, D, M, TILE, PRECISION,
    )  # fmt: skip
    outer(g_ptr, do_ptr + rows_at, s_ptr + rows_at, length, 1.0, D, M, TILE, PRECISION)
    for tile in range((M // TILE) * (M // TILE)):
        at = places(tile // (M // TILE), tile % (M // TILE), M, TILE)
        tl.store(da_ptr + at, tl.zeros([TILE, TILE], tl.float32))
    tl.debug_barrier()
    for _ in range(iterations):
        z_ptr -= M * M
        step_back(
            g_ptr, da_ptr, a_ptr, z_ptr, y_ptr, second_ptr, third_ptr, x3_ptr, x2_ptr, dy_ptr,
            next_ptr, M, TILE, PRECISION,
        )  # fmt: skip
        g_ptr, next_ptr = next_ptr, g_ptr
    through_start(g_ptr, da_ptr, a_ptr, z_ptr, sums, norm, M, TILE)
    apply(
        dq_ptr + rows_at, da_ptr, k_ptr + rows_at, length, scale, False, D, M, TILE, PRECISION,
    )  # fmt: skip
    apply(
        dk_ptr + rows_at, da_ptr, q_ptr + rows_at, length, scale, True, D, M, TILE, PRECISION,
    )  # fmt: skip
