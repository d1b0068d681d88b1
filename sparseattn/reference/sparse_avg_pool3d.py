"""What average pooling of active patches means: torch's on a volume that is 0 elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad

from sparseattn.structures.patch_grid import PatchGrid

Sizes = tuple[int, int, int]


def sparse_avg_pool3d(
    x: PatchGrid, kernel: Sizes, stride: Sizes, padding: Sizes, include_padding: bool,
    divisor: int | None,
) -> PatchGrid:  # fmt: skip
    """Return the pooled volume at the active patches.

    Borders are made by pad(), since torch's pool takes no volume smaller than its window, and on a
    CPU no 16 bits.
    """
    borders = [border for size in reversed(padding) for border in (size, size)]

    def summed(volume: Tensor) -> Tensor:
        return avg_pool3d(pad(volume, borders), kernel, stride, divisor_override=1)

    volume = x.to_dense()
    wide = torch.promote_types(volume.dtype, torch.float32)
    counts: Tensor | int = divisor or math.prod(kernel)
    if divisor is None and not include_padding:
        counts = summed(torch.ones_like(volume[:1, :1], dtype=wide))
    return PatchGrid.from_dense((summed(volume.to(wide)) / counts).to(volume.dtype), x.mask)
