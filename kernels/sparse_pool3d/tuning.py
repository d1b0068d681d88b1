"""Launch parameters of pooling and densify. No table is measured: they wait for memory.

A row serves values of `itemsize` bytes on every GPU; a tile has tile_m sites and tile_n channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """One line of a table."""

    itemsize: int
    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


# fmt: off
# unmeasured  bytes  tile_m  tile_n  warps  stages
POOL = (
    Row(         2,     16,     64,     4,     2),
    Row(         4,     16,     64,     4,     2),
)
DENSIFY = (
    Row(         2,     32,     64,     4,     2),
    Row(         4,     32,     64,     4,     2),
)
# fmt: on

MEASURED: dict[str, dict[int, str]] = {}

SPLIT_TILES = 64  # tiles of the volume whose token gradient one program sums


def pick(table: tuple[Row, ...], x: Tensor) -> Row:
    """Return the row of a dtype; its channels fit a tensor with fewer."""
    for row in table:
        if row.itemsize == x.element_size():
            return row._replace(tile_n=min(row.tile_n, 1 << (x.shape[-1] - 1).bit_length()))
    raise NotImplementedError(f"sparse_pool3d: no launch row for {x.element_size()} bytes")
