"""Convolution through a kernel map, forward; its input gradient is the same with another map.

    y[i] = bias + Σ_t x[rows[t, i]] W_t      over taps t with rows[t, i] >= 0

Masked implicit GEMM: columns of the map are sorted so that a tile finds inputs through few taps,
and walks the list of those alone. Each output belongs to one program, taps are added in order: no
atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .call import Table, device_of, features, precision
from .forward import add_tap, in_lines
from .sites import tile_rows


@triton.jit(do_not_specialize=["num_sites"])
def sparse_conv3d_map_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows_ptr, order_ptr, lists_ptr, num_sites,
    TAPS: tl.constexpr, GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    LINE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    SITES_PER_LIST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = bias + Σ_t x[rows_t] W_t, with IN and OUT channels a group.

    One program: BLOCK_M columns of the map, BLOCK_N channels of one group. weight is
    [TAPS, IN, GROUPS * LINE], of which OUT channels a group count; a list is a count and as many
    taps.
    """
    tl.static_assert(SITES_PER_LIST % BLOCK_M == 0)
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    group = tl.program_id(1) // TILES_N
    columns = (tl.program_id(1) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < OUT
    first_slot = tl.program_id(0) * tl.full([], BLOCK_M, tl.int64)
    slot = first_slot + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    ok = slot < num_sites
    taps_ptr = lists_ptr + first_slot // SITES_PER_LIST * (TAPS + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_ptr += group * IN
    weight_ptr += group * LINE
    for step in range(tl.load(taps_ptr) * STEPS):  # one loop, to be pipelined
        tap = tl.load(taps_ptr + 1 + step // STEPS).to(tl.int64)
        row = tl.load(rows_ptr + tap * num_sites + slot, mask=ok, other=-1)
        found = row >= 0
        acc = add_tap(
            acc, x_ptr, tl.maximum(row, 0).to(tl.int64), found,
            weight_ptr + tap * (IN * GROUPS * LINE), step % STEPS * BLOCK_K, columns,
            GROUPS, IN, LINE, BLOCK_K, PRECISION,
        )  # fmt: skip
    columns += group * OUT
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    first_slot, rows, ok = tile_rows(tl.program_id(0), num_sites, BLOCK_M)
    site = tl.load(order_ptr + first_slot + rows, mask=ok, other=0).to(tl.int64)
    out = site[:, None] * (GROUPS * OUT) + columns[None, :]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["num_sites"])
def sparse_conv3d_map_depthwise_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows_ptr, order_ptr, lists_ptr, num_sites,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SITES_PER_LIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = bias + Σ_t x[rows_t] * w_t, every channel by itself. weight is [TAPS, CHANNELS].

    One program: BLOCK_M columns of the map, BLOCK_C channels.
    """
    tl.static_assert(SITES_PER_LIST % BLOCK_M == 0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    first_slot = tl.program_id(0) * tl.full([], BLOCK_M, tl.int64)
    slot = first_slot + tl.arange(0, BLOCK_M)
    ok = slot < num_sites
    taps_ptr = lists_ptr + first_slot // SITES_PER_LIST * (TAPS + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(tl.load(taps_ptr)):
        tap = tl.load(taps_ptr + 1 + step).to(tl.int64)
        row = tl.load(rows_ptr + tap * num_sites + slot, mask=ok, other=-1)
        kept = (row >= 0)[:, None] & column_ok[None, :]
        place = tl.maximum(row, 0).to(tl.int64)[:, None] * CHANNELS + columns[None, :]
        a = tl.load(x_ptr + place, mask=kept, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + tap * CHANNELS + columns, mask=column_ok, other=0.0)
        acc += a * w.to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    first_slot, rows, ok = tile_rows(tl.program_id(0), num_sites, BLOCK_M)
    site = tl.load(order_ptr + first_slot + rows, mask=ok, other=0).to(tl.int64)
    out = site[:, None] * CHANNELS + columns[None, :]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


def forward(x: Tensor, table: Table, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Return y [N_out, C_out] of x [N_in, C_in]; weight is [C_out, C_in / groups, kx, ky, kz]."""
    packed = weight.flatten(2).permute(2, 1, 0).contiguous()  # [taps, C_in / groups, C_out]
    return _convolve(x, table, packed, bias, groups)


def input_gradient(dy: Tensor, table: Table, weight: Tensor, groups: int, flipped: bool) -> Tensor:
    """Return dx [N_in, C_in] of dy [N_out, C_out], through the table of the transposed map.

    flipped: the map is symmetric and given as it is, so its taps come in reverse order.
    """
    taps = weight.flatten(2)
    packed = (taps.flip(2) if flipped else taps).unflatten(0, (groups, -1))  # [G, OUT, IN, taps]
    packed = packed.permute(3, 1, 0, 2).flatten(2).contiguous()  # [taps, C_out / groups, C_in]
    return _convolve(dy, table, packed, None, groups)


def _convolve(x: Tensor, table: Table, packed: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    x = features(x)
    num_sites, channels = table.rows.shape[1], packed.shape[2]
    y = x.new_empty((num_sites, channels))
    if y.numel() == 0:
        return y
    packed = packed.to(x.dtype)
    inputs = (x, packed, packed if bias is None else bias, y, *table[:3], num_sites)
    flags = {"TAPS": packed.shape[0], "HAS_BIAS": bias is not None}
    flags["SITES_PER_LIST"] = table.sites_per_list
    if packed.shape[1] == 1 and channels == groups:
        _launch_depthwise(inputs, flags)
    else:
        _launch(inputs, flags, groups)
    return y


def _launch(inputs: tuple, flags: dict[str, Any], groups: int) -> None:
    x, packed = in_lines(inputs[0], inputs[1], groups)
    outer = inputs[3].shape[1] // groups
    row = tuning.pick(tuning.FORWARD, x, outer)
    grid = (triton.cdiv(inputs[-1], row.tile_m), groups * triton.cdiv(outer, row.tile_n))
    with device_of(x):
        sparse_conv3d_map_fwd_kernel[grid](
            x, packed, *inputs[2:], **flags, GROUPS=groups, IN=packed.shape[1], OUT=outer,
            LINE=packed.shape[2] // groups, PRECISION=precision(x.dtype, row.float32),
            BLOCK_M=row.tile_m, BLOCK_N=row.tile_n, BLOCK_K=tuning.fit(row.tile_k, packed.shape[1]),
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip


def _launch_depthwise(inputs: tuple, flags: dict[str, Any]) -> None:
    x, channels = inputs[0], inputs[1].shape[2]
    row = tuning.pick(tuning.DEPTHWISE, x, channels)
    grid = (triton.cdiv(inputs[-1], row.tile_m), triton.cdiv(channels, row.tile_n))
    with device_of(x):
        sparse_conv3d_map_depthwise_fwd_kernel[grid](
            *inputs, **flags, CHANNELS=channels, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
