"""Kernel maps: which row of the features each tap of each output reads, for any active sites.

    key(b, x, y, z) = ((b X + x) Y + y) Z + z       in a box that holds every site that is asked for
    rows[t, i] = the row of the fine site whose key is key(stride * i) + step_t, or -1

Fine sites are entered into a table, then looked up. The table has a row for each key, or it is a
hash table with open addresses: at least twice as many slots as sites, a slot holds a key and its
row in one int64. Where in a run of slots an entry lies depends on who came first, what a key finds
does not: no float atomics, equal results on every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .call import device_of

EMPTY = -1  # in a slot, as in rows
Three = tuple[int, int, int]


class Geometry(NamedTuple):
    """Sizes along x, y and z: of the volumes, of the box of keys, and of the window.

    corner: the key of the first voxel of the fine volume.
    """

    batch: int
    fine: Three
    coarse: Three
    box: Three
    corner: int
    kernel: Three
    stride: Three
    dilation: Three


@triton.jit
def site_key(
    coordinates_ptr, site, ok, stride_x, stride_y, stride_z,
    batch, size_x, size_y, size_z, box_x, box_y, box_z,
):  # fmt: skip
    """Return the keys of sites times the stride, and which lie in their volume."""
    place = coordinates_ptr + site * 4
    b = tl.load(place, mask=ok, other=0).to(tl.int64)
    x = tl.load(place + 1, mask=ok, other=0)
    y = tl.load(place + 2, mask=ok, other=0)
    z = tl.load(place + 3, mask=ok, other=0)
    inside = (b >= 0) & (b < batch) & (x >= 0) & (x < size_x)
    inside &= (y >= 0) & (y < size_y) & (z >= 0) & (z < size_z)
    key = ((b * box_x + x * stride_x) * box_y + y * stride_y) * box_z + z * stride_z
    return key, inside


@triton.jit
def first_slot(key, shift, last_slot):
    """Return where a key's search begins: the upper bits of a product (Fibonacci hashing)."""
    return ((key * -7046029254386353131) >> shift) & last_slot  # 2^64 over the golden ratio


@triton.jit(do_not_specialize=[
    "num_sites", "batch", "size_x", "size_y", "size_z", "box_x", "box_y", "box_z", "corner",
    "row_bits", "shift", "last_slot",
])  # fmt: skip
def sparse_conv3d_map_insert_kernel(
    coordinates_ptr, table_ptr, faults_ptr, num_sites, batch, size_x, size_y, size_z,
    box_x, box_y, box_z, corner, row_bits, shift, last_slot,
    IS_HASHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Enter sites into a table: table[key] = row, or key and row in the first free slot.

    Sets faults[0] if a site lies outside its volume, faults[1] if one is there twice.
    One program: BLOCK sites.
    """
    site = tl.program_id(0) * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)
    ok = site < num_sites
    key, inside = site_key(
        coordinates_ptr, site, ok, 1, 1, 1, batch, size_x, size_y, size_z, box_x, box_y, box_z
    )
    tl.store(faults_ptr + site * 0, 1, mask=ok & ~inside)
    pending = ok & inside
    key += corner
    # an exchange of -1 for -1 changes nothing: what lanes do that have nothing to enter
    if IS_HASHED:
        slot = first_slot(key, shift, last_slot)
        entry = (key << row_bits) | site
        while tl.max(pending.to(tl.int32), 0) > 0:
            found = tl.atomic_cas(
                table_ptr + slot, tl.full([BLOCK], -1, tl.int64), tl.where(pending, entry, -1),
                sem="relaxed",
            )  # fmt: skip
            twice = pending & (found != -1) & ((found >> row_bits) == key)
            tl.store(faults_ptr + 1 + site * 0, 1, mask=twice)
            pending &= (found != -1) & ~twice
            slot = (slot + 1) & last_slot
    else:
        found = tl.atomic_cas(
            table_ptr + tl.where(pending, key, 0), tl.full([BLOCK], -1, tl.int32),
            tl.where(pending, site, -1).to(tl.int32), sem="relaxed",
        )  # fmt: skip
        tl.store(faults_ptr + 1 + site * 0, 1, mask=pending & (found != -1))


@triton.jit(do_not_specialize=[
    "num_sites", "batch", "size_x", "size_y", "size_z", "box_x", "box_y", "box_z", "row_bits",
    "shift", "last_slot",
])  # fmt: skip
def sparse_conv3d_map_rows_kernel(
    coordinates_ptr, table_ptr, rows_ptr, faults_ptr, num_sites, batch, size_x, size_y, size_z,
    box_x, box_y, box_z, row_bits, shift, last_slot,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    IS_HASHED: tl.constexpr, IS_SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows[t, i] = table[key(stride * i) + step_t], or -1.

    IS_SYMMETRIC: only the first half of the taps is looked up; i reads j through tap t just when j
    reads i through the last tap less t. The rows of the other half hold -1 before.
    One program: one tap, BLOCK outputs.
    """
    tap, TAPS = tl.program_id(1), KERNEL[0] * KERNEL[1] * KERNEL[2]
    site = tl.program_id(0) * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)
    ok = site < num_sites
    key, inside = site_key(
        coordinates_ptr, site, ok, STRIDE[0], STRIDE[1], STRIDE[2],
        batch, size_x, size_y, size_z, box_x, box_y, box_z,
    )  # fmt: skip
    tl.store(faults_ptr + site * 0, 1, mask=ok & ~inside)
    step_x = tap // (KERNEL[1] * KERNEL[2]) * tl.full([], DILATION[0], tl.int64)
    step_y = tap // KERNEL[2] % KERNEL[1] * DILATION[1]
    key += (step_x * box_y + step_y) * box_z + tap % KERNEL[2] * DILATION[2]
    pending = ok & inside
    if IS_HASHED:
        row = tl.full([BLOCK], -1, tl.int64)
        slot = first_slot(key, shift, last_slot)
        while tl.max(pending.to(tl.int32), 0) > 0:
            entry = tl.load(table_ptr + slot, mask=pending, other=-1)
            hit = pending & ((entry >> row_bits) == key)
            row = tl.where(hit, entry & ((tl.full([], 1, tl.int64) << row_bits) - 1), row)
            pending &= (entry != -1) & ~hit
            slot = (slot + 1) & last_slot
    else:
        row = tl.load(table_ptr + key, mask=pending, other=-1).to(tl.int64)
    line = tap * tl.full([], 1, tl.int64) * num_sites
    tl.store(rows_ptr + line + site, row.to(tl.int32), mask=ok)
    if IS_SYMMETRIC:
        mirrored = (TAPS - 1 - tap) * tl.full([], 1, tl.int64) * num_sites
        tl.store(rows_ptr + mirrored + row, site.to(tl.int32), mask=row >= 0)


def interpreting() -> bool:
    """Say whether kernels run on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def neighbour_rows(
    fine: Tensor, coarse: Tensor, geometry: Geometry, *, hashed: bool, same: bool, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return rows int32 [taps, n] and what is wrong, int32 [2].

    fine [N, 4] and coarse [n, 4]: sample, x, y, z, int32. faults: not 0 where a coordinate is
    outside its volume, and where one is there twice. hashed: a hash table instead of one with a
    cell for each key. same: the sets are one; symmetric: and the window is, too.
    """
    g, row = geometry, tuning.MAP_ROWS[0]
    taps = g.kernel[0] * g.kernel[1] * g.kernel[2]
    faults = fine.new_zeros((2,))
    cells = g.batch * g.box[0] * g.box[1] * g.box[2]
    tabled = None if hashed else cells
    table, hashing = _enter(fine, g.batch, g.fine, g.box, g.corner, tabled, faults)
    if not same:  # a set of its own: entered to find who is there twice
        _enter(coarse, g.batch, g.coarse, g.coarse, 0, None, faults)
    rows = fine.new_empty((taps, len(coarse)))
    if symmetric:
        rows[taps // 2 + 1 :].fill_(EMPTY)
    if rows.numel() == 0:
        return rows, faults
    grid = (triton.cdiv(len(coarse), row.tile), taps // 2 + 1 if symmetric else taps)
    with device_of(fine):
        sparse_conv3d_map_rows_kernel[grid](
            coarse.contiguous(), table, rows, faults, len(coarse), g.batch, *g.coarse, *g.box,
            *hashing, KERNEL=g.kernel, STRIDE=g.stride, DILATION=g.dilation, IS_HASHED=hashed,
            IS_SYMMETRIC=symmetric, BLOCK=row.tile, num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip
    return rows, faults


def _enter(
    sites: Tensor, batch: int, size: Three, box: Three, corner: int, cells: int | None,
    faults: Tensor,
) -> tuple[Tensor, tuple[int, int, int]]:  # fmt: skip
    """Enter sites into a table of so many cells, or a hash table; return it, and how to search."""
    row, count = tuning.MAP_ROWS[0], len(sites)
    slot_bits = max(4, (2 * count - 1).bit_length())
    hashing = (max(1, count - 1).bit_length(), 64 - slot_bits, (1 << slot_bits) - 1)
    if cells is None:
        table = sites.new_full((1 << slot_bits,), EMPTY, dtype=torch.int64)
    else:
        table = sites.new_full((cells,), EMPTY)
    if count:
        with device_of(sites):
            sparse_conv3d_map_insert_kernel[(triton.cdiv(count, row.tile),)](
                sites.contiguous(), table, faults, count, batch, *size, *box, corner, *hashing,
                IS_HASHED=cells is None, BLOCK=row.tile, num_warps=row.num_warps,
                num_stages=row.num_stages,
            )  # fmt: skip
    return table, hashing
