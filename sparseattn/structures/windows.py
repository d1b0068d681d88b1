"""Windows of a 1-D, 2-D or 3-D grid of tokens, in any order, with class tokens in front."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from sparseattn import checks
from sparseattn.constants import BITS_PER_WORD, EMPTY_BLOCK, FULL_BLOCK
from sparseattn.structures import token_bits as bits_of
from sparseattn.structures.block_mask import BlockMask, check_geometry

_OP = "BlockMask.window"


def window(
    shape: Any, radius: Any, block_size: Any, prefix: Any, order: np.ndarray | None = None
) -> BlockMask:
    """Build ``BlockMask.window`` on the host; cost and memory follow the visible blocks.

    order: the token (prefix, then raster order) at each place; default its own place.
    """
    grid, reach = _axes(shape, radius)
    checks.require_int(_OP, "prefix", prefix, low=0)
    length = prefix + int(np.prod(grid))
    geometry = check_geometry(length, length, block_size)
    block_q, block_k = geometry
    num_columns = -(-length // block_k)
    tokens = np.arange(length) if order is None else order
    block_of = np.empty_like(tokens)  # of every token
    block_of[tokens] = np.arange(length) // block_k
    states = np.full((-(-length // block_q), num_columns), EMPTY_BLOCK, dtype=np.int32)
    bits = bits_of.words_per_row(block_k) * BITS_PER_WORD
    words = [np.zeros((0, block_q, bits // BITS_PER_WORD), dtype=np.int32)]
    slot = 0
    for row, start in enumerate(range(0, length, block_q)):
        queries = tokens[start : start + block_q]
        if order is None:
            columns = _candidates(queries, grid, reach, prefix, block_k, num_columns)
        else:
            columns = _box_candidates(queries, grid, reach, prefix, block_of)
        keys = (columns[:, None] * block_k + np.arange(block_k)).ravel()
        inside = keys < length
        seen = tokens[np.minimum(keys, length - 1)]
        visible = _visible(queries, seen, grid, reach, prefix) & inside
        blocks = visible.reshape(len(queries), len(columns), block_k).swapaxes(0, 1)
        kept = blocks.sum((1, 2))
        full = (kept > 0) & (kept == len(queries) * inside.reshape(-1, block_k).sum(1))
        partial = (kept > 0) & ~full
        states[row, columns[full]] = FULL_BLOCK
        states[row, columns[partial]] = slot + np.arange(partial.sum())
        padded = np.zeros((int(partial.sum()), block_q, bits), dtype=bool)
        padded[:, : len(queries), :block_k] = blocks[partial]
        words.append(np.packbits(padded, axis=2, bitorder="little").view(np.int32))
        slot += len(padded)
    token_bits = torch.from_numpy(np.concatenate(words))[None, None]
    return BlockMask.from_states(
        torch.from_numpy(states)[None, None],
        token_bits if slot else None,
        length,
        length,
        geometry,
        (int((states == FULL_BLOCK).sum()), slot),
    )


def _axes(shape: Any, radius: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    grid = (shape,) if isinstance(shape, int) else shape
    rule = "an int or a tuple of one to three ints"
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"{_OP}: shape {checks.describe(shape)}; expected {rule}")
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"{_OP}: shape {checks.describe(shape)}; expected {rule}")
    reach = (radius,) * len(grid) if isinstance(radius, int) else radius
    rule = f"an int or one int per axis, axes={len(grid)} (from shape)"
    if not isinstance(reach, (tuple, list)):
        raise TypeError(f"{_OP}: radius {checks.describe(radius)}; expected {rule}")
    if len(reach) != len(grid):
        raise ValueError(f"{_OP}: radius {checks.describe(radius)}; expected {rule}")
    for size in grid:
        checks.require_int(_OP, "shape", size, low=0)
    for size in reach:
        checks.require_int(_OP, "radius", size, low=0)
    return tuple(grid), tuple(reach)


def _candidates(
    queries: np.ndarray,
    grid: tuple[int, ...],
    reach: tuple[int, ...],
    prefix: int,
    block_k: int,
    num_columns: int,
) -> np.ndarray:
    """Return the key blocks that may hold a visible key, ascending: a superset of the window."""
    if queries[0] < prefix:
        return np.arange(num_columns)
    places = np.unravel_index(queries - prefix, grid)
    lows = [max(0, int(p.min()) - r) for p, r in zip(places, reach, strict=True)]
    highs = [
        min(size - 1, int(p.max()) + r) for p, r, size in zip(places, reach, grid, strict=True)
    ]
    blocks = [np.arange(-(-prefix // block_k))]
    # the keys of one line along the last axis are contiguous: its first and last block suffice
    outer = [range(low, high + 1) for low, high in zip(lows[:-1], highs[:-1], strict=True)]
    for line in itertools.product(*outer):
        first = prefix + int(np.ravel_multi_index((*line, lows[-1]), grid))
        last = prefix + int(np.ravel_multi_index((*line, highs[-1]), grid))
        blocks.append(np.arange(first // block_k, last // block_k + 1))
    return np.unique(np.concatenate(blocks))


def _box_candidates(
    queries: np.ndarray,
    grid: tuple[int, ...],
    reach: tuple[int, ...],
    prefix: int,
    block_of: np.ndarray,
) -> np.ndarray:
    """Return the key blocks with a token in reach of the queries' bounding box, ascending."""
    if (queries < prefix).any():
        return np.unique(block_of)
    places = np.unravel_index(queries - prefix, grid)
    box = [
        np.arange(max(0, int(p.min()) - r), min(size, int(p.max()) + r + 1))
        for p, r, size in zip(places, reach, grid, strict=True)
    ]
    near = prefix + np.ravel_multi_index(np.ix_(*box), grid)
    return np.unique(np.concatenate((block_of[:prefix], block_of[near.ravel()])))


def _visible(
    queries: np.ndarray,
    keys: np.ndarray,
    grid: tuple[int, ...],
    reach: tuple[int, ...],
    prefix: int,
) -> np.ndarray:
    """Return bool [queries, keys]: within reach along every axis, or one of them in the prefix."""
    if 0 in grid:  # there are only prefix tokens
        return np.ones((len(queries), len(keys)), dtype=bool)
    q_places = np.unravel_index(np.maximum(queries - prefix, 0), grid)
    k_places = np.unravel_index(np.maximum(keys - prefix, 0), grid)
    visible = np.ones((len(queries), len(keys)), dtype=bool)
    for q_place, k_place, limit in zip(q_places, k_places, reach, strict=True):
        lines, line_of = np.unique(q_place, return_inverse=True)  # few along the outer axes
        near = np.abs(lines[:, None].astype(np.int32) - k_place.astype(np.int32)) <= limit
        visible &= near if len(lines) == 1 else near[line_of]
    return visible | (queries < prefix)[:, None] | (keys < prefix)
