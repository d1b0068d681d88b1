"""Pools of active patches as modules: torch's constructors, on a ``PatchGrid``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparseattn import checks
from sparseattn.ops.sparse_avg_pool3d import sparse_avg_pool3d
from sparseattn.ops.sparse_max_pool3d import sparse_max_pool3d
from sparseattn.structures.patch_grid import PatchGrid


class SparseMaxPool3d(nn.MaxPool3d):
    """``nn.MaxPool3d`` of the masked volume; see :func:`sparseattn.sparse_max_pool3d`."""

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Pool the active patches."""
        return sparse_max_pool3d(x, *window_of(self))


class SparseAvgPool3d(nn.AvgPool3d):
    """``nn.AvgPool3d`` of the masked volume; see :func:`sparseattn.sparse_avg_pool3d`."""

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Pool the active patches."""
        return sparse_avg_pool3d(
            x, *window_of(self), count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override,
        )  # fmt: skip


class SparseGlobalPool(nn.Module):
    """The mean or the maximum of every sample's active sites, [B, C].

    Hidden sites take no part, neither in the sum nor in the count. A sample without active sites
    gets 0.

    Args:
        mode: "mean" or "max".
    """

    def __init__(self, mode: Literal["mean", "max"] = "mean") -> None:
        super().__init__()
        if mode not in ("mean", "max"):
            raise ValueError(f"SparseGlobalPool: mode is {mode!r}; expected 'mean' or 'max'")
        self.mode = mode

    def extra_repr(self) -> str:
        """Say the mode."""
        return self.mode

    def forward(self, x: PatchGrid) -> Tensor:
        """Return one vector a sample."""
        if not isinstance(x, PatchGrid):
            raise TypeError(f"SparseGlobalPool: x {checks.describe(x)}; expected a PatchGrid")
        sites = x.features.flatten(1, 3)
        rows = x.mask.table.flatten(1).long()  # row -1, of hidden patches, is the one added below
        count = (rows >= 0).sum(1)[:, None]
        if self.mode == "max":
            best = pad(sites.amax(1), (0, 0, 0, 1), value=-torch.inf)[rows].amax(1)
            return torch.where(count > 0, best, 0)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = pad(sites.sum(1, dtype=wide), (0, 0, 0, 1))[rows].sum(1)
        return (sums / (count * sites.shape[1]).clamp_min(1)).to(x.dtype)


def window_of(pool: nn.MaxPool3d | nn.AvgPool3d) -> tuple[Any, Any, Any]:
    """Return kernel size, stride and padding of a pool of torch's."""
    return pool.kernel_size, pool.stride, pool.padding
