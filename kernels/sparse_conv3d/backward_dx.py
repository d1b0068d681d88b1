"""Input gradient of convolution of active sites with a stride.

    dx[j] = Σ_t dy[(j - o_t) / stride] W_t^T      over taps t with j - o_t divisible by the stride

Sites of one kind, that is of one remainder by the stride along each axis, read through the same
taps; a tile has sites of one kind and walks its taps alone. Each site belongs to one program and
its taps are added in order: no atomics.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import forward, tuning
from .call import Window, device_of, features, precision
from .forward import add_tap, in_lines
from .sites import neighbour, reach_of, split_place, tile_rows, tile_sites


@triton.constexpr_function
def step_of(stride, dilation):
    """Return how far apart the taps of one kind are."""
    return stride // math.gcd(stride, dilation)


@triton.jit
def taps_of(
    kind, KERNEL: tl.constexpr, STRIDE: tl.constexpr, LOW: tl.constexpr, DILATION: tl.constexpr
):  # fmt: skip
    """Return along one axis the first tap that reads sites of a kind, and how many do."""
    STEP: tl.constexpr = step_of(STRIDE, DILATION)
    first = kind * 0 + KERNEL
    for back in tl.static_range(STEP):
        tap = STEP - 1 - back
        first = tl.where((kind + LOW - DILATION * tap) % STRIDE == 0, tap, first)
    return first, (KERNEL + STEP - 1 - first) // STEP


@triton.jit
def reader_step(
    at, kind, tap, KERNEL: tl.constexpr, STRIDE: tl.constexpr, LOW: tl.constexpr,
    DILATION: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return along one axis the patch and the place of the output that reads STRIDE * at + kind."""
    moved = at + (kind + LOW - DILATION * tap) // STRIDE  # without a remainder
    moved += reach_of(KERNEL, STRIDE, LOW, DILATION, SIZE * STRIDE) * SIZE
    return moved // SIZE, moved % SIZE


@triton.jit
def reader_rows(
    patch, x, y, z, ok, kind_x, kind_y, kind_z, tap_x, tap_y, tap_z, neighbours_ptr,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Return the row of dy that reads each site through a tap, and whether it is active."""
    cell_x, x = reader_step(x, kind_x, tap_x, KERNEL[0], STRIDE[0], LOW[0], DILATION[0], POOLED[0])
    cell_y, y = reader_step(y, kind_y, tap_y, KERNEL[1], STRIDE[1], LOW[1], DILATION[1], POOLED[1])
    cell_z, z = reader_step(z, kind_z, tap_z, KERNEL[2], STRIDE[2], LOW[2], DILATION[2], POOLED[2])
    source = neighbour(
        patch, ok, cell_x, cell_y, cell_z, neighbours_ptr, PATCH, KERNEL, STRIDE, LOW, DILATION
    )
    row = tl.maximum(source, 0).to(tl.int64) * (POOLED[0] * POOLED[1] * POOLED[2])
    return row + (x * POOLED[1] + y) * POOLED[2] + z, source >= 0


@triton.jit
def written_rows(
    tile, num_patches, kind_x, kind_y, kind_z, PATCH: tl.constexpr, POOLED: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return the row of dx where a kind starts in a tile's first patch, rows from it on, and ok.

    For the store, see tile_rows. Beyond the first patch x goes on, as rows of dx do.
    """
    SITES: tl.constexpr = POOLED[0] * POOLED[1] * POOLED[2]
    first, rows, ok = tile_rows(tile, num_patches.to(tl.int64) * SITES, BLOCK_M)
    patch = first // SITES
    x, y, z = split_place(rows + (first - patch * SITES).to(tl.int32), POOLED)
    row = (x * STRIDE[0] * PATCH[1] + y * STRIDE[1]) * PATCH[2] + z * STRIDE[2]
    at = patch * PATCH[0] + kind_x
    return (at * PATCH[1] + kind_y) * PATCH[2] + kind_z, row.to(tl.int64), ok


@triton.jit(do_not_specialize=["num_patches"])
def sparse_conv3d_strided_bwd_dx_kernel(
    dy_ptr, weight_ptr, dx_ptr, neighbours_ptr, num_patches,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, LINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = Σ_t dy[reader_t] W_t^T, with IN channels of dy and OUT of dx a group.

    One program: BLOCK_M sites of one kind, BLOCK_N channels of one group. weight is
    [taps, IN, GROUPS * LINE], of which OUT channels a group count.
    """
    KINDS: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(1) // TILES_N
    columns = (tl.program_id(1) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < OUT
    patch, place, ok = tile_sites(
        tl.program_id(0) // KINDS, neighbours_ptr, num_patches, POOLED, False, BLOCK_M
    )
    x, y, z = split_place(place, POOLED)
    kind_x, kind_y, kind_z = split_place(tl.program_id(0) % KINDS, STRIDE)
    first_x, count_x = taps_of(kind_x, KERNEL[0], STRIDE[0], LOW[0], DILATION[0])
    first_y, count_y = taps_of(kind_y, KERNEL[1], STRIDE[1], LOW[1], DILATION[1])
    first_z, count_z = taps_of(kind_z, KERNEL[2], STRIDE[2], LOW[2], DILATION[2])
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dy_ptr += group * IN
    weight_ptr += group * LINE
    for step in range(count_x * count_y * count_z * STEPS):  # one loop, to be pipelined
        at = step // STEPS
        tap_x = first_x + at // (count_y * count_z) * step_of(STRIDE[0], DILATION[0])
        tap_y = first_y + at // count_z % count_y * step_of(STRIDE[1], DILATION[1])
        tap_z = first_z + at % count_z * step_of(STRIDE[2], DILATION[2])
        row, found = reader_rows(
            patch, x, y, z, ok, kind_x, kind_y, kind_z, tap_x, tap_y, tap_z, neighbours_ptr,
            PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION,
        )  # fmt: skip
        tap = (tap_x * KERNEL[1] + tap_y) * KERNEL[2] + tap_z
        line = weight_ptr + tap * tl.full([], IN * GROUPS * LINE, tl.int64)
        acc = add_tap(
            acc, dy_ptr, row, found, line, step % STEPS * BLOCK_K, columns,
            GROUPS, IN, LINE, BLOCK_K, PRECISION,
        )  # fmt: skip
    first, rows, ok = written_rows(
        tl.program_id(0) // KINDS, num_patches, kind_x, kind_y, kind_z,
        PATCH, POOLED, STRIDE, BLOCK_M,
    )  # fmt: skip
    columns += group * OUT
    dx_ptr += first * (GROUPS * OUT)
    out = dx_ptr + rows[:, None] * (GROUPS * OUT) + columns[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["num_patches"])
def sparse_conv3d_strided_depthwise_bwd_dx_kernel(
    dy_ptr, weight_ptr, dx_ptr, neighbours_ptr, num_patches,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = Σ_t dy[reader_t] * w_t, every channel by itself. weight is [taps, CHANNELS].

    One program: BLOCK_M sites of one kind, BLOCK_C channels.
    """
    KINDS: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    patch, place, ok = tile_sites(
        tl.program_id(0) // KINDS, neighbours_ptr, num_patches, POOLED, False, BLOCK_M
    )
    x, y, z = split_place(place, POOLED)
    kind_x, kind_y, kind_z = split_place(tl.program_id(0) % KINDS, STRIDE)
    first_x, count_x = taps_of(kind_x, KERNEL[0], STRIDE[0], LOW[0], DILATION[0])
    first_y, count_y = taps_of(kind_y, KERNEL[1], STRIDE[1], LOW[1], DILATION[1])
    first_z, count_z = taps_of(kind_z, KERNEL[2], STRIDE[2], LOW[2], DILATION[2])
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for at in range(count_x * count_y * count_z):
        tap_x = first_x + at // (count_y * count_z) * step_of(STRIDE[0], DILATION[0])
        tap_y = first_y + at // count_z % count_y * step_of(STRIDE[1], DILATION[1])
        tap_z = first_z + at % count_z * step_of(STRIDE[2], DILATION[2])
        row, found = reader_rows(
            patch, x, y, z, ok, kind_x, kind_y, kind_z, tap_x, tap_y, tap_z, neighbours_ptr,
            PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION,
        )  # fmt: skip
        a = tl.load(
            dy_ptr + row[:, None] * CHANNELS + columns[None, :],
            mask=found[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        tap = (tap_x * KERNEL[1] + tap_y) * KERNEL[2] + tap_z
        w = tl.load(weight_ptr + tap * CHANNELS + columns, mask=column_ok, other=0.0)
        acc += a.to(tl.float32) * w.to(tl.float32)[None, :]
    first, rows, ok = written_rows(
        tl.program_id(0) // KINDS, num_patches, kind_x, kind_y, kind_z,
        PATCH, POOLED, STRIDE, BLOCK_M,
    )  # fmt: skip
    out = dx_ptr + first * CHANNELS + rows[:, None] * CHANNELS + columns[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


def input_gradient(
    dy: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, window: Window
) -> Tensor:
    """Return dx [P, px, py, pz, C_in] of dy [P, qx, qy, qz, C_out]."""
    if set(window.stride) == {1}:
        return forward.input_gradient(dy, neighbours, order, weight, window)
    packed = weight.flatten(2).unflatten(0, (window.groups, -1))  # [G, OUT, IN, taps]
    packed = packed.permute(3, 1, 0, 2).flatten(2).contiguous()  # [taps, C_out / groups, C_in]
    dy = features(dy)
    dx = dy.new_empty((dy.shape[0], *window.patch, packed.shape[2]))
    if dx.numel() == 0:
        return dx
    inputs = (dy, packed.to(dy.dtype), dx, neighbours, dy.shape[0])
    depthwise = packed.shape[1] == 1 and packed.shape[2] == window.groups
    launch = _depthwise if depthwise else _grouped
    with device_of(dy):
        launch(inputs, window)
    return dx


def _grouped(inputs: tuple[Any, ...], window: Window) -> None:
    dy, packed = in_lines(inputs[0], inputs[1], window.groups)
    outer = inputs[2].shape[4] // window.groups
    row = tuning.pick(tuning.STRIDED_DX, dy, outer)
    sparse_conv3d_strided_bwd_dx_kernel[
        (_tiles(dy, window, row.tile_m), window.groups * triton.cdiv(outer, row.tile_n))
    ](
        dy, packed, *inputs[2:], **window.flags, GROUPS=window.groups, IN=packed.shape[1],
        OUT=outer, LINE=packed.shape[2] // window.groups,
        PRECISION=precision(dy.dtype, row.float32), BLOCK_M=row.tile_m, BLOCK_N=row.tile_n,
        BLOCK_K=tuning.fit(row.tile_k, packed.shape[1]), num_warps=row.num_warps,
        num_stages=row.num_stages,
    )  # fmt: skip


def _depthwise(inputs: tuple[Any, ...], window: Window) -> None:
    dy, channels = inputs[0], window.groups
    row = tuning.pick(tuning.DEPTHWISE, dy, channels)
    sparse_conv3d_strided_depthwise_bwd_dx_kernel[
        (_tiles(dy, window, row.tile_m), triton.cdiv(channels, row.tile_n))
    ](
        *inputs, **window.flags, CHANNELS=channels, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
        num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip


def _tiles(dy: Tensor, window: Window, tile: int) -> int:
    """Return how many tiles the sites of all kinds have."""
    return triton.cdiv(dy.shape[0] * window.sites, tile) * math.prod(window.stride)
