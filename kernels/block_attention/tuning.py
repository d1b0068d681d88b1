"""Launch parameters of block attention. Every table is unmeasured: chosen from compiled resources.

A row serves inputs of at most `head_dim` columns and of `itemsize` bytes on GPUs of at least
`capability`; the first row that fits is taken. A tile never exceeds the mask's block.
"""

from __future__ import annotations

from typing import NamedTuple

from ..launch import Launch


class Row(NamedTuple):
    """One line of a table."""

    capability: int
    itemsize: int
    head_dim: int
    launch: Launch


# fmt: off
# unmeasured         cap  bytes  D           tile_q  tile_k  warps  stages
FORWARD = (
    Row(              90,   2,   64, Launch(    128,    128,     8,      3)),
    Row(              90,   2,  128, Launch(    128,     64,     8,      3)),
    Row(              90,   2,  256, Launch(    128,     64,     8,      2)),
    Row(              90,   4,   64, Launch(     64,     64,     4,      2)),
    Row(              90,   4,  128, Launch(     64,     32,     4,      2)),
    Row(              90,   4,  256, Launch(     32,     32,     4,      2)),
    Row(              80,   2,   64, Launch(    128,     64,     4,      3)),
    Row(              80,   2,  128, Launch(    128,     32,     4,      3)),
    Row(              80,   2,  256, Launch(     64,     32,     4,      2)),
    Row(              80,   4,   64, Launch(     64,     32,     4,      2)),
    Row(              80,   4,  128, Launch(     32,     32,     4,      2)),
    Row(              80,   4,  256, Launch(     16,     16,     4,      2)),
)

BACKWARD_DKV = (
    Row(              90,   2,   64, Launch(     64,    128,     8,      2)),
    Row(              90,   2,  128, Launch(     64,     64,     8,      2)),
    Row(              90,   2,  256, Launch(     32,     64,     8,      1)),
    Row(              90,   4,   64, Launch(     32,     64,     4,      2)),
    Row(              90,   4,  128, Launch(     32,     32,     4,      1)),
    Row(              90,   4,  256, Launch(     16,     16,     4,      1)),
    Row(              80,   2,   64, Launch(     64,     64,     4,      2)),
    Row(              80,   2,  128, Launch(     32,     64,     4,      2)),
    Row(              80,   2,  256, Launch(     32,     32,     4,      1)),
    Row(              80,   4,   64, Launch(     32,     32,     4,      2)),
    Row(              80,   4,  128, Launch(     16,     32,     4,      1)),
    Row(              80,   4,  256, Launch(     16,     16,     4,      1)),
)

BACKWARD_DQ = (
    Row(              90,   2,   64, Launch(    128,     64,     8,      2)),
    Row(              90,   2,  128, Launch(     64,     64,     8,      2)),
    Row(              90,   2,  256, Launch(     64,     32,     8,      1)),
    Row(              90,   4,   64, Launch(     64,     32,     4,      2)),
    Row(              90,   4,  128, Launch(     32,     32,     4,      1)),
    Row(              90,   4,  256, Launch(     16,     16,     4,      1)),
    Row(              80,   2,   64, Launch(     64,     64,     4,      2)),
    Row(              80,   2,  128, Launch(     64,     32,     4,      2)),
    Row(              80,   2,  256, Launch(     32,     32,     4,      1)),
    Row(              80,   4,   64, Launch(     32,     32,     4,      2)),
    Row(              80,   4,  128, Launch(     32,     16,     4,      1)),
    Row(              80,   4,  256, Launch(     16,     16,     4,      1)),
)
# fmt: on

# Rows of the small kernels before and after: queries a program handles.
DELTA_ROWS = 64
COMBINE_ROWS = 16
# A split of the key list walks at least so many tiles, and at most so many splits are made.
SPLIT_TILES = 8
MOST_SPLITS = 32


def pick(table: tuple[Row, ...], capability: int, itemsize: int, head_dim: int) -> Launch:
    """Return the launch parameters of the first row that fits."""
    for row in table:
        if capability >= row.capability and (itemsize, head_dim) <= (row.itemsize, row.head_dim):
            if itemsize == row.itemsize:
                return row.launch
    raise NotImplementedError(
        f"block_attention: no launch row for capability {capability}, {itemsize} bytes, "
        f"head dim {head_dim}"
    )
