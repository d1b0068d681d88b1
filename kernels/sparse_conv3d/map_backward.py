"""Weight gradient of convolution through a kernel map.

    dW_t = Σ x[input]^T dy[output]      over the pairs of tap t

The pairs of a tap are cut into splits, as many for every tap, their number from sizes alone; each
split's sum is kept in float32 and the splits are added in order: no atomics.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .backward import without_padding
from .call import device_of, features, padded, precision


@triton.jit
def split_of(offsets_ptr, tap, BLOCK: tl.constexpr):
    """Return where a program's pairs of a tap begin and end, in whole blocks but for the last."""
    first, end = tl.load(offsets_ptr + tap), tl.load(offsets_ptr + tap + 1)
    blocks = tl.cdiv(tl.cdiv(end - first, BLOCK), tl.num_programs(1))
    begin = first + tl.program_id(1) * blocks * BLOCK
    return begin, tl.minimum(end, begin + blocks * BLOCK)


@triton.jit
def sparse_conv3d_map_bwd_dw_kernel(
    x_ptr, dy_ptr, dw_ptr, inputs_ptr, outputs_ptr, offsets_ptr,
    TAPS: tl.constexpr, GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW_t = Σ x[input]^T dy[output] over one split of the pairs of tap t.

    One program: one split, one tap, BLOCK_M channels of x by BLOCK_N of dy in one group, pairs in
    steps of BLOCK_K. dw is [splits, TAPS, IN, GROUPS * OUT], float32.
    """
    TILES_M: tl.constexpr = (IN + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tap = tl.program_id(0) // (TILES_M * TILES_N * GROUPS)
    group = tl.program_id(0) // (TILES_M * TILES_N) % GROUPS
    rows = (tl.program_id(0) // TILES_N % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < IN, columns < OUT
    columns += group * OUT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin, end = split_of(offsets_ptr, tap, BLOCK_K)
    for first in range(begin, end, BLOCK_K):
        pair = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        ok = pair < end
        source = tl.load(inputs_ptr + pair, mask=ok, other=0).to(tl.int64)
        target = tl.load(outputs_ptr + pair, mask=ok, other=0).to(tl.int64)
        a = tl.load(
            x_ptr + source[:, None] * (GROUPS * IN) + (group * IN + rows)[None, :],
            mask=ok[:, None] & row_ok[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            dy_ptr + target[:, None] * (GROUPS * OUT) + columns[None, :],
            mask=ok[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    line = (tl.program_id(1).to(tl.int64) * TAPS + tap) * IN + rows
    out = dw_ptr + line[:, None] * (GROUPS * OUT) + columns[None, :]
    tl.store(out, acc, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def sparse_conv3d_map_depthwise_bwd_dw_kernel(
    x_ptr, dy_ptr, dw_ptr, inputs_ptr, outputs_ptr, offsets_ptr,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw_t = Σ x[input] * dy[output] over one split of the pairs of tap t, channel by channel.

    One program: one split, one tap, BLOCK_C channels, pairs in steps of BLOCK_M. dw is
    [splits, TAPS, CHANNELS], float32.
    """
    TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // TILES
    columns = (tl.program_id(0) % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    begin, end = split_of(offsets_ptr, tap, BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        ok = pair < end
        source = tl.load(inputs_ptr + pair, mask=ok, other=0).to(tl.int64)
        target = tl.load(outputs_ptr + pair, mask=ok, other=0).to(tl.int64)
        kept = ok[:, None] & column_ok[None, :]
        a = tl.load(x_ptr + source[:, None] * CHANNELS + columns[None, :], mask=kept, other=0.0)
        b = tl.load(dy_ptr + target[:, None] * CHANNELS + columns[None, :], mask=kept, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    line = tl.program_id(1).to(tl.int64) * TAPS + tap
    tl.store(dw_ptr + line * CHANNELS + columns, tl.sum(acc, 0), mask=column_ok)


def weight_gradient(
    x: Tensor, dy: Tensor, pairs: tuple[Tensor, ...], shape: tuple[int, ...], groups: int
) -> Tensor:
    """Return dW of a shape [C_out, C_in / groups, kx, ky, kz], float32.

    x [N_in, C_in], dy [N_out, C_out]; pairs are inputs, outputs [taps * N_out] and offsets
    [taps + 1], the pairs of tap t from offsets[t] on.
    """
    x, dy, taps = features(x), features(dy), math.prod(shape[2:])
    if shape[1] == 1 and shape[0] == groups:
        dw = _depthwise(x, dy, pairs, taps).sum(0)
    else:
        dw = _grouped(padded(x, groups), padded(dy, groups), pairs, taps, groups).sum(0)
        dw = without_padding(dw, shape[1], shape[0] // groups, groups)
    return dw.permute(2, 1, 0).unflatten(2, shape[2:])  # of [taps, IN, C_out]


def _grouped(x: Tensor, dy: Tensor, pairs: tuple[Tensor, ...], taps: int, groups: int) -> Tensor:
    inner, outer = x.shape[1] // groups, dy.shape[1] // groups
    row = tuning.pick(tuning.MAP_BACKWARD_DW, x, outer)
    programs = taps * groups * triton.cdiv(inner, row.tile_m) * triton.cdiv(outer, row.tile_n)
    splits, _ = tuning.splits(triton.cdiv(dy.shape[0], row.tile_k), row.tile_k, programs)
    dw = x.new_empty((splits, taps, inner, dy.shape[1]), dtype=tuning.SUMS)
    with device_of(x):
        sparse_conv3d_map_bwd_dw_kernel[(programs, splits)](
            x, dy, dw, *pairs, TAPS=taps, GROUPS=groups, IN=inner, OUT=outer,
            PRECISION=precision(x.dtype, row.float32), BLOCK_M=row.tile_m, BLOCK_N=row.tile_n,
            BLOCK_K=row.tile_k, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return dw


def _depthwise(x: Tensor, dy: Tensor, pairs: tuple[Tensor, ...], taps: int) -> Tensor:
    channels = x.shape[1]
    row = tuning.pick(tuning.DEPTHWISE_DW, x, channels)
    programs = taps * triton.cdiv(channels, row.tile_n)
    splits, _ = tuning.splits(triton.cdiv(dy.shape[0], row.tile_m), row.tile_m, programs)
    dw = x.new_empty((splits, taps, 1, channels), dtype=tuning.SUMS)
    with device_of(x):
        sparse_conv3d_map_depthwise_bwd_dw_kernel[(programs, splits)](
            x, dy, dw, *pairs, TAPS=taps, CHANNELS=channels, BLOCK_M=row.tile_m,
            BLOCK_C=row.tile_n, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return dw
