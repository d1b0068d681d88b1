"""TileOrder: an order of grid tokens in which neighbouring patches form contiguous blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.constants import EMPTY_BLOCK
from sparseattn.structures.block_mask import BlockMask

_OP = "TileOrder"
_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}  # 64 tokens, one block


@dataclass(frozen=True, eq=False)
class TileOrder:
    """Tokens of a 1-D, 2-D or 3-D grid, one tile of neighbours after the other.

    In raster order a block of 64 tokens is a thin strip of an image; in tiles of 8 x 8 it is a
    square, whose tokens are alike: its mean says more, and windows need fewer blocks. Put tokens in
    this order once in front of a network, and back once behind it::

        order = TileOrder.of_grid((64, 64), (8, 8), prefix=1)     # 64 x 64 patches, a class token
        y = order.undo(network(order.apply(x)))                   # x [B, 1 + 4096, channels]

    Prefix tokens stay first. The tiles follow each other in turns, every second line of tiles
    backwards, so that a block which straddles two tiles (behind a prefix, or where the edge of the
    grid cuts tiles short) holds neighbours too. Inside a tile tokens stand in raster order.

    shape    tokens along each axis of the grid
    tile     tokens along each axis of a tile; an anisotropic grid wants an anisotropic tile
    prefix   class or register tokens in front of the grid
    forward  int64 [N], the token (prefix, then raster order) that stands at each place
    inverse  int64 [N], the place of each token
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    prefix: int
    forward: Tensor
    inverse: Tensor

    @classmethod
    def of_grid(
        cls,
        shape: int | tuple[int, ...],
        tile: int | tuple[int, ...] | None = None,
        *,
        prefix: int = 0,
        device: torch.device | str | None = None,
    ) -> TileOrder:
        """Build the order of a grid.

        Args:
            shape: tokens along each of one to three axes, in raster order, last axis fastest.
            tile: tokens of a tile along each axis; default 64, 8 x 8 or 4 x 4 x 4. A number of
                tokens that is the block size makes every block a tile.
            prefix: class or register tokens in front of the grid.
            device: where the index vectors are put; they are built on the host.
        """
        sizes = _axes("shape", shape, 0)
        if tile is None:
            tile = _TILES[len(sizes)]
        pieces = _axes("tile", tile, 1)
        if len(pieces) != len(sizes):
            raise ValueError(
                f"{_OP}: tile {checks.describe(tile)}; "
                f"expected one int per axis, axes={len(sizes)} (from shape)"
            )
        checks.require_int(_OP, "prefix", prefix, low=0)
        order = np.concatenate((np.arange(prefix), prefix + _in_tiles(sizes, pieces)))
        forward = torch.from_numpy(order).to(device)
        inverse = torch.from_numpy(np.argsort(order)).to(device)
        return cls(sizes, pieces, prefix, forward, inverse)

    def __len__(self) -> int:
        """Return N, the number of tokens, those of the prefix counted."""
        return self.forward.shape[0]

    def __repr__(self) -> str:
        """Describe the geometry without reading the device."""
        device = str(self.forward.device)
        return (
            f"TileOrder(shape={self.shape}, tile={self.tile}, prefix={self.prefix}, "
            f"device={device!r})"
        )

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return x with the tokens of dimension `dim` in this order; a copy, with a gradient."""
        self._check(x, dim)
        return x.index_select(dim, self.forward)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return x with the tokens of dimension `dim` back in raster order: undoes `apply`."""
        self._check(x, dim)
        return x.index_select(dim, self.inverse)

    def window(
        self, radius: int | tuple[int, ...], *, block_size: tuple[int, int] | int = (64, 64)
    ) -> BlockMask:
        """Let every token see those at most `radius` away along every axis of the grid.

        As ``BlockMask.window``, for tokens in this order; prefix tokens see and are seen by all.
        """
        from sparseattn.structures.windows import window

        order = self.forward.cpu().numpy()
        mask = window(self.shape, radius, block_size, self.prefix, order)
        return mask.to(self.forward.device)

    def window_blocks(
        self, radius: int | tuple[int, ...], *, block_size: tuple[int, int] | int = (64, 64)
    ) -> Tensor:
        """Return the blocks that ``window`` touches, bool [1, 1, R, C].

        Unites a window with blocks chosen by their scores: ``topk_attention(..., always=blocks)``
        or ``BlockMask.from_block_scores(..., always=blocks)``. radius=0 forces a block's own block
        and those of prefix tokens.
        """
        return self.window(radius, block_size=block_size).block_states() != EMPTY_BLOCK

    def to(self, device: torch.device | str) -> TileOrder:
        """Return the order with its index vectors on `device`."""
        target = torch.device(device)
        return self.map(lambda tensor: tensor.to(target))

    def map(self, move: Callable[[Tensor], Tensor]) -> TileOrder:
        """Return the order with both index vectors passed through `move`."""
        return TileOrder(self.shape, self.tile, self.prefix, move(self.forward), move(self.inverse))

    def _check(self, x: Any, dim: Any) -> None:
        checks.require_tensor(_OP, "x", x)
        if type(dim) is not int or not -x.dim() <= dim < x.dim():
            raise ValueError(f"{_OP}: dim is {dim}; expected a dimension of x, dims={x.dim()}")
        if x.shape[dim] != len(self):
            raise ValueError(
                f"{_OP}: x {checks.describe(x)}; expected {len(self)} tokens in dimension {dim}"
            )
        checks.require_device(_OP, "x", x, self.forward.device, "order")


def _axes(name: str, value: Any, low: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else value
    rule = "an int or a tuple of one to three ints"
    if not isinstance(sizes, (tuple, list)):
        raise TypeError(f"{_OP}: {name} {checks.describe(value)}; expected {rule}")
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{_OP}: {name} {checks.describe(value)}; expected {rule}")
    for size in sizes:
        checks.require_int(_OP, name, size, low=low)
    return tuple(sizes)


def _in_tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> np.ndarray:
    """Return raster indices of a grid, tile after tile."""
    places = np.indices(shape).reshape(len(shape), -1)
    turn = np.zeros(places.shape[1], dtype=np.int64)  # which tile, in turns
    inside = np.zeros_like(turn)
    for place, size, piece in zip(places, shape, tile, strict=True):
        count = -(-size // piece)
        line = place // piece
        turn = turn * count + np.where(turn % 2 == 0, line, count - 1 - line)
        inside = inside * piece + place % piece
    return np.lexsort((inside, turn)).astype(np.int64)
