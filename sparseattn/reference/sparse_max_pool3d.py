"""What max pooling of active patches means: torch's on a volume that is 0 elsewhere."""

from __future__ import annotations

from torch.nn.functional import max_pool3d

from sparseattn.structures.patch_grid import PatchGrid

Sizes = tuple[int, int, int]


def sparse_max_pool3d(x: PatchGrid, kernel: Sizes, stride: Sizes, padding: Sizes) -> PatchGrid:
    """Return the pooled volume at the active patches."""
    return PatchGrid.from_dense(max_pool3d(x.to_dense(), kernel, stride, padding), x.mask)
