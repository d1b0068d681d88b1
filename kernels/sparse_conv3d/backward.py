"""Weight gradient of convolution on active sites.

    dW_t = Σ_i x[stride * i + o_t]^T dy[i]

The sites are cut into splits whose number depends on sizes alone; a split's sum is kept in float32
and the splits are added in order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .call import Window, device_of, features, padded, precision
from .sites import source_rows, tile_sites


@triton.jit(do_not_specialize=["num_patches", "num_tiles", "split_tiles"])
def sparse_conv3d_bwd_dw_kernel(
    x_ptr, dy_ptr, dw_ptr, neighbours_ptr, num_patches, num_tiles, split_tiles,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW_t = Σ x[source_t]^T dy over one split of the sites.

    One program: one split, one tap, BLOCK_M channels of x by BLOCK_N of dy in one group, sites in
    steps of BLOCK_K. dw is [splits, taps, IN, GROUPS * OUT], float32.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    TILES_M: tl.constexpr = (IN + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tap = tl.program_id(0) // (TILES_M * TILES_N * GROUPS)
    group = tl.program_id(0) // (TILES_M * TILES_N) % GROUPS
    rows = (tl.program_id(0) // TILES_N % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < IN, columns < OUT
    columns += group * OUT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.program_id(1) * split_tiles
    for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
        patch, place, ok = tile_sites(tile, neighbours_ptr, num_patches, POOLED, False, BLOCK_K)
        source, found = source_rows(
            patch, place, ok, tap, neighbours_ptr, PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION
        )
        a = tl.load(
            x_ptr + source[:, None] * (GROUPS * IN) + (group * IN + rows)[None, :],
            mask=found[:, None] & row_ok[None, :], other=0.0,
        )  # fmt: skip
        site = patch.to(tl.int64) * (POOLED[0] * POOLED[1] * POOLED[2]) + place
        b = tl.load(  # where x is not found, dy must not count either: it may hold inf
            dy_ptr + site[:, None] * (GROUPS * OUT) + columns[None, :],
            mask=found[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    line = (tl.program_id(1).to(tl.int64) * TAPS + tap) * IN + rows
    out = dw_ptr + line[:, None] * (GROUPS * OUT) + columns[None, :]
    tl.store(out, acc, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["num_patches", "num_tiles", "split_tiles"])
def sparse_conv3d_depthwise_bwd_dw_kernel(
    x_ptr, dy_ptr, dw_ptr, neighbours_ptr, num_patches, num_tiles, split_tiles,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw_t = Σ x[source_t] * dy over one split of the sites, every channel by itself.

    One program: one split, one tap, BLOCK_C channels, sites in steps of BLOCK_M. dw is
    [splits, taps, CHANNELS], float32.
    """
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // TILES
    columns = (tl.program_id(0) % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(1) * split_tiles
    for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
        patch, place, ok = tile_sites(tile, neighbours_ptr, num_patches, POOLED, False, BLOCK_M)
        source, found = source_rows(
            patch, place, ok, tap, neighbours_ptr, PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION
        )
        kept = found[:, None] & column_ok[None, :]
        a = tl.load(x_ptr + source[:, None] * CHANNELS + columns[None, :], mask=kept, other=0.0)
        site = patch.to(tl.int64) * (POOLED[0] * POOLED[1] * POOLED[2]) + place
        b = tl.load(dy_ptr + site[:, None] * CHANNELS + columns[None, :], mask=kept, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    line = tl.program_id(1).to(tl.int64) * TAPS + tap
    tl.store(dw_ptr + line * CHANNELS + columns, tl.sum(acc, 0), mask=column_ok)


def weight_gradient(x: Tensor, dy: Tensor, neighbours: Tensor, window: Window) -> Tensor:
    """Return dW [C_out, C_in / groups, kx, ky, kz], float32, of x [P, px, py, pz, C_in] and dy."""
    x, dy = features(x), features(dy)
    inner, outer = x.shape[4] // window.groups, dy.shape[4] // window.groups
    if inner == outer == 1:
        dw = _depthwise(x, dy, neighbours, window).sum(0)
    else:
        x, dy = padded(x, window.groups), padded(dy, window.groups)
        dw = _grouped(x, dy, neighbours, window).sum(0)
        dw = without_padding(dw, inner, outer, window.groups)
    return dw.permute(2, 1, 0).unflatten(2, window.kernel)  # of [taps, inner, C_out]


def without_padding(dw: Tensor, inner: int, outer: int, groups: int) -> Tensor:
    """Return [taps, inner, groups * outer] of a gradient of padded channels."""
    return dw[:, :inner].unflatten(2, (groups, -1))[..., :outer].flatten(2)


def _grouped(x: Tensor, dy: Tensor, neighbours: Tensor, window: Window) -> Tensor:
    inner, outer = x.shape[4] // window.groups, dy.shape[4] // window.groups
    row = tuning.pick(tuning.BACKWARD_DW, x, outer)
    programs = window.taps * window.groups
    programs *= triton.cdiv(inner, row.tile_m) * triton.cdiv(outer, row.tile_n)
    num_tiles = triton.cdiv(x.shape[0] * window.sites, row.tile_k)
    splits, split_tiles = tuning.splits(num_tiles, row.tile_k, programs)
    dw = x.new_empty((splits, window.taps, inner, dy.shape[4]), dtype=tuning.SUMS)
    with device_of(x):
        sparse_conv3d_bwd_dw_kernel[(programs, splits)](
            x, dy, dw, neighbours, x.shape[0], num_tiles, split_tiles, **window.flags,
            GROUPS=window.groups, IN=inner, OUT=outer, PRECISION=precision(x.dtype, row.float32),
            BLOCK_M=row.tile_m, BLOCK_N=row.tile_n, BLOCK_K=row.tile_k,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return dw


def _depthwise(x: Tensor, dy: Tensor, neighbours: Tensor, window: Window) -> Tensor:
    channels = x.shape[4]
    row = tuning.pick(tuning.DEPTHWISE_DW, x, channels)
    programs = window.taps * triton.cdiv(channels, row.tile_n)
    num_tiles = triton.cdiv(x.shape[0] * window.sites, row.tile_m)
    splits, split_tiles = tuning.splits(num_tiles, row.tile_m, programs)
    dw = x.new_empty((splits, window.taps, 1, channels), dtype=tuning.SUMS)
    with device_of(x):
        sparse_conv3d_depthwise_bwd_dw_kernel[(programs, splits)](
            x, dy, dw, neighbours, x.shape[0], num_tiles, split_tiles, **window.flags,
            CHANNELS=channels, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return dw
