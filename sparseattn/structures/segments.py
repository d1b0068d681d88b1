"""Segments: which of m landmarks every token belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of m landmarks every token belongs to; each is the mean of its tokens.

    A batch of 1 serves all samples.

    ids: int32 [B or 1, N], from 0 to m - 1; -1 for a token that takes no part.
    counts: int32 [B or 1, m], tokens of a segment; 0 for a landmark that does not exist.
    starts: int32 [B or 1, m + 1]: the tokens of segment r, among others that take no part, are
        those at starts[r] to starts[r + 1] of `order`.
    order: int32 [N], tokens segment by segment; None: as they stand.
    """

    ids: Tensor
    counts: Tensor
    starts: Tensor
    order: Tensor | None

    @classmethod
    def balanced(
        cls, length: int, count: int, key_mask: Tensor | None, device: torch.device
    ) -> Segments:
        """Cut tokens in their order into `count` segments whose sizes differ by one at most.

        With a key_mask [B, N] tokens that take part are counted alone: padding moves no border.
        """
        if key_mask is None:
            rank, total = torch.arange(length, device=device)[None], max(1, length)
            return cls._of_places(rank * count // total, count, None, None)
        taken = key_mask.long()
        rank, seen = taken.cumsum(1) - taken, taken.sum(1, keepdim=True).clamp(min=1)
        return cls._of_places((rank * count // seen).clamp(max=count - 1), count, key_mask, None)

    @classmethod
    def of_grid(
        cls,
        grid: Sequence[int],
        cells: Sequence[int],
        prefix: int,
        key_mask: Tensor | None,
        device: torch.device,
    ) -> Segments:
        """Cut a grid of tokens in raster order into boxes, cells[a] along axis a.

        The first `prefix` tokens, in front of the grid, are a segment each.
        """
        box = torch.zeros((), dtype=torch.long, device=device)
        for size, parts in zip(grid, cells, strict=True):
            along = torch.arange(size, device=device) * parts // size
            box = box[..., None] * parts + along
        places = torch.cat((torch.arange(prefix, device=device), prefix + box.flatten()))[None]
        order = torch.argsort(places[0], stable=True)
        return cls._of_places(places, prefix + math.prod(cells), key_mask, order)

    @classmethod
    def _of_places(
        cls, places: Tensor, count: int, mask: Tensor | None, order: Tensor | None
    ) -> Segments:
        """Finish segments from the place of every token, masked or not; in `order` they ascend."""
        ascending = places if order is None else places[:, order]
        borders = torch.arange(count + 1, device=places.device).expand(len(places), -1)
        starts = torch.searchsorted(ascending.contiguous(), borders.contiguous())
        ids, counts = places, starts.diff(dim=1)
        if mask is not None:
            ids = torch.where(mask, places, -1)
            taken = mask if order is None else mask[:, order]
            before = torch.nn.functional.pad(taken.cumsum(1), (1, 0))
            counts = before.gather(1, starts.expand(len(mask), -1)).diff(dim=1)
        order = None if order is None else order.int()
        return cls(ids.int(), counts.int(), starts.int(), order)


def cells_of(grid: Sequence[int], count: int) -> tuple[int, ...]:
    """Return how many boxes to cut along each axis: at most `count` in all, near cubes."""
    cells = [1] * len(grid)
    while True:
        longest = sorted(range(len(grid)), key=lambda axis: -grid[axis] / cells[axis])
        for axis in longest:
            more = math.prod(cells) // cells[axis] * (cells[axis] + 1)
            if more <= count and cells[axis] < grid[axis]:
                cells[axis] += 1
                break
        else:
            return tuple(cells)
