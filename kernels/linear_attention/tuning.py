"""Launch parameters of linear attention, chosen from compiled resources; see MEASURED.

A row serves inputs of at most `head_dim` columns and of `itemsize` bytes on GPUs of one generation;
the first row that fits is taken.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """How one kernel is launched: tokens of a tile, warps, pipeline stages.

    columns: of S that are held at once where it is read, a divisor of the head dim's power of two.
    """

    tile: int
    num_warps: int
    num_stages: int
    columns: int = 128


class Row(NamedTuple):
    """One line of a table.

    float32: how float32 products are made where TF32 is not allowed: "tf32x3", three TF32 products
        on tensor cores, or "ieee", plain arithmetic.
    """

    capability: int
    itemsize: int
    head_dim: int
    launch: Launch
    float32: str = "tf32x3"


# table -> capability of its rows -> GPU, versions and date of the measurement; absent: unmeasured
MEASURED: dict[str, dict[int, str]] = {}

# fmt: off
#                    cap  bytes  D            tile  warps  stages columns
SUMS = (  # parts of S and z, and of their gradients
    Row(              90,   2,   64, Launch(   64,     4,      2)),
    Row(              90,   2,  128, Launch(   32,     8,      2)),
    Row(              90,   4,   64, Launch(   32,     8,      2)),
    Row(              90,   4,  128, Launch(   16,     8,      2)),
    Row(              80,   2,   64, Launch(   32,     4,      3)),
    Row(              80,   2,  128, Launch(   32,     8,      2)),
    Row(              80,   4,   64, Launch(   32,     8,      2)),
    Row(              80,   4,  128, Launch(   16,     8,      1)),
)

ROWS = (  # o, dq, and dk with dv: tokens that read S or its gradient
    Row(              90,   2,   64, Launch(   64,     4,      1)),
    Row(              90,   2,  128, Launch(   32,     8,      1)),
    Row(              90,   4,   64, Launch(   64,     8,      1,  32)),
    Row(              90,   4,  128, Launch(   16,     8,      1,  32)),
    Row(              80,   2,   64, Launch(   64,     8,      1)),
    Row(              80,   2,  128, Launch(   32,     8,      2,  64)),
    Row(              80,   4,   64, Launch(   32,     8,      1)),
    Row(              80,   4,  128, Launch(   16,     8,      1,  32)),
)
# fmt: on

# Tokens are cut into parts of LONGEST_PART * D, so that what a part writes is little beside what it
# reads; into shorter ones while fewer programs than this would run.
LONGEST_PART, SHORTEST_PART, PROGRAMS = 16, 128, 256


def pick(table: tuple[Row, ...], capability: int, itemsize: int, head_dim: int) -> Row:
    """Return the first row that fits: of 90 on Hopper, else of 80."""
    generation = 90 if capability == 90 else 80
    for row in table:
        same = (row.capability, row.itemsize) == (generation, itemsize)
        if same and head_dim <= row.head_dim:
            return row
    raise NotImplementedError(
        f"linear_attention: no launch row for capability {capability}, {itemsize} bytes, "
        f"head dim {head_dim}"
    )


def part_length(length: int, heads: int, head_dim: int) -> int:
    """Return into parts of how many tokens the tokens are cut: from sizes alone."""
    part = LONGEST_PART * max(16, 1 << (head_dim - 1).bit_length())
    while part > SHORTEST_PART and heads * -(-length // part) < PROGRAMS:
        part //= 2
    return part
