"""Ascending index lists of a block mask, one per row and one per column of blocks.

Both directions are compressed rows, separate for every batch entry and head:

    offsets [B, H, L + 1]     int32   line l owns entries offsets[l] .. offsets[l + 1] - 1
    indices [B, H, capacity]  int32   the blocks each line keeps, ascending; then PAD_INDEX

Rows 0 and 1 of a 2 x 4 grid that keep blocks {0, 3} and {1}, with capacity 4:

    offsets = [0, 2, 3]     indices = [0, 3, 1, -1]

The capacity is fixed by shapes alone, so nothing waits for the device. The lists come from a
counting sort: count each line, scan the counts, write each entry to its place in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseattn.constants import PAD_INDEX


@dataclass(frozen=True, eq=False)
class BlockLists:
    """One direction of a mask.

    offsets  [B, H, L + 1]     int32
    indices  [B, H, capacity]  int32
    slots    [B, H, capacity]  int32 or None: where the token bits of an entry's block lie
    """

    offsets: Tensor
    indices: Tensor
    slots: Tensor | None = None

    @property
    def num_lines(self) -> int:
        """How many rows (or columns) of blocks there are."""
        return self.offsets.shape[-1] - 1

    @property
    def capacity(self) -> int:
        """How many entries one batch entry and head can hold."""
        return self.indices.shape[-1]

    def counts(self) -> Tensor:
        """Return the number of entries of every line, int32 [B, H, L]."""
        return self.offsets.diff(dim=-1)

    def lines(self) -> Tensor:
        """Return the line each entry belongs to, int32 [B, H, capacity]; L past the last entry."""
        entry = torch.arange(self.capacity, dtype=torch.int32, device=self.offsets.device)
        entry = entry.expand(self.indices.shape).contiguous()
        ends = self.offsets[..., 1:].contiguous()
        return torch.searchsorted(ends, entry, right=True, out_int32=True)

    def map(self, move: Callable[[Tensor], Tensor]) -> BlockLists:
        """Return the same lists with every tensor passed through `move`."""
        slots = None if self.slots is None else move(self.slots)
        return BlockLists(move(self.offsets), move(self.indices), slots)


def build_lists(blocks: Tensor, capacity: int) -> tuple[BlockLists, BlockLists]:
    """Return the row lists and the column lists of `blocks` (bool [B, H, R, C]).

    No head may keep more than `capacity` blocks; entries past it would be lost.
    """
    row_offsets, rows, column_offsets, columns = torch.ops.sparseattn.block_lists.default(
        blocks, capacity
    )
    return BlockLists(row_offsets, rows), BlockLists(column_offsets, columns)


_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "block_lists(Tensor blocks, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _allocate(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, columns = blocks.shape
    new = blocks.new_empty
    return (
        new((batch, heads, rows + 1), dtype=torch.int32),
        new((batch, heads, capacity), dtype=torch.int32),
        new((batch, heads, columns + 1), dtype=torch.int32),
        new((batch, heads, capacity), dtype=torch.int32),
    )


def _places(grid: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return line and place in it of every true value, int32, in order; `counts` are per line."""
    line = np.repeat(np.arange(grid.shape[0], dtype=np.int32), counts)
    return line, np.flatnonzero(grid).astype(np.int32) - line * np.int32(grid.shape[1])


def _block_lists_host(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lists = _allocate(blocks, capacity)
    row_offsets, rows, column_offsets, columns = (tensor.numpy() for tensor in lists)
    grid = blocks.contiguous().numpy()
    num_rows, num_columns = grid.shape[2:]
    bits = grid.view(np.uint8)
    counts = bits.sum(3, dtype=np.int32)
    column_counts = np.zeros((*column_offsets.shape[:2], num_columns), np.int32)
    for first in range(0, num_rows, 255):  # as many ones fit a byte, whose sums are fast
        column_counts += bits[:, :, first : first + 255].sum(2, dtype=np.uint8)
    row_offsets[..., 0] = column_offsets[..., 0] = 0
    np.cumsum(counts, axis=2, out=row_offsets[..., 1:])
    np.cumsum(column_counts, axis=2, out=column_offsets[..., 1:])
    for head in np.ndindex(grid.shape[:2]):
        row, column = _places(grid[head], counts[head])
        if 2 * row.size > grid[head].size:  # then a second walk is faster than the sort
            by_column = _places(grid[head].T, column_counts[head])[1]
        else:
            short = np.min_scalar_type(max(0, num_columns - 1))  # 8 or 16 bits: a counting sort
            by_column = row[column.astype(short).argsort(kind="stable")]
        for entries, kept in ((rows[head], column), (columns[head], by_column)):
            entries[: kept.size] = kept[:capacity]
            entries[kept.size :] = PAD_INDEX
    return lists


def _block_lists_cuda(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        import sparseattn.kernels.block_select.lists as kernels
    except ImportError:  # no Triton beside this torch: build on the host, at the price of a copy
        moved = _block_lists_host(blocks.cpu(), capacity)
        first, second, third, fourth = (tensor.to(blocks.device) for tensor in moved)
        return first, second, third, fourth
    return *kernels.build(blocks, capacity), *kernels.build(blocks.mT, capacity)


_library.impl("block_lists", _block_lists_host, "CPU")
_library.impl("block_lists", _block_lists_cuda, "CUDA")
torch.library.register_fake("sparseattn::block_lists", _allocate, lib=_library)
