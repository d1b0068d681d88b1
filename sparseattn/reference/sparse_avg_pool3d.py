"""What average pooling of active patches means: torch's on a volume that is 0 elsewhere."""

from __future__ import annotations

from torch.nn.functional import avg_pool3d

from sparseattn.structures.patch_grid import PatchGrid

Sizes = tuple[int, int, int]


def sparse_avg_pool3d(
    x: PatchGrid, kernel: Sizes, stride: Sizes, padding: Sizes, include_padding: bool,
    divisor: int | None,
) -> PatchGrid:  # fmt: skip
    """Return the pooled volume at the active patches."""
    volume = avg_pool3d(
        x.to_dense(), kernel, stride, padding, count_include_pad=include_padding,
        divisor_override=divisor,
    )  # fmt: skip
    return PatchGrid.from_dense(volume, x.mask)
