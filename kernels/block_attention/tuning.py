"""Launch parameters of block attention, chosen from compiled resources; MEASURED says which not.

A row serves inputs of at most `head_dim` columns and of `itemsize` bytes on GPUs of one generation.
Of several such rows the first is taken whose tiles divide the mask's blocks, else the last, its
tiles cut to what divides them.
"""

from __future__ import annotations

from typing import NamedTuple

from ..launch import Launch


class Row(NamedTuple):
    """One line of a table.

    float32: how float32 products are made where TF32 is not allowed. "tf32x3" is three TF32
        products on tensor cores; "ieee" is plain arithmetic, where "tf32x3" does not fit registers.
    only: "plain" if it serves only inputs without bias and gate, which need more registers; "full"
        if the mask may have no partial blocks either.
    tma: whether the tiles that a program walks are loaded by descriptor (TMA, Hopper on)
        where the inputs allow it, else by pointers.
    """

    capability: int
    itemsize: int
    head_dim: int
    launch: Launch
    float32: str = "tf32x3"
    only: str = ""
    tma: bool = False


# table -> capability of its rows -> GPU, versions and date of the measurement; absent: unmeasured
MEASURED: dict[str, dict[int, str]] = {}

# fmt: off
#                   cap  bytes  D           tile_q  tile_k  warps  stages
FORWARD = (
    Row(             90,   2,   48, Launch(    128,     64,     8,      3), tma=True),
    Row(             90,   2,   48, Launch(     64,     64,     4,      3), tma=True),
    Row(             90,   2,   64, Launch(    128,    128,     8,      3), tma=True),
    Row(             90,   2,   64, Launch(    128,     64,     8,      3), tma=True),
    Row(             90,   2,   64, Launch(     64,     64,     4,      2), tma=True),
    Row(             90,   2,  128, Launch(    128,     64,     8,      3), tma=True),
    Row(             90,   2,  128, Launch(     64,     64,     4,      2), tma=True),
    Row(             90,   2,  256, Launch(     64,     32,     8,      3), tma=True),
    Row(             90,   4,   64, Launch(     64,     32,     4,      3)),
    Row(             90,   4,  128, Launch(     32,     16,     8,      2), "ieee"),
    Row(             90,   4,  256, Launch(     32,     16,     8,      1), "ieee"),
    Row(             80,   2,   64, Launch(    128,     64,     8,      3)),
    Row(             80,   2,   64, Launch(     64,     64,     4,      3)),
    Row(             80,   2,   96, Launch(     64,     32,     4,      2)),
    Row(             80,   2,  128, Launch(    128,     32,     8,      2)),
    Row(             80,   2,  128, Launch(     64,     64,     4,      2)),
    Row(             80,   2,  192, Launch(     32,     32,     8,      1)),
    Row(             80,   2,  256, Launch(     32,     32,     4,      2)),
    Row(             80,   4,   64, Launch(     32,     32,     4,      2)),
    Row(             80,   4,   96, Launch(     32,     16,     4,      1), "ieee"),
    Row(             80,   4,  128, Launch(     32,     16,     8,      1), "ieee", only="full"),
    Row(             80,   4,  128, Launch(     16,     16,     4,      1), "ieee", only="plain"),
    Row(             80,   4,  128, Launch(     32,     16,     8,      1), "ieee"),
    Row(             80,   4,  256, Launch(     32,     16,     8,      1), "ieee"),
)

BACKWARD_DKV = (
    Row(             90,   2,   48, Launch(     64,    128,     8,      2), only="full", tma=True),
    Row(             90,   2,   48, Launch(     64,     64,     4,      1), only="plain", tma=True),
    Row(             90,   2,   48, Launch(     32,    128,     8,      2), tma=True),
    Row(             90,   2,   48, Launch(     32,     64,     4,      2), tma=True),
    Row(             90,   2,   64, Launch(     64,    128,     8,      2), only="full", tma=True),
    Row(             90,   2,   64, Launch(     64,    128,     8,      1), only="plain", tma=True),
    Row(             90,   2,   64, Launch(     64,     64,     4,      2), only="full", tma=True),
    Row(             90,   2,   64, Launch(     64,     64,     4,      1), only="plain", tma=True),
    Row(             90,   2,   64, Launch(     32,     64,     4,      2), tma=True),
    Row(             90,   2,   96, Launch(     32,     64,     8,      2), only="plain", tma=True),
    Row(             90,   2,   96, Launch(     16,     64,     4,      1), tma=True),
    Row(             90,   2,  128, Launch(     64,     64,     8,      2), only="full", tma=True),
    Row(             90,   2,  128, Launch(     32,     64,     8,      2), only="plain", tma=True),
    Row(             90,   2,  128, Launch(     64,     32,     8,      2), tma=True),
    Row(             90,   2,  192, Launch(     16,     32,     8,      2), tma=True),
    Row(             90,   2,  256, Launch(     32,     32,     8,      2), only="plain", tma=True),
    Row(             90,   2,  256, Launch(     32,     32,     8,      1), tma=True),
    Row(             90,   4,   64, Launch(     16,     32,     4,      2), only="plain"),
    Row(             90,   4,   64, Launch(     16,     32,     8,      1)),
    Row(             90,   4,  128, Launch(     16,     32,     8,      1), "ieee", only="plain"),
    Row(             90,   4,  128, Launch(     16,     64,     8,      1), "ieee"),
    Row(             90,   4,  256, Launch(     16,     16,     8,      1), "ieee", only="plain"),
    Row(             90,   4,  256, Launch(     16,     32,     8,      1), "ieee"),
    Row(             80,   2,   64, Launch(     32,     64,     4,      2), only="full"),
    Row(             80,   2,   64, Launch(     32,     64,     4,      1), only="plain"),
    Row(             80,   2,   64, Launch(     16,     64,     4,      2)),
    Row(             80,   2,   80, Launch(     16,     32,     8,      1), only="plain"),
    Row(             80,   2,   80, Launch(     16,     16,     8,      1)),
    Row(             80,   2,   96, Launch(     32,     32,     8,      2), only="full"),
    Row(             80,   2,   96, Launch(     16,     32,     4,      2), only="plain"),
    Row(             80,   2,   96, Launch(     16,     32,     8,      2)),
    Row(             80,   2,  128, Launch(     32,     32,     4,      2), only="plain"),
    Row(             80,   2,  128, Launch(     32,     32,     8,      2)),
    Row(             80,   2,  256, Launch(     16,     16,     8,      2)),
    Row(             80,   4,   64, Launch(     16,     32,     4,      1), only="plain"),
    Row(             80,   4,   64, Launch(     16,     16,     8,      1)),
    Row(             80,   4,  128, Launch(     16,     32,     8,      1), "ieee", only="plain"),
    Row(             80,   4,  128, Launch(     16,     64,     8,      1), "ieee"),
    Row(             80,   4,  256, Launch(     16,     16,     8,      1), "ieee", only="plain"),
    Row(             80,   4,  256, Launch(     16,     32,     8,      1), "ieee"),
)

BACKWARD_DQ = (
    Row(             90,   2,   48, Launch(    128,     64,     8,      2), tma=True),
    Row(             90,   2,   48, Launch(     64,     64,     4,      2), tma=True),
    Row(             90,   2,   64, Launch(    128,    128,     8,      2), tma=True),
    Row(             90,   2,   64, Launch(    128,     64,     8,      2), tma=True),
    Row(             90,   2,   64, Launch(     64,     64,     4,      2), tma=True),
    Row(             90,   2,  128, Launch(    128,     64,     8,      2), tma=True),
    Row(             90,   2,  128, Launch(     64,     64,     4,      2), tma=True),
    Row(             90,   2,  256, Launch(     64,     32,     8,      2), only="plain", tma=True),
    Row(             90,   2,  256, Launch(     64,     16,     8,      2), tma=True),
    Row(             90,   4,   64, Launch(     64,     32,     4,      1)),
    Row(             90,   4,  128, Launch(     32,     32,     8,      1), "ieee", only="full"),
    Row(             90,   4,  128, Launch(     32,     16,     8,      1), "ieee"),
    Row(             90,   4,  192, Launch(     32,     16,     8,      1), "ieee"),
    Row(             90,   4,  256, Launch(     32,     16,     8,      2), "ieee"),
    Row(             80,   2,   64, Launch(     64,     64,     8,      2)),
    Row(             80,   2,   80, Launch(     16,     32,     8,      2)),
    Row(             80,   2,  128, Launch(     32,     32,     4,      2)),
    Row(             80,   2,  256, Launch(     32,     32,     8,      2)),
    Row(             80,   4,   64, Launch(     32,     32,     8,      1)),
    Row(             80,   4,   96, Launch(     32,     16,     8,      2), "ieee", only="plain"),
    Row(             80,   4,   96, Launch(     32,     16,     8,      1), "ieee"),
    Row(             80,   4,  128, Launch(     32,     16,     8,      1), "ieee"),
    Row(             80,   4,  256, Launch(     16,     16,     4,      1), "ieee"),
)
# fmt: on

MAX_TILE = 128  # no tile has more rows
# Rows of the small kernels before and after: queries a program handles.
DELTA_ROWS = 64
COMBINE_ROWS = 16
# A split of the key list walks at least so many tiles, and at most so many splits are made.
SPLIT_TILES = 8
MOST_SPLITS = 32


def generation(capability: int) -> int:
    """Return whose rows a GPU uses: 90 on Hopper, else 80, which fit the smallest shared memory.

    Rows of its own for 100 and 120 want measurements on such GPUs.
    """
    return 90 if capability == 90 else 80


def pick(
    table: tuple[Row, ...],
    capability: int,
    itemsize: int,
    head_dim: int,
    block_size: tuple[int, int] = (MAX_TILE, MAX_TILE),
    *,
    loaded: bool = False,
    partial: bool = False,
) -> Row:
    """Return the first row whose tiles divide the blocks, else the last, whose tiles are cut.

    loaded: whether there is a bias or a gate; partial: whether the mask has partial blocks.
    """
    kind = (generation(capability), itemsize)
    rows = [r for r in table if (r.capability, r.itemsize) == kind and head_dim <= r.head_dim]
    if not rows:
        raise NotImplementedError(
            f"block_attention: no launch row for capability {capability}, {itemsize} bytes, "
            f"head dim {head_dim}"
        )
    rows = [r for r in rows if r.head_dim == rows[0].head_dim]
    rows = [r for r in rows if not (r.only and loaded) and not (r.only == "full" and partial)]
    for row in rows:
        if not (block_size[0] % row.launch.tile_q or block_size[1] % row.launch.tile_k):
            return row
    return rows[-1]
