"""Normalisation over active sites alone.

The statistics of a dense layer on a masked volume would count the zeros of hidden sites. These
layers take the features of a ``PatchGrid``, which has none; parameters and buffers are named as in
torch's layers, so state dicts go both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparseattn import checks
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask


class SparseBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm3d`` whose statistics are those of the active sites of the whole batch.

    Without any active site it returns its input and leaves the running statistics alone.
    """

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Normalise every channel over the active sites."""
        if x.features.numel() == 0:
            return x
        return x.with_features(super().forward(x.features.flatten(0, 3)).view(x.features.shape))


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` over the active sites of all processes, weighted by their numbers."""

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Normalise every channel over the active sites of all processes."""
        return x.with_features(super().forward(x.features.flatten(0, 3)).view(x.features.shape))


class SparseLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of each active site; the channel is the last dimension."""

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Normalise every active site over its channels."""
        return x.with_features(super().forward(x.features))


class SparseGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose statistics are those of a sample's active sites.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with mean and (biased) variance over all active sites of the sample and the channels of the
    group. A sample never depends on its batch mates. Statistics are made in float32 (float64 for
    float64), each sample's sum in a fixed order.
    """

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Normalise every sample and group over the active sites."""
        checks.Shapes(type(self).__name__).bind("features", x.features, "P px py pz C")
        if x.channels != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x has {x.channels} channels; expected {self.num_channels}"
            )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        values = x.features.flatten(1, 3).unflatten(2, (self.num_groups, -1)).to(wide)
        sites = x.mask.neighbours.new_full((x.mask.num_patches, 1), values.shape[1])
        count = _per_sample(sites.to(wide), x.mask) * values.shape[3]  # [P, 1]
        mean = _per_sample(values.sum((1, 3)), x.mask) / count  # [P, G]
        centred = values - mean[:, None, :, None]
        variance = _per_sample(centred.square().sum((1, 3)), x.mask) / count
        y = centred * torch.rsqrt(variance + self.eps)[:, None, :, None]
        y = y.flatten(2)
        if self.affine:
            y = y * self.weight.to(wide) + self.bias.to(wide)
        return x.with_features(y.to(x.dtype).view(x.features.shape))


class SparseInstanceNorm(SparseGroupNorm):
    """``nn.InstanceNorm3d`` without running statistics: every sample and channel by itself."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, num_features, eps, affine, device, dtype)


def _per_sample(sums: Tensor, mask: PatchMask) -> Tensor:
    """Return for each patch [P, G] the sum over all patches of its sample, in raster order."""
    rows = mask.table.flatten(1).long()
    total = pad(sums, (0, 0, 0, 1))[rows].sum(1)  # row -1, of hidden patches, is 0
    return total[mask.coordinates()[0]]
