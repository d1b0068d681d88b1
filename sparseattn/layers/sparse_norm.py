"""Normalisation over active sites alone.

The statistics of a dense layer on a masked volume would count the zeros of hidden sites. These
layers take the features of a ``PatchGrid`` or a ``VoxelTensor``, which have none; parameters and
buffers are named as in torch's layers, so state dicts go both ways.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.voxel_tensor import VoxelTensor

Sites = TypeVar("Sites", PatchGrid, VoxelTensor)


class SparseBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm3d`` whose statistics are those of the active sites of the whole batch.

    Without any active site it returns its input and leaves the running statistics alone.
    """

    def forward(self, x: Sites) -> Sites:  # type: ignore[override]
        """Normalise every channel over the active sites."""
        if x.features.numel() == 0:
            return x
        return x.with_features(super().forward(x.features.flatten(0, -2)).view(x.features.shape))


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` over the active sites of all processes, weighted by their numbers."""

    def forward(self, x: Sites) -> Sites:  # type: ignore[override]
        """Normalise every channel over the active sites of all processes."""
        return x.with_features(super().forward(x.features.flatten(0, -2)).view(x.features.shape))


class SparseLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of each active site; the channel is the last dimension."""

    def forward(self, x: Sites) -> Sites:  # type: ignore[override]
        """Normalise every active site over its channels."""
        return x.with_features(super().forward(x.features))


class SparseGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose statistics are those of a sample's active sites.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with mean and (biased) variance over all active sites of the sample and the channels of the
    group. A sample never depends on its batch mates. Statistics are made in float32 (float64 for
    float64), each sample's sum in a fixed order. Voxels, which may lie in any order, are passed
    once for each sample.
    """

    def forward(self, x: Sites) -> Sites:  # type: ignore[override]
        """Normalise every sample and group over the active sites."""
        if x.channels != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x has {x.channels} channels; expected {self.num_channels}"
            )
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        width = x.channels // self.num_groups
        places = x.features.shape[1:-1].numel()  # sites of a row, 1 if it is a voxel
        values = x.features.reshape(len(x.features), places, self.num_groups, width)
        values = values.to(wide)  # [rows, places, G, C / G]
        sites = values.new_full((len(values), 1), values.shape[1] * width)
        count = _per_sample(sites, x)  # [rows, 1]
        mean = _per_sample(values.sum((1, 3)), x) / count  # [rows, G]
        centred = values - mean[:, None, :, None]
        variance = _per_sample(centred.square().sum((1, 3)), x) / count
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


def _per_sample(sums: Tensor, x: PatchGrid | VoxelTensor) -> Tensor:
    """Return for each row of features [rows, G] the sum over all rows of its sample."""
    if isinstance(x, PatchGrid):  # in raster order
        rows = x.mask.table.flatten(1).long()
        total = pad(sums, (0, 0, 0, 1))[rows].sum(1)  # row -1, of hidden patches, is 0
        return total[x.mask.coordinates()[0]]
    sample = x.coordinates[:, 0].long()
    total = sums.new_zeros((x.batch_size, sums.shape[1]))
    for place in range(x.batch_size):  # no product with 0: other samples may hold NaN
        total[place] = torch.where((sample == place)[:, None], sums, 0).sum(0)
    return total[sample]
