"""Device helpers for the square matrices of one head, which lie in memory as [M, M], float32.

One program owns them. It walks a result tile by tile; the barrier after each walk shows what one
thread wrote to all others of the program.
"""

import triton
import triton.language as tl


@triton.jit
def places(i, j, M: tl.constexpr, TILE: tl.constexpr):
    """Return where the elements of tile (i, j) lie in a matrix."""
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    return rows[:, None] * M + columns[None, :]


@triton.jit
def add_product(
    acc, a_ptr, b_ptr, i, j,
    IS_A_T: tl.constexpr, IS_B_T: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + tile (i, j) of a @ b, of a or b transposed."""
    for k in range(M // TILE):
        if IS_A_T:
            a = tl.trans(tl.load(a_ptr + places(k, i, M, TILE)))
        else:
            a = tl.load(a_ptr + places(i, k, M, TILE))
        if IS_B_T:
            b = tl.trans(tl.load(b_ptr + places(j, k, M, TILE)))
        else:
            b = tl.load(b_ptr + places(k, j, M, TILE))
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply(
    out_ptr, a_ptr, b_ptr, factor, added_ptr, weight, diagonal,
    IS_A_T: tl.constexpr, IS_B_T: tl.constexpr, HAS_ADDED: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor * a @ b + weight * added + diagonal * I; out is none of a and b."""
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        at = places(i, j, M, TILE)
        acc = tl.zeros([TILE, TILE], tl.float32)
        acc = add_product(acc, a_ptr, b_ptr, i, j, IS_A_T, IS_B_T, M, TILE, PRECISION) * factor
        if HAS_ADDED:
            acc += tl.load(added_ptr + at) * weight
        is_diagonal = at // M == at % M
        tl.store(out_ptr + at, acc + tl.where(is_diagonal, diagonal, 0.0))
    tl.debug_barrier()


@triton.jit
def polynomial(
    y_ptr, second_ptr, third_ptr, a_ptr, z_ptr,
    M: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = a @ z, second = 15 I - y (7 I - y), third = 13 I - y second: z' is z third / 4."""
    multiply(y_ptr, a_ptr, z_ptr, 1.0, a_ptr, 0.0, 0.0, False, False, False, M, TILE, PRECISION)
    multiply(
        second_ptr, y_ptr, y_ptr, 1.0, y_ptr, -7.0, 15.0, False, False, True, M, TILE, PRECISION
    )
    multiply(
        third_ptr, y_ptr, second_ptr, -1.0, y_ptr, 0.0, 13.0, False, False, False,
        M, TILE, PRECISION,
    )  # fmt: skip


@triton.jit
def load_landmarks(ptr, i, j, length, D: tl.constexpr, TILE: tl.constexpr):
    """Load tile (i, j) of landmarks [length, D] in float32, 0 past their end."""
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    kept = (rows < length)[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None] * D + columns[None, :], mask=kept, other=0.0).to(tl.float32)


@triton.jit
def apply(
    out_ptr, a_ptr, x_ptr, length, factor,
    IS_A_T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor * a @ x, with x and out [length, D] in memory, length <= M."""
    for tile in range((M // TILE) * ((D + TILE - 1) // TILE)):
        i, j = tile % (M // TILE), tile // (M // TILE)
        acc = tl.zeros([TILE, TILE], tl.float32)
        for k in range(M // TILE):
            if IS_A_T:
                a = tl.trans(tl.load(a_ptr + places(k, i, M, TILE)))
            else:
                a = tl.load(a_ptr + places(i, k, M, TILE))
            x = load_landmarks(x_ptr, k, j, length, D, TILE)
            acc = tl.dot(a, x, acc, input_precision=PRECISION)
        rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        kept = (rows < length)[:, None] & (columns < D)[None, :]
        tl.store(out_ptr + rows[:, None] * D + columns[None, :], acc * factor, mask=kept)


@triton.jit
def outer(
    out_ptr, x_ptr, y_ptr, length, factor,
    D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor * x @ y.T, with x and y [length, D] in memory; 0 past length."""
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        acc = tl.zeros([TILE, TILE], tl.float32)
        for k in range((D + TILE - 1) // TILE):
            x = load_landmarks(x_ptr, i, k, length, D, TILE)
            y = tl.trans(load_landmarks(y_ptr, j, k, length, D, TILE))
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        tl.store(out_ptr + places(i, j, M, TILE), acc * factor)
    tl.debug_barrier()


@triton.jit
def start(
    a_ptr, z_ptr, q_ptr, k_ptr, mask_ptr, length, scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a = softmax(scale * q @ k.T), z = a.T / norm; return the sums of a's columns and their norm.

    Rows and columns past length, and masked ones, are 0.
    """
    outer(a_ptr, q_ptr, k_ptr, length, scale * 1.4426950408889634, D, M, TILE, PRECISION)
    columns = tl.arange(0, M)
    is_shown = columns < length
    if HAS_MASK:
        is_shown &= tl.load(mask_ptr + columns, mask=is_shown, other=0) != 0
    sums = tl.zeros([M], tl.float32)
    for row in range(0, M, 16):
        rows = row + tl.arange(0, 16)
        row_ok = rows < length
        if HAS_MASK:
            row_ok &= tl.load(mask_ptr + rows, mask=row_ok, other=0) != 0
        at = a_ptr + rows[:, None] * M + columns[None, :]
        shown = row_ok[:, None] & is_shown[None, :]
        logits = tl.where(shown, tl.load(at), float("-inf"))
        top = tl.max(logits, 1)
        weights = tl.exp2(logits - tl.where(row_ok, top, 0.0)[:, None])
        weights /= tl.where(row_ok, tl.sum(weights, 1), 1.0)[:, None]
        tl.store(at, weights)
        sums += tl.sum(weights, 0)
    tl.debug_barrier()
    norm = tl.max(sums, 0)
    norm = tl.where(norm == 0.0, 1.0, norm)
    for tile in range((M // TILE) * (M // TILE)):
        i, j = tile // (M // TILE), tile % (M // TILE)
        a = tl.trans(tl.load(a_ptr + places(j, i, M, TILE)))
        tl.store(z_ptr + places(i, j, M, TILE), a / norm)
    tl.debug_barrier()
    return sums, norm
