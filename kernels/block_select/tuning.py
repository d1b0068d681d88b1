"""Launch parameters of block selection, chosen from compiled resources; MEASURED says which not.

A row serves every GPU: the kernels hold little at a time and wait for memory.
"""

from __future__ import annotations

from typing import NamedTuple

# table -> row capability -> "GPU, torch, Triton, date"
MEASURED: dict[str, dict[int, str]] = {}


class SelectRow(NamedTuple):
    """Rows of scores of at most `num_ids` blocks, or longer ones where it is None.

    chunk: blocks that a program holds at a time; a row of at most so many is read once.
    """

    num_ids: int | None
    chunk: int
    num_warps: int
    num_stages: int


class PoolRow(NamedTuple):
    """Pooling of at most `head_dim` columns; `tile`: tokens that a program holds at a time."""

    head_dim: int
    tile: int
    num_warps: int
    num_stages: int


# fmt: off
#             num_ids  chunk  warps  stages
SELECT = (
    SelectRow(   1024,  1024,     4,      1),
    SelectRow(   2048,  2048,     8,      1),
    SelectRow(   None,  1024,     4,      2),
)

#              D  tile  warps  stages
POOL = (
    PoolRow(   64,   64,     4,      1),
    PoolRow(  128,   32,     4,      1),
    PoolRow(  256,   16,     4,      1),
)
# fmt: on


def pick_select(num_ids: int) -> SelectRow:
    """Return the first row that fits."""
    return next(row for row in SELECT if row.num_ids is None or num_ids <= row.num_ids)


def pick_pool(head_dim: int) -> PoolRow:
    """Return the first row that fits."""
    for row in POOL:
        if head_dim <= row.head_dim:
            return row
    raise NotImplementedError(f"block_select: no launch row for head dim {head_dim}")
