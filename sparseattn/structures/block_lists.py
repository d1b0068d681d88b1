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


def _block_lists_host(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lists = _allocate(blocks, capacity)
    arrays = [tensor.numpy() for tensor in lists]
    grids = blocks.numpy()
    for head in np.ndindex(grids.shape[:2]):  # one head at a time stays in cache
        _write_lists(np.ascontiguousarray(grids[head]), arrays[0][head], arrays[1][head])
        _write_lists(np.ascontiguousarray(grids[head].T), arrays[2][head], arrays[3][head])
    return lists


def _write_lists(grid: np.ndarray, offsets: np.ndarray, indices: np.ndarray) -> None:
    """Fill the offsets and indices of one head's lines."""
    width = grid.shape[1]
    offsets[0] = 0
    np.cumsum(grid.view(np.uint8).sum(1, dtype=np.int32), out=offsets[1:])
    kept = np.flatnonzero(grid)[: indices.size].astype(np.int32)
    if width & (width - 1):
        kept %= np.int32(width)
    else:  # a power of two, as grids often are: the remainder is a mask of bits
        kept &= np.int32(max(width, 1) - 1)
    indices[: kept.size] = kept
    indices[kept.size :] = PAD_INDEX


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
