"""Launch parameters of convolution. Every table is unmeasured: chosen from compiled resources.

A row serves outputs of at most `columns` channels a group and of `itemsize` bytes on GPUs of one
generation; the first row that fits is taken, the last of a kind serves any number of channels.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

ANY = 1 << 30
SUMS = torch.float32  # of products, whatever the inputs are


class Row(NamedTuple):
    """One line of a table; tiles of the product M x N x K.

    float32: how float32 products are made where TF32 is not allowed, see block attention's Row.
    """

    capability: int
    itemsize: int
    columns: int
    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    float32: str = "tf32x3"


class DepthwiseRow(NamedTuple):
    """One line of a table of depthwise kernels; a tile has tile_m sites and tile_n channels."""

    capability: int
    itemsize: int
    columns: int
    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


class MapRow(NamedTuple):
    """How kernel maps are made, on every GPU: `tile` sites a program."""

    tile: int
    num_warps: int
    num_stages: int


# fmt: off
# unmeasured cap  bytes  columns  tile_m  tile_n  tile_k  warps  stages
FORWARD = (
    Row(      90,   2,      32,     128,     32,     64,     4,     3),
    Row(      90,   2,      64,     128,     64,     64,     4,     3),
    Row(      90,   2,     ANY,     128,    128,     64,     8,     3),
    Row(      90,   4,      32,      64,     32,     32,     4,     3),
    Row(      90,   4,     ANY,      64,     64,     32,     4,     3),
    Row(      80,   2,      32,     128,     32,     32,     4,     3),
    Row(      80,   2,      64,     128,     64,     32,     4,     3),
    Row(      80,   2,     ANY,     128,    128,     32,     8,     3),
    Row(      80,   4,      32,      64,     32,     32,     4,     3),
    Row(      80,   4,     ANY,      64,     64,     32,     4,     3),
)

# x, y and z of each site stay in registers beside its patch
STRIDED_DX = (
    Row(      90,   2,      32,     128,     32,     64,     4,     3),
    Row(      90,   2,      64,      64,     64,     64,     4,     3),
    Row(      90,   2,     ANY,      64,    128,     64,     8,     3),
    Row(      90,   4,      32,      64,     32,     32,     4,     3),
    Row(      90,   4,     ANY,      64,     64,     32,     4,     3),
    Row(      80,   2,      32,     128,     32,     64,     4,     3),
    Row(      80,   2,      64,     128,     64,     64,     4,     3),
    Row(      80,   2,     ANY,     128,    128,     32,     8,     3),
    Row(      80,   4,      32,      64,     32,     32,     4,     3),
    Row(      80,   4,     ANY,      64,     64,     32,     4,     3),
)

# M: channels of x, N: channels of dy, K: sites
BACKWARD_DW = (
    Row(      90,   2,      32,      64,     32,     64,     4,     3),
    Row(      90,   2,     ANY,      64,     64,     64,     4,     3),
    Row(      90,   4,      32,      32,     32,     32,     4,     3),
    Row(      90,   4,     ANY,      64,     64,     32,     4,     3),
    Row(      80,   2,      32,      64,     32,     32,     4,     3),
    Row(      80,   2,     ANY,      64,     64,     64,     4,     2),
    Row(      80,   4,      32,      32,     32,     32,     4,     3),
    Row(      80,   4,     ANY,      64,     64,     32,     4,     3),
)

# with sites from a map: 64 of them at a time would spill on sm_100
MAP_BACKWARD_DW = (
    *(row for row in BACKWARD_DW if (row.capability, row.itemsize) != (80, 2)),
    Row(      80,   2,      32,      64,     32,     32,     4,     3),
    Row(      80,   2,     ANY,      64,     64,     32,     4,     2),
)

# unmeasured cap  bytes  columns  tile_m  tile_n  warps  stages
DEPTHWISE = (
    DepthwiseRow(90,  2,      32,      64,     32,     4,     3),
    DepthwiseRow(90,  2,     ANY,      32,     64,     4,     3),
    DepthwiseRow(90,  4,      32,      64,     32,     4,     3),
    DepthwiseRow(90,  4,     ANY,      32,     64,     4,     3),
    DepthwiseRow(80,  2,      32,      64,     32,     4,     3),
    DepthwiseRow(80,  2,     ANY,      32,     64,     4,     3),
    DepthwiseRow(80,  4,      32,      64,     32,     4,     3),
    DepthwiseRow(80,  4,     ANY,      32,     64,     4,     3),
)
DEPTHWISE_DW = DEPTHWISE

# one warp: no other waits for its longest search
#          tile  warps  stages
MAP_ROWS = (
    MapRow( 128,    1,      1),
)
# fmt: on

MEASURED: dict[str, dict[int, str]] = {}

LARGEST_BY_PLACE = 4  # voxels: in small patches many taps leave the patch and find nothing
FEWEST_BY_PLACE = 4  # tiles of patches: with fewer, a tile mixes patches with other neighbours
FILL = 1024  # programs that fill a large GPU, several to each of its processors
SPLIT_SITES = 1024  # a split of the weight gradient sums at least so many sites


AnyRow = TypeVar("AnyRow", Row, DepthwiseRow)


def pick(table: tuple[AnyRow, ...], x: Tensor, columns: int) -> AnyRow:
    """Return the first row that fits; on the CPU, in the interpreter, Hopper's."""
    capability = 90
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = generation(10 * major + minor)
    row = find(table, capability, x.element_size(), columns)
    return row._replace(tile_n=fit(row.tile_n, columns))


def generation(capability: int) -> int:
    """Return whose rows a GPU uses: 90 on Hopper, else 80, which fit the smallest shared memory."""
    return 90 if capability == 90 else 80


def find(table: tuple[AnyRow, ...], capability: int, itemsize: int, columns: int) -> AnyRow:
    """Return the first row that fits."""
    for row in table:
        if (row.capability, row.itemsize) == (capability, itemsize) and columns <= row.columns:
            return row
    raise NotImplementedError(
        f"sparse_conv3d: no launch row for capability {capability}, {itemsize} bytes"
    )


def fit(tile: int, size: int) -> int:
    """Return the tile, or the power of two of at least 16 that holds all of a smaller size."""
    return min(tile, max(16, 1 << (size - 1).bit_length()))


def goes_by_place(patch: tuple[int, ...], num_patches: int, tile: int) -> bool:
    """Say whether a tile takes one place of many patches, so that whole tiles can skip a tap."""
    return max(patch) <= LARGEST_BY_PLACE and num_patches >= FEWEST_BY_PLACE * tile


def splits(num_tiles: int, tile: int, programs: int) -> tuple[int, int]:
    """Return into how many splits the tiles are cut and how many tiles a split has."""
    most = max(1, num_tiles * tile // SPLIT_SITES)
    wanted = max(1, min(most, FILL // programs))
    split_tiles = max(1, -(-num_tiles // wanted))
    return max(1, -(-num_tiles // split_tiles)), split_tiles
