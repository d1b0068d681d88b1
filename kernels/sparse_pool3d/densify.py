"""Active patches in a dense volume, with a learned token everywhere else, and the gradients.

    y[v] = x[site of v] where the patch of v is active, else token

Each voxel is written once; in the backward each is read once.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..sparse_conv3d.call import device_of
from ..sparse_conv3d.sites import split_place
from . import tuning
from .pool import features


@triton.jit
def voxel_sites(
    tile, table_ptr, num_voxels, GRID: tl.constexpr, PATCH: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return number and existence of a tile's voxels, and the active site of each, else -1."""
    SIZE: tl.constexpr = (GRID[0] * PATCH[0], GRID[1] * PATCH[1], GRID[2] * PATCH[2])
    VOXELS: tl.constexpr = SIZE[0] * SIZE[1] * SIZE[2]
    voxel = tile * tl.full([], BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)
    ok = voxel < num_voxels
    x, y, z = split_place((voxel % VOXELS).to(tl.int32), SIZE)
    cell = (voxel // VOXELS * GRID[0] + x // PATCH[0]) * GRID[1] + y // PATCH[1]
    row = tl.load(table_ptr + cell * GRID[2] + z // PATCH[2], mask=ok, other=-1).to(tl.int64)
    place = (x % PATCH[0] * PATCH[1] + y % PATCH[1]) * PATCH[2] + z % PATCH[2]
    return voxel, ok, tl.where(row >= 0, row * (PATCH[0] * PATCH[1] * PATCH[2]) + place, -1)


@triton.jit(do_not_specialize=["num_voxels"])
def densify_fwd_kernel(
    x_ptr, token_ptr, y_ptr, table_ptr, num_voxels,
    GRID: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[v] = x[site of v], or the token where there is none. y is [B, X, Y, Z, CHANNELS].

    One program: BLOCK_M voxels, BLOCK_C channels.
    """
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    voxel, ok, site = voxel_sites(tl.program_id(0), table_ptr, num_voxels, GRID, PATCH, BLOCK_M)
    found = (site >= 0)[:, None] & column_ok[None, :]
    value = tl.load(x_ptr + site[:, None] * CHANNELS + columns[None, :], mask=found, other=0.0)
    token = tl.load(token_ptr + columns, mask=column_ok, other=0.0)
    value = tl.where((site >= 0)[:, None], value, token[None, :])
    out = voxel[:, None] * CHANNELS + columns[None, :]
    tl.store(y_ptr + out, value, mask=ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["num_voxels", "num_tiles"])
def densify_bwd_kernel(
    dy_ptr, dx_ptr, dtoken_ptr, table_ptr, num_voxels, num_tiles,
    GRID: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[site of v] = dy[v]; dtoken = Σ dy[v] over voxels without a site, a sum a program.

    One program: SPLIT tiles of BLOCK_M voxels, BLOCK_C channels. dtoken is [programs, CHANNELS].
    """
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < CHANNELS
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0) * SPLIT
    for tile in range(first, tl.minimum(first + SPLIT, num_tiles)):
        voxel, ok, site = voxel_sites(tile, table_ptr, num_voxels, GRID, PATCH, BLOCK_M)
        kept = ok[:, None] & column_ok[None, :]
        at = dy_ptr + voxel[:, None] * CHANNELS + columns[None, :]
        dy = tl.load(at, mask=kept, other=0.0)
        active = (site >= 0)[:, None]
        tl.store(dx_ptr + site[:, None] * CHANNELS + columns[None, :], dy, mask=kept & active)
        acc += tl.where(active, 0.0, dy.to(tl.float32))
    line = tl.program_id(0).to(tl.int64) * CHANNELS
    tl.store(dtoken_ptr + line + columns, tl.sum(acc, 0), mask=column_ok)


def forward(x: Tensor, token: Tensor, table: Tensor) -> Tensor:
    """Return y [B, X, Y, Z, C] of x [P, px, py, pz, C] and the token [C]; table is PatchMask's."""
    x = features(x)
    patch, grid = x.shape[1:4], table.shape[1:]
    sizes = [cells * size for cells, size in zip(grid, patch, strict=True)]
    y = x.new_empty((table.shape[0], *sizes, x.shape[4]))
    if y.numel() == 0:
        return y
    row, voxels = tuning.pick(tuning.DENSIFY, x), math.prod(y.shape[:4])
    tiles = (triton.cdiv(voxels, row.tile_m), triton.cdiv(x.shape[4], row.tile_n))
    with device_of(x):
        densify_fwd_kernel[tiles](
            x, token.to(x.dtype).contiguous(), y, table, voxels,
            GRID=tuple(grid), PATCH=tuple(patch), CHANNELS=x.shape[4],
            BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return y


def backward(dy: Tensor, table: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return dx of a shape [P, px, py, pz, C], and dtoken [C] in float32, of dy [B, X, Y, Z, C]."""
    dy = features(dy)
    dx, channels = dy.new_empty(shape), shape[4]
    row, voxels = tuning.pick(tuning.DENSIFY, dy), math.prod(dy.shape[:4])
    tiles = triton.cdiv(voxels, row.tile_m)
    programs = triton.cdiv(tiles, tuning.SPLIT_TILES)
    dtoken = dy.new_zeros((programs, channels)).float()
    if dy.numel() > 0:
        with device_of(dy):
            densify_bwd_kernel[(programs, triton.cdiv(channels, row.tile_n))](
                dy, dx, dtoken, table, voxels, tiles,
                GRID=tuple(table.shape[1:]), PATCH=tuple(shape[1:4]), CHANNELS=channels,
                SPLIT=tuning.SPLIT_TILES, BLOCK_M=row.tile_m, BLOCK_C=row.tile_n,
                num_warps=row.num_warps, num_stages=row.num_stages,
            )  # fmt: skip
    return dx, dtoken.sum(0)
