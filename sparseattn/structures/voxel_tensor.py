"""VoxelTensor: features on any active voxels of a batch of volumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.structures import site_lookup
from sparseattn.structures.kernel_map import KernelMap, kernel_map
from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.site_sets import Made, SiteSet

_OP = "VoxelTensor"


@dataclass(frozen=True, eq=False)
class VoxelTensor:
    """Features on the active voxels of volumes; every other voxel is empty.

    What treats voxels alone (linear layers, norms, activations) is plain torch on ``features``::

        x = VoxelTensor.from_dense(volume)              # [B, C, X, Y, Z] -> features [N, C]
        x = x.with_features(gelu(x.features @ weight))

    Fields:
        features: [N, C], floating point.
        coordinates: int32 [N, 4]: sample, x, y, z. In any order, each voxel at most once.
        spatial_shape: X, Y and Z of the volumes.
        batch_size: B, how many volumes there are; some may be empty.
        made: kernel maps and sets of sites that were made of these coordinates. It is shared by all
            tensors that ``with_features`` makes, so that layers on the same voxels build a map
            once; it lives as long as one of them.

    Sizes and types are checked here, values when a kernel map is built, or by ``validate``.
    """

    features: Tensor
    coordinates: Tensor
    spatial_shape: Three
    batch_size: int
    made: list[Made] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        shapes = checks.Shapes(_OP)
        shapes.bind("features", self.features, "N C")
        checks.require_floating(_OP, "features", self.features)
        shapes.bind("coordinates", self.coordinates, "N 4")
        checks.require_dtype(_OP, "coordinates", self.coordinates, torch.int32)
        device = self.features.device
        checks.require_device(_OP, "coordinates", self.coordinates, device, "features")
        if not isinstance(self.spatial_shape, tuple) or len(self.spatial_shape) != 3:
            raise TypeError(
                f"{_OP}: spatial_shape {checks.describe(self.spatial_shape)}; expected a tuple of "
                "three ints"
            )
        for size in self.spatial_shape:
            checks.require_int(_OP, "spatial_shape", size, low=1)
        checks.require_int(_OP, "batch_size", self.batch_size, low=0)

    @classmethod
    def from_dense(cls, x: Tensor, active: Tensor | None = None) -> VoxelTensor:
        """Take the active voxels out of a volume [B, C, X, Y, Z]; differentiable.

        Args:
            x: the volume.
            active: bool [B, X, Y, Z]; left out, the voxels where a channel is not 0. Counting them
                waits for the device. What other voxels hold is never read.
        """
        shapes = checks.Shapes(_OP)
        shapes.bind("x", x, "B C X Y Z")
        checks.require_floating(_OP, "x", x)
        if active is None:
            active = (x != 0).any(1)
        shapes.bind("active", active, "B X Y Z")
        checks.require_dtype(_OP, "active", active, torch.bool)
        checks.require_device(_OP, "active", active, x.device, "x")
        places = active.nonzero()
        sample, i, j, k = places.unbind(1)
        shape = (x.shape[2], x.shape[3], x.shape[4])
        return cls(x[sample, :, i, j, k], places.to(torch.int32), shape, x.shape[0])

    def to_dense(self) -> Tensor:
        """Return the volume [B, C, X, Y, Z], 0 where nothing is active; channels last in memory."""
        shape = (self.batch_size, *self.spatial_shape, self.channels)
        places = self.coordinates.long().unbind(1)
        dense = self.features.new_zeros(shape).index_put(places, self.features)
        return dense.permute(0, 4, 1, 2, 3)

    def validate(self) -> None:
        """Raise ValueError naming the first coordinate that is outside, or there twice.

        Waits for the device.
        """
        sizes = [self.batch_size, *self.spatial_shape]
        if fault := site_lookup.fault(self.coordinates, sizes):
            raise ValueError(f"{_OP}: {fault}")

    def kernel_map(
        self,
        kernel_size: int | Three,
        *,
        stride: int | Three = 1,
        padding: int | Three = 0,
        dilation: int | Three = 1,
        out_sites: VoxelTensor | None = None,
    ) -> KernelMap:
        """Return which voxels of this tensor those of `out_sites` read in a convolution.

        Tap t of output y reads the voxel y * stride - padding + dilation * t. The map is built once
        for every pair of coordinates and kept with these.

        Args:
            kernel_size: taps along each axis, one number or three.
            stride: as in torch's Conv3d, as are padding and dilation.
            padding: see stride.
            dilation: see stride.
            out_sites: who reads, in volumes of any shape; left out, these voxels themselves.
        """
        parts = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        parts["dilation"] = dilation
        window = Window(*(checks.three(_OP, n, v, int(n != "padding")) for n, v in parts.items()))
        other = self if out_sites is None else out_sites
        return kernel_map(self.sites, other.sites, window, backwards=False, sort=False)

    @property
    def sites(self) -> SiteSet:
        """The coordinates without features, with what was made of them."""
        return SiteSet(self.coordinates, self.spatial_shape, self.batch_size, self.made)

    @property
    def num_voxels(self) -> int:
        """N, the number of active voxels of all samples."""
        return self.features.shape[0]

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of every tensor inside."""
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        return self.features.dtype

    def __repr__(self) -> str:
        """Describe the geometry without reading the device."""
        return (
            f"VoxelTensor(num_voxels={self.num_voxels}, channels={self.channels}, "
            f"spatial_shape={self.spatial_shape}, batch_size={self.batch_size}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    def with_features(self, features: Tensor) -> VoxelTensor:
        """Return other features on the same voxels, which share what was made of them."""
        return VoxelTensor(
            features, self.coordinates, self.spatial_shape, self.batch_size, self.made
        )

    def to(self, *args: Any) -> VoxelTensor:
        """Move or cast as ``Tensor.to`` does; on another device maps are made anew."""
        features = self.features.to(*args)
        if features.device == self.device:
            return self.with_features(features)
        coordinates = self.coordinates.to(features.device)
        return VoxelTensor(features, coordinates, self.spatial_shape, self.batch_size)


def on_sites(features: Tensor, sites: SiteSet) -> VoxelTensor:
    """Return features on a set of sites, sharing what was made of it."""
    return VoxelTensor(features, *sites)


def read(volume: Tensor, sites: SiteSet) -> VoxelTensor:
    """Return what a volume [B, C, X, Y, Z] holds at a set of sites; differentiable."""
    sample, i, j, k = sites.coordinates.long().unbind(1)
    return on_sites(volume[sample, :, i, j, k], sites)
