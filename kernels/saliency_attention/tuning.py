"""Launch parameters of the token gather, chosen from compiled resources; MEASURED says which not.

A row serves tokens of at most `row_bytes` bytes; the first that fits is taken, else the last.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    row_bytes: int
    tile_rows: int
    num_warps: int


# table -> capability of its rows -> GPU, versions and date of the measurement; absent: unmeasured
MEASURED: dict[str, dict[int, str]] = {}

# fmt: off
#               bytes  rows  warps
GATHER = (
    Row(          128,   64,    4),
    Row(          512,   32,    4),
    Row(         4096,    4,    4),
)
# fmt: on

WIDEST = 1024  # columns a program holds at once; wider tokens take several turns


def pick(row_bytes: int) -> Row:
    """Return the row for tokens of so many bytes."""
    return next((row for row in GATHER if row_bytes <= row.row_bytes), GATHER[-1])
