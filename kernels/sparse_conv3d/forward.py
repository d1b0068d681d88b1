"""Convolution of active sites, forward; and its input gradient, which is the same sum mirrored.

    y[i] = bias + Σ_t x[stride * i + o_t] W_t,   o_t = dilation * t - low,   stride * i + o_t active
    dx[j] = Σ_t dy[j - o_t] W_t^T   at stride 1

Each site belongs to one program and its taps are added in order: no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import tuning
from .call import Window, device_of, features, padded, precision
from .sites import source_rows, tile_rows, tile_sites


@triton.jit(do_not_specialize=["num_patches"])
def sparse_conv3d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, neighbours_ptr, order_ptr, num_patches,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, LINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BY_PLACE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = bias + Σ_t x[source_t] W_t, with IN and OUT channels a group.

    One program: BLOCK_M sites, BLOCK_N channels of one group. weight is [taps, IN, GROUPS * LINE],
    of which OUT channels a group count.
    """
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(1) // TILES_N
    columns = (tl.program_id(1) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < OUT
    patch, place, ok = tile_sites(
        tl.program_id(0), order_ptr, num_patches, POOLED, BY_PLACE, BLOCK_M
    )
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_ptr += group * IN
    weight_ptr += group * LINE
    STEPS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    for step in range(KERNEL[0] * KERNEL[1] * KERNEL[2] * STEPS):  # one loop, to be pipelined
        tap, first = step // STEPS, step % STEPS * BLOCK_K
        row, found = source_rows(
            patch, place, ok, tap, neighbours_ptr, PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION
        )
        line = weight_ptr + tap * tl.full([], IN * GROUPS * LINE, tl.int64)
        if BY_PLACE:  # sites of one place miss a tap together
            if tl.max(found.to(tl.int32), 0) > 0:
                acc = add_tap(
                    acc, x_ptr, row, found, line, first, columns,
                    GROUPS, IN, LINE, BLOCK_K, PRECISION,
                )  # fmt: skip
        else:
            acc = add_tap(
                acc, x_ptr, row, found, line, first, columns,
                GROUPS, IN, LINE, BLOCK_K, PRECISION,
            )  # fmt: skip
    columns += group * OUT
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    SITES: tl.constexpr = POOLED[0] * POOLED[1] * POOLED[2]
    if BY_PLACE:
        rows = patch.to(tl.int64) * SITES + place
    else:
        first, rows, ok = tile_rows(tl.program_id(0), num_patches.to(tl.int64) * SITES, BLOCK_M)
        y_ptr += first * (GROUPS * OUT)
    out = y_ptr + rows[:, None] * (GROUPS * OUT) + columns[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit
def add_tap(
    acc, x_ptr, row, found, weight_ptr, first, columns,
    GROUPS: tl.constexpr, IN: tl.constexpr, LINE: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + x[row] @ weight over BLOCK_K channels; rows that are not found count as 0."""
    inner = first + tl.arange(0, BLOCK_K)
    inner_ok = inner < IN
    rows = x_ptr + row[:, None] * (GROUPS * IN)
    a = tl.load(rows + inner[None, :], mask=found[:, None] & inner_ok[None, :], other=0.0)
    b = tl.load(
        weight_ptr + inner[:, None] * (GROUPS * LINE) + columns[None, :],
        mask=inner_ok[:, None] & (columns < LINE)[None, :], other=0.0,
    )  # fmt: skip
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_patches"])
def sparse_conv3d_depthwise_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, neighbours_ptr, order_ptr, num_patches,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    LOW: tl.constexpr, DILATION: tl.constexpr,
    CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = bias + Σ_t x[source_t] * w_t, every channel by itself. weight is [taps, CHANNELS].

    One program: BLOCK_M sites, BLOCK_C channels.
    """
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    patch, place, ok = tile_sites(tl.program_id(0), order_ptr, num_patches, POOLED, False, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        row, found = source_rows(
            patch, place, ok, tap, neighbours_ptr, PATCH, POOLED, KERNEL, STRIDE, LOW, DILATION
        )
        a = tl.load(
            x_ptr + row[:, None] * CHANNELS + columns[None, :],
            mask=found[:, None] & column_ok[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(weight_ptr + columns, mask=column_ok, other=0.0)
        acc += a.to(tl.float32) * w.to(tl.float32)[None, :]
        weight_ptr += CHANNELS
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    SITES: tl.constexpr = POOLED[0] * POOLED[1] * POOLED[2]
    first, rows, ok = tile_rows(tl.program_id(0), num_patches.to(tl.int64) * SITES, BLOCK_M)
    out = y_ptr + first * CHANNELS + rows[:, None] * CHANNELS + columns[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


def forward(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, bias: Tensor | None,
    window: Window,
) -> Tensor:  # fmt: skip
    """Return y [P, qx, qy, qz, C_out] of x [P, px, py, pz, C_in]; q = patch / stride.

    weight is torch's [C_out, C_in / groups, kx, ky, kz]; neighbours [P, ...] reaches as far as the
    window; order is PatchMask's.
    """
    packed = weight.flatten(2).permute(2, 1, 0).contiguous()  # [taps, C_in / groups, C_out]
    return _convolve(x, neighbours, order, packed, bias, window)


def input_gradient(
    dy: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, window: Window
) -> Tensor:
    """Return dx [P, px, py, pz, C_in] of dy [P, px, py, pz, C_out], through the mirrored taps.

    The stride is 1; see backward_dx for others.
    """
    packed = weight.flatten(2).flip(2).unflatten(0, (window.groups, -1))  # [G, OUT, IN, taps]
    packed = packed.permute(3, 1, 0, 2).flatten(2).contiguous()  # [taps, C_out / groups, C_in]
    return _convolve(dy, neighbours, order, packed, None, window.mirrored)


def _convolve(
    x: Tensor, neighbours: Tensor, order: Tensor, packed: Tensor, bias: Tensor | None,
    window: Window,
) -> Tensor:  # fmt: skip
    x = features(x)
    y = x.new_empty((x.shape[0], *window.pooled, packed.shape[2]))
    if y.numel() == 0:
        return y
    packed = packed.to(x.dtype)
    inputs = (x, packed, packed if bias is None else bias, y, neighbours, order, x.shape[0])
    flags = {**window.flags, "HAS_BIAS": bias is not None}
    if packed.shape[1] == 1 and packed.shape[2] == window.groups:
        _launch_depthwise(inputs, flags, window)
    else:
        _launch(inputs, flags, window)
    return y


def in_lines(x: Tensor, packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return x and the weight [taps, IN, C_out] with whole lines of channels, see padded."""
    x = padded(x, groups)
    packed = pad(packed, (0, 0, 0, x.shape[-1] // groups - packed.shape[1]))
    return x, padded(packed, groups)


def _launch(inputs: tuple, flags: dict[str, Any], window: Window) -> None:
    x, packed = in_lines(inputs[0], inputs[1], window.groups)
    outer = inputs[3].shape[4] // window.groups
    row = tuning.pick(tuning.FORWARD, x, outer)
    by_place = tuning.goes_by_place(window.pooled, x.shape[0], row.tile_m)
    tiles = triton.cdiv(x.shape[0] * window.sites, row.tile_m)
    if by_place:
        tiles = triton.cdiv(x.shape[0], row.tile_m) * window.sites
    with device_of(x):
        sparse_conv3d_fwd_kernel[(tiles, window.groups * triton.cdiv(outer, row.tile_n))](
            x, packed, *inputs[2:], **flags, GROUPS=window.groups, IN=packed.shape[1], OUT=outer,
            LINE=packed.shape[2] // window.groups, BY_PLACE=by_place,
            PRECISION=precision(x.dtype, row.float32), BLOCK_M=row.tile_m, BLOCK_N=row.tile_n,
            BLOCK_K=tuning.fit(row.tile_k, packed.shape[1]), num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip


def _launch_depthwise(inputs: tuple, flags: dict[str, Any], window: Window) -> None:
    x, channels = inputs[0], window.groups
    row = tuning.pick(tuning.DEPTHWISE, x, channels)
    grid = (triton.cdiv(x.shape[0] * window.sites, row.tile_m), triton.cdiv(channels, row.tile_n))
    with device_of(x):
        sparse_conv3d_depthwise_fwd_kernel[grid](
            *inputs, **flags, CHANNELS=channels, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
