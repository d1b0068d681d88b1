"""Device helpers: which site a tile's row is, and which row a tap of it reads.

Sites of active patches are numbered patch by patch, raster order inside. The site that a tap reads
lies in the same patch or in a neighbour, whose number stands in a table of
(2 RX + 1) * (2 RY + 1) * (2 RZ + 1) entries a patch; everything else is arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def tile_sites(
    tile,
    order_ptr,
    num_patches,
    PATCH: tl.constexpr,
    BY_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return patch, place in the patch, and existence of a tile's BLOCK_M sites.

    BY_PLACE: all sites of a tile have one place, in patches that `order_ptr` puts side by side.
    """
    SITES: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2]
    if BY_PLACE:
        tiles = tl.cdiv(num_patches, BLOCK_M)
        at = tile // tiles
        x, y, z = split_place(at, PATCH)
        kind = end_bits(x, PATCH[0]) * 16 + end_bits(y, PATCH[1]) * 4 + end_bits(z, PATCH[2])
        slot = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = slot < num_patches
        line = order_ptr + kind.to(tl.int64) * num_patches
        patch = tl.load(line + slot, mask=ok, other=0)
        place = at + tl.zeros([BLOCK_M], tl.int32)
    else:
        first = tile * tl.full([], BLOCK_M, tl.int64)
        place = (first % SITES).to(tl.int32) + tl.arange(0, BLOCK_M)
        patch = (first // SITES).to(tl.int32) + place // SITES
        place = place % SITES
        ok = patch < num_patches
    return patch, place, ok


@triton.jit
def split_place(place, PATCH: tl.constexpr):
    """Return x, y and z of a place in its patch."""
    return place // (PATCH[1] * PATCH[2]), place // PATCH[2] % PATCH[1], place % PATCH[2]


@triton.jit
def end_bits(at, SIZE: tl.constexpr):
    """Return bit 0 at the low end of a patch, bit 1 at the high end."""
    return (at == 0).to(tl.int32) + 2 * (at == SIZE - 1).to(tl.int32)


@triton.jit
def tap_step(
    at,
    tap,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    MIRRORED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Return along one axis the patch a tap falls into, 0 for the farthest, and the place there."""
    SPAN: tl.constexpr = DILATION * (KERNEL - 1)
    LOW: tl.constexpr = SPAN - SPAN // 2 if MIRRORED else SPAN // 2
    REACH: tl.constexpr = reach_of(SPAN, SIZE)
    moved = at + tap * DILATION - LOW + REACH * SIZE
    return moved // SIZE, moved % SIZE


@triton.constexpr_function
def reach_of(span, size):
    """Return how many patches away a window reaches that is `span` voxels wider than one."""
    return max(1, (span - span // 2 + size - 1) // size)


@triton.jit
def source_rows(
    patch,
    place,
    ok,
    tap,
    neighbours_ptr,
    PATCH: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    """Return the row of features that a tap reads for each site, and whether it is active."""
    x, y, z = split_place(place, PATCH)
    tap_x, tap_y, tap_z = split_place(tap, KERNEL)
    cell_x, x = tap_step(x, tap_x, KERNEL[0], DILATION[0], MIRRORED, PATCH[0])
    cell_y, y = tap_step(y, tap_y, KERNEL[1], DILATION[1], MIRRORED, PATCH[1])
    cell_z, z = tap_step(z, tap_z, KERNEL[2], DILATION[2], MIRRORED, PATCH[2])
    REACH_X: tl.constexpr = 2 * reach_of(DILATION[0] * (KERNEL[0] - 1), PATCH[0]) + 1
    REACH_Y: tl.constexpr = 2 * reach_of(DILATION[1] * (KERNEL[1] - 1), PATCH[1]) + 1
    REACH_Z: tl.constexpr = 2 * reach_of(DILATION[2] * (KERNEL[2] - 1), PATCH[2]) + 1
    entry = patch.to(tl.int64) * (REACH_X * REACH_Y * REACH_Z)
    entry += (cell_x * REACH_Y + cell_y) * REACH_Z + cell_z
    source = tl.load(neighbours_ptr + entry, mask=ok, other=-1)
    row = tl.maximum(source, 0).to(tl.int64) * (PATCH[0] * PATCH[1] * PATCH[2])
    return row + (x * PATCH[1] + y) * PATCH[2] + z, source >= 0
