"""Forward kernel of newton_schulz: the whole recurrence of a head in one program.

A = softmax(scale * q k^T),   Z_0 = A^T / max_c sum_r A_rc
Y = A Z_i,   Z_{i+1} = Z_i (13 I - Y (15 I - Y (7 I - Y))) / 4,   out = Z_t s
"""

import triton
import triton.language as tl

from .matrices import apply, multiply, polynomial, start


@triton.jit(do_not_specialize=["num_heads", "length", "iterations"])
def newton_schulz_fwd_kernel(
    q_ptr, k_ptr, s_ptr, mask_ptr, out_ptr, work_ptr, num_heads, length, iterations, scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, H, m, D] from landmarks q, k and values s, all contiguous.

    One program: one head, with six matrices of its own to work in.
    """
    head_at = tl.program_id(0).to(tl.int64)
    rows_at = head_at * length * D
    a_ptr = work_ptr + head_at * 6 * M * M
    y_ptr, second_ptr, third_ptr = a_ptr + M * M, a_ptr + 2 * M * M, a_ptr + 3 * M * M
    z_ptr, next_ptr = a_ptr + 4 * M * M, a_ptr + 5 * M * M
    start(
        a_ptr, z_ptr, q_ptr + rows_at, k_ptr + rows_at, mask_ptr + head_at // num_heads * length,
        length, scale, HAS_MASK, D, M, TILE, PRECISION,
    )  # fmt: skip
    for _ in range(iterations):
        polynomial(y_ptr, second_ptr, third_ptr, a_ptr, z_ptr, M, TILE, PRECISION)
        multiply(
            next_ptr, z_ptr, third_ptr, 0.25, z_ptr, 0.0, 0.0, False, False, False,
            M, TILE, PRECISION,
        )  # fmt: skip
        z_ptr, next_ptr = next_ptr, z_ptr
    apply(
        out_ptr + rows_at, z_ptr, s_ptr + rows_at, length, 1.0, False, D, M, TILE, PRECISION,
    )  # fmt: skip
