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
def tile_rows(tile, count, BLOCK_M: tl.constexpr):
    """Return a tile's first row, the BLOCK_M rows from it on, and which are among `count` in all.

    For the store: what is made before the main loop in its layout fills registers all through it.
    """
    first = tile * tl.full([], BLOCK_M, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    return first, rows, rows < count - first


@triton.jit
def split_place(place, PATCH: tl.constexpr):
    """Return x, y and z of a place in its patch."""
    return place // (PATCH[1] * PATCH[2]), place // PATCH[2] % PATCH[1], place % PATCH[2]


@triton.jit
def end_bits(at, SIZE: tl.constexpr):
    """Return bit 0 at the low end of a patch, bit 1 at the high end."""
    return (at == 0).to(tl.int32) + 2 * (at == SIZE - 1).to(tl.int32)


@triton.constexpr_function
def reach_of(kernel, stride, low, dilation, size):
    """Return how many patches of a size away a window reaches, 1 or more."""
    after = dilation * (kernel - 1) + 1 - stride - low
    return max(1, (max(low, after) + size - 1) // size)


@triton.jit
def tap_step(
    at, tap, KERNEL: tl.constexpr, STRIDE: tl.constexpr, LOW: tl.constexpr,
    DILATION: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return along one axis the patch a tap falls into, 0 for the farthest, and the place there."""
    moved = (
        at * STRIDE + tap * DILATION - LOW + reach_of(KERNEL, STRIDE, LOW, DILATION, SIZE) * SIZE
    )
    return moved // SIZE, moved % SIZE


@triton.jit
def neighbour(
    patch, ok, x, y, z, neighbours_ptr, PATCH: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, LOW: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Return the row of the patch at x, y, z of a patch's neighbourhood; negative for none."""
    RX: tl.constexpr = reach_of(KERNEL[0], STRIDE[0], LOW[0], DILATION[0], PATCH[0])
    RY: tl.constexpr = reach_of(KERNEL[1], STRIDE[1], LOW[1], DILATION[1], PATCH[1])
    RZ: tl.constexpr = reach_of(KERNEL[2], STRIDE[2], LOW[2], DILATION[2], PATCH[2])
    entry = patch.to(tl.int64) * ((2 * RX + 1) * (2 * RY + 1) * (2 * RZ + 1))
    entry += (x * (2 * RY + 1) + y) * (2 * RZ + 1) + z
    return tl.load(neighbours_ptr + entry, mask=ok, other=-1)


@triton.jit
def source_rows(
    patch, place, ok, tap, neighbours_ptr, PATCH: tl.constexpr, POOLED: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, LOW: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Return the row of features that a tap reads for each site, and whether it is active."""
    x, y, z = split_place(place, POOLED)
    tap_x, tap_y, tap_z = split_place(tap, KERNEL)
    cell_x, x = tap_step(x, tap_x, KERNEL[0], STRIDE[0], LOW[0], DILATION[0], PATCH[0])
    cell_y, y = tap_step(y, tap_y, KERNEL[1], STRIDE[1], LOW[1], DILATION[1], PATCH[1])
    cell_z, z = tap_step(z, tap_z, KERNEL[2], STRIDE[2], LOW[2], DILATION[2], PATCH[2])
    source = neighbour(
        patch, ok, cell_x, cell_y, cell_z, neighbours_ptr, PATCH, KERNEL, STRIDE, LOW, DILATION
    )
    row = tl.maximum(source, 0).to(tl.int64) * (PATCH[0] * PATCH[1] * PATCH[2])
    return row + (x * PATCH[1] + y) * PATCH[2] + z, source >= 0
