"""Max and average pooling of active patches, forward and backward.

    y[o] = max_t v[o s + t - pad],      y[o] = share[o] Σ_t v[o s + t - pad]

where v is x at active sites and 0 at others; what lies outside the volume takes no part. The
output's patches are those of the input, with 1 / s of the sites along each axis. In the backward
every input site collects from the windows that read it: nothing is scattered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch as launching
from ..sparse_conv3d.call import device_of
from ..sparse_conv3d.sites import split_place, tile_sites
from . import tuning


class Window(NamedTuple):
    """Sizes along x, y and z of a patch of the input, and of a pooling window."""

    patch: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def pooled(self) -> tuple[int, ...]:
        """Sites of a patch of the output along each axis."""
        return tuple(p // s for p, s in zip(self.patch, self.stride, strict=True))

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time sizes, as keywords of a kernel."""
        return {
            "PATCH": self.patch, "POOLED": self.pooled,
            "KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding,
        }  # fmt: skip


@triton.jit
def read_step(at, tap, STRIDE: tl.constexpr, PADDING: tl.constexpr, SIZE: tl.constexpr):
    """Return along one axis the patch and the place that a tap of output `at` reads."""
    REACH: tl.constexpr = (PADDING + SIZE - 1) // SIZE
    moved = at * STRIDE + tap - PADDING + REACH * SIZE
    return moved // SIZE, moved % SIZE


@triton.jit
def window_step(at, tap, STRIDE: tl.constexpr, PADDING: tl.constexpr, SIZE: tl.constexpr):
    """Return along one axis the patch, the place and existence of the output reading `at`."""
    REACH: tl.constexpr = (PADDING + SIZE - 1) // SIZE
    POOLED: tl.constexpr = SIZE // STRIDE
    moved = at + PADDING - tap + (REACH + 1) * SIZE  # a patch more, so that it is not negative
    cell = moved // STRIDE // POOLED - 1
    ok = (moved % STRIDE == 0) & (cell >= 0) & (cell <= 2 * REACH)
    return cell, moved // STRIDE % POOLED, ok


@triton.jit
def neighbour(
    patch, ok, x, y, z, neighbours_ptr, PADDING: tl.constexpr, PATCH: tl.constexpr
):  # fmt: skip
    """Return the row of a patch's neighbour: -1 where it is not active, -2 outside the volume."""
    REACH_X: tl.constexpr = 2 * ((PADDING[0] + PATCH[0] - 1) // PATCH[0]) + 1
    REACH_Y: tl.constexpr = 2 * ((PADDING[1] + PATCH[1] - 1) // PATCH[1]) + 1
    REACH_Z: tl.constexpr = 2 * ((PADDING[2] + PATCH[2] - 1) // PATCH[2]) + 1
    entry = patch.to(tl.int64) * (REACH_X * REACH_Y * REACH_Z) + (x * REACH_Y + y) * REACH_Z + z
    return tl.load(neighbours_ptr + entry, mask=ok, other=-2)


@triton.jit(do_not_specialize=["num_patches", "share"])
def sparse_pool3d_fwd_kernel(
    x_ptr, y_ptr, taps_ptr, shares_ptr, neighbours_ptr, num_patches, share,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, CHANNELS: tl.constexpr, IS_MAX: tl.constexpr, HAS_SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[o] = max_t v[o s + t - pad], and which t; or y[o] = share Σ_t v[o s + t - pad].

    As in torch, the first of equal values is the maximum, and NaN is above all.
    One program: BLOCK_M sites of the output, BLOCK_C channels.
    """
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    patch, place, ok = tile_sites(
        tl.program_id(0), neighbours_ptr, num_patches, POOLED, False, BLOCK_M
    )
    x, y, z = split_place(place, POOLED)
    acc = tl.full([BLOCK_M, BLOCK_C], float("-inf") if IS_MAX else 0.0, tl.float32)
    best = tl.full([BLOCK_M, BLOCK_C], -1, tl.int32)
    for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        tap_x, tap_y, tap_z = split_place(tap, KERNEL)
        cell_x, at_x = read_step(x, tap_x, STRIDE[0], PADDING[0], PATCH[0])
        cell_y, at_y = read_step(y, tap_y, STRIDE[1], PADDING[1], PATCH[1])
        cell_z, at_z = read_step(z, tap_z, STRIDE[2], PADDING[2], PATCH[2])
        source = neighbour(patch, ok, cell_x, cell_y, cell_z, neighbours_ptr, PADDING, PATCH)
        row = tl.maximum(source, 0).to(tl.int64) * (PATCH[0] * PATCH[1] * PATCH[2])
        row += (at_x * PATCH[1] + at_y) * PATCH[2] + at_z
        found = (source >= 0)[:, None] & column_ok[None, :]
        v = tl.load(x_ptr + row[:, None] * CHANNELS + columns[None, :], mask=found, other=0.0)
        v = v.to(tl.float32)
        if IS_MAX:
            better = (v > acc) | (v != v) | (best < 0)
            better &= (source > -2)[:, None]
            acc = tl.where(better, v, acc)
            best = tl.where(better, tap, best)
        else:
            acc += v
    site = patch.to(tl.int64) * (POOLED[0] * POOLED[1] * POOLED[2]) + place
    if HAS_SHARES:
        acc *= tl.load(shares_ptr + site, mask=ok, other=0.0)[:, None]
    elif not IS_MAX:
        acc *= share
    out = site[:, None] * CHANNELS + columns[None, :]
    kept = ok[:, None] & column_ok[None, :]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=kept)
    if IS_MAX:
        tl.store(taps_ptr + out, best.to(tl.int16), mask=kept)


@triton.jit(do_not_specialize=["num_patches", "share"])
def sparse_pool3d_bwd_kernel(
    dy_ptr, dx_ptr, taps_ptr, shares_ptr, neighbours_ptr, num_patches, share,
    PATCH: tl.constexpr, POOLED: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, CHANNELS: tl.constexpr, IS_MAX: tl.constexpr, HAS_SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[i] = Σ_t dy[o] over windows o = (i + pad - t) / s whose maximum is t, or times share[o].

    One program: BLOCK_M sites of the input, BLOCK_C channels.
    """
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    patch, place, ok = tile_sites(
        tl.program_id(0), neighbours_ptr, num_patches, PATCH, False, BLOCK_M
    )
    x, y, z = split_place(place, PATCH)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        tap_x, tap_y, tap_z = split_place(tap, KERNEL)
        cell_x, at_x, ok_x = window_step(x, tap_x, STRIDE[0], PADDING[0], PATCH[0])
        cell_y, at_y, ok_y = window_step(y, tap_y, STRIDE[1], PADDING[1], PATCH[1])
        cell_z, at_z, ok_z = window_step(z, tap_z, STRIDE[2], PADDING[2], PATCH[2])
        reads = ok & ok_x & ok_y & ok_z
        source = neighbour(patch, reads, cell_x, cell_y, cell_z, neighbours_ptr, PADDING, PATCH)
        row = tl.maximum(source, 0).to(tl.int64) * (POOLED[0] * POOLED[1] * POOLED[2])
        row += (at_x * POOLED[1] + at_y) * POOLED[2] + at_z
        kept = (source >= 0)[:, None] & column_ok[None, :]
        spot = row[:, None] * CHANNELS + columns[None, :]
        if IS_MAX:
            kept &= tl.load(taps_ptr + spot, mask=kept, other=-1) == tap
        dy = tl.load(dy_ptr + spot, mask=kept, other=0.0).to(tl.float32)
        if HAS_SHARES:
            dy *= tl.load(shares_ptr + row, mask=source >= 0, other=0.0)[:, None]
        acc += dy
    if not IS_MAX and not HAS_SHARES:
        acc *= share
    out = (patch.to(tl.int64) * (PATCH[0] * PATCH[1] * PATCH[2]) + place)[:, None] * CHANNELS
    tl.store(
        dx_ptr + out + columns[None, :], acc.to(dx_ptr.dtype.element_ty),
        mask=ok[:, None] & column_ok[None, :],
    )  # fmt: skip


def forward(
    x: Tensor, neighbours: Tensor, shares: Tensor | None, share: float, window: Window, is_max: bool
) -> tuple[Tensor, Tensor]:
    """Return y [P, qx, qy, qz, C] of x [P, px, py, pz, C] and, of a maximum, its taps in int16.

    neighbours [P, ...] reaches ceil(padding / patch) patches far, -1 where a patch is not active,
    -2 outside the volume. shares [P, qx, qy, qz] float32, or one share for all, scale a mean.
    """
    x = features(x)
    y = x.new_empty((x.shape[0], *window.pooled, x.shape[4]))
    taps = torch.empty_like(y, dtype=torch.int16) if is_max else y.new_empty(0, dtype=torch.int16)
    _launch(sparse_pool3d_fwd_kernel, (x, y, taps), shares, neighbours, share, window, y)
    return y, taps


def backward(
    dy: Tensor, taps: Tensor, neighbours: Tensor, shares: Tensor | None, share: float,
    window: Window, is_max: bool,
) -> Tensor:  # fmt: skip
    """Return dx [P, px, py, pz, C] of dy [P, qx, qy, qz, C] and the taps of a maximum."""
    dy = features(dy)
    dx = dy.new_empty((dy.shape[0], *window.patch, dy.shape[4]))
    tensors = (dy, dx, taps if is_max else dy.new_empty(0, dtype=torch.int16))
    _launch(sparse_pool3d_bwd_kernel, tensors, shares, neighbours, share, window, dx)
    return dx


def features(x: Tensor) -> Tensor:
    """Return features contiguous, and not bfloat16 where that is interpreted."""
    return launching.raise_bfloat16(x, bool(triton.knobs.runtime.interpret)).contiguous()


def _launch(
    kernel: Any, tensors: tuple[Tensor, Tensor, Tensor], shares: Tensor | None,
    neighbours: Tensor, share: float, window: Window, out: Tensor,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    taps, channels = tensors[2], out.shape[4]
    row = tuning.pick(tuning.POOL, out)
    sites = math.prod(out.shape[:4])
    with device_of(out):
        kernel[(triton.cdiv(sites, row.tile_m), triton.cdiv(channels, row.tile_n))](
            *tensors, out if shares is None else shares, neighbours, out.shape[0], float(share),
            **window.flags, CHANNELS=channels, IS_MAX=taps.numel() > 0,
            HAS_SHARES=shares is not None, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
