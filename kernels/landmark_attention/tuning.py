"""Launch parameters of landmark attention, chosen from compiled resources; see MEASURED.

A row serves inputs of at most `head_dim` columns and of `itemsize` bytes on GPUs of one generation;
the first row that fits is taken. tile_q are rows, tile_k columns of the attention; a tile is cut to
the number of landmarks. Both stages use the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

from ..launch import Launch


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


class MatrixRow(NamedTuple):
    """One line of the tables of newton_schulz; tile_q is the side of a tile of a matrix."""

    capability: int
    launch: Launch
    float32: str = "tf32x3"


# table -> capability of its rows -> GPU, versions and date of the measurement; absent: unmeasured
MEASURED: dict[str, dict[int, str]] = {}

# fmt: off
#                    cap  bytes  D           tile_q  tile_k  warps  stages
FORWARD = (
    Row(              90,   2,   64, Launch(    128,     64,     8,      3)),
    Row(              90,   2,  128, Launch(    128,     32,     8,      2)),
    Row(              90,   4,   64, Launch(     64,     32,     8,      2)),
    Row(              90,   4,  128, Launch(     64,     16,     8,      1), "ieee"),
    Row(              80,   2,   64, Launch(     64,     32,     4,      2)),
    Row(              80,   2,  128, Launch(     64,     32,     4,      2)),
    Row(              80,   4,   64, Launch(     32,     32,     8,      2)),
    Row(              80,   4,  128, Launch(     32,     16,     8,      2), "ieee"),
)

BACKWARD_DQ = (
    Row(              90,   2,   64, Launch(     64,     64,     4,      2)),
    Row(              90,   2,   80, Launch(     64,     32,     8,      2)),
    Row(              90,   2,  128, Launch(     64,     64,     8,      2)),
    Row(              90,   4,   48, Launch(     32,     16,     8,      1)),
    Row(              90,   4,   64, Launch(     64,     32,     4,      1)),
    Row(              90,   4,  128, Launch(     16,     16,     8,      1), "ieee"),
    Row(              80,   2,   64, Launch(     64,     32,     4,      3)),
    Row(              80,   2,   80, Launch(     32,     32,     8,      2)),
    Row(              80,   2,  128, Launch(     32,     32,     8,      2)),
    Row(              80,   4,   64, Launch(     32,     16,     8,      1)),
    Row(              80,   4,   80, Launch(     16,     32,     4,      1), "ieee"),
    Row(              80,   4,  128, Launch(     16,     16,     8,      1), "ieee"),
)

BACKWARD_DKV = (
    Row(              90,   2,   64, Launch(     64,     64,     8,      2)),
    Row(              90,   2,  128, Launch(     32,     64,     8,      2)),
    Row(              90,   4,   64, Launch(     16,     32,     4,      1)),
    Row(              90,   4,   80, Launch(     16,     16,     8,      2), "ieee"),
    Row(              90,   4,  128, Launch(     16,     16,     8,      1), "ieee"),
    Row(              80,   2,   64, Launch(     16,     64,     4,      2)),
    Row(              80,   2,   80, Launch(     16,     32,     8,      1)),
    Row(              80,   2,  128, Launch(     32,     32,     4,      2)),
    Row(              80,   4,   64, Launch(     16,     32,     4,      1)),
    Row(              80,   4,  128, Launch(     16,     16,     8,      1), "ieee"),
)

#                    cap           tile    same  warps  stages
NEWTON_SCHULZ_FORWARD = (
    MatrixRow(        90, Launch(    32,     32,     8,      1)),
    MatrixRow(        80, Launch(    32,     32,     4,      1)),
)

NEWTON_SCHULZ_BACKWARD = (
    MatrixRow(        90, Launch(    32,     32,     8,      1)),
    MatrixRow(        80, Launch(    32,     32,     8,      1)),
)
# fmt: on

COMBINE_ROWS = 16  # rows a program of the combine kernel handles
SEGMENT_TOKENS = 64  # tokens a program of the means of segments handles at a time
# The long side is cut into parts of LONGEST_PART * m tokens, so that what a part writes is little
# beside what it reads; into shorter ones while fewer programs than this would run.
LONGEST_PART, SHORTEST_PART, PROGRAMS = 16, 128, 256


def generation(capability: int) -> int:
    """Return whose rows a GPU uses: 90 on Hopper, else 80, which fit the smallest shared memory."""
    return 90 if capability == 90 else 80


def pick(table: tuple[Row, ...], capability: int, itemsize: int, head_dim: int) -> Row:
    """Return the first row that fits."""
    for row in table:
        same = (row.capability, row.itemsize) == (generation(capability), itemsize)
        if same and head_dim <= row.head_dim:
            return row
    raise NotImplementedError(
        f"landmark_attention: no launch row for capability {capability}, {itemsize} bytes, "
        f"head dim {head_dim}"
    )


def pick_matrix(table: tuple[MatrixRow, ...], capability: int) -> MatrixRow:
    """Return the row of the generation."""
    return next(row for row in table if row.capability == generation(capability))


def part_length(length: int, heads: int, landmarks: int) -> int:
    """Return into parts of how many tokens the long side is cut: from sizes alone."""
    part = LONGEST_PART * max(64, 1 << (landmarks - 1).bit_length())
    while part > SHORTEST_PART and heads * -(-length // part) < PROGRAMS:
        part //= 2
    return part
