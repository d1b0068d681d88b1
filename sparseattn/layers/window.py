"""The method "window": tokens of a grid attend to their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseattn.layers.method import Call, Method
from sparseattn.ops.block_sparse_attention import Impl
from sparseattn.structures.block_mask import BlockMask


class Window(Method):
    """Each token attends to those at most `radius` away along every axis of the grid.

    grid: tokens along each axis, in raster order. prefix: class and register tokens before the
    grid; they see and are seen by all. block_size: tokens in a block of the mask. The mask is
    built once, for queries and keys on that one grid, and never falls back to dense attention.
    """

    name = "window"
    options = ("radius", "grid", "prefix", "block_size", "impl")

    def __init__(
        self,
        radius: int | tuple[int, ...],
        grid: int | tuple[int, ...],
        prefix: int = 0,
        block_size: int = 64,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        self.radius, self.grid, self.prefix, self.block_size = radius, grid, prefix, block_size
        self.mask = BlockMask.window(grid, radius, prefix=prefix, block_size=block_size)

    def _mask(self, call: Call) -> BlockMask:
        return self.mask

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Window:
        """Move the mask along. On the meta device it stays where it was: nothing refills it."""
        super()._apply(fn, *args, **kwargs)
        device = fn(torch.empty(0, device=self.mask.device)).device
        if device.type != "meta":
            self.mask = self.mask.to(device)
        return self
