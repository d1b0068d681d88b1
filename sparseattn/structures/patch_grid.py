"""PatchGrid: features on the active patches of a regular grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.structures.patch_mask import PatchMask

_OP = "PatchGrid"


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Features on the active patches of a volume; every other site is empty.

    features [P, px, py, pz, C]: one row for each active patch of ``mask``, channels last, so that
    whatever treats sites alone (1x1x1 convolutions, norms, activations) is plain torch on
    ``features``::

        x = PatchGrid.from_dense(volume, mask)          # [B, C, X, Y, Z] -> [P, px, py, pz, C]
        x = x.with_features(gelu(x.features @ weight))

    Pooling keeps the mask and makes the patches smaller.
    """

    features: Tensor
    mask: PatchMask

    def __post_init__(self) -> None:
        if not isinstance(self.mask, PatchMask):
            raise TypeError(f"{_OP}: mask {checks.describe(self.mask)}; expected a PatchMask")
        shapes = checks.Shapes(_OP)
        shapes.set("P", self.mask.num_patches, "mask")
        shapes.bind("features", self.features, "P px py pz C")
        checks.require_floating(_OP, "features", self.features)
        checks.require_device(_OP, "features", self.features, self.mask.device, "mask")
        if min(self.features.shape[1:4]) < 1:
            raise ValueError(
                f"{_OP}: features {checks.describe(self.features)}; expected patches of a voxel "
                "or more"
            )

    @classmethod
    def from_dense(cls, x: Tensor, mask: PatchMask) -> PatchGrid:
        """Take the active patches out of a volume [B, C, X, Y, Z]; differentiable.

        X, Y and Z are multiples of the mask's grid; what the other patches hold is never read.
        """
        if not isinstance(mask, PatchMask):
            raise TypeError(f"{_OP}: mask {checks.describe(mask)}; expected a PatchMask")
        shapes = checks.Shapes(_OP)
        shapes.set("B", mask.batch, "mask")
        shapes.bind("x", x, "B C X Y Z")
        checks.require_floating(_OP, "x", x)
        checks.require_device(_OP, "x", x, mask.device, "mask")
        sizes, grid = x.shape[2:], mask.grid
        if any(cells == 0 or size % cells for size, cells in zip(sizes, grid, strict=True)):
            raise ValueError(
                f"{_OP}: x {checks.describe(x)}; expected X, Y, Z that are multiples of the grid, "
                f"grid={grid} (from mask)"
            )
        blocks = x
        for axis in (2, 1, 0):
            blocks = blocks.unflatten(axis + 2, (grid[axis], sizes[axis] // grid[axis]))
        sample, i, j, k = mask.coordinates()
        taken = blocks[sample, :, i, :, j, :, k]  # [P, C, px, py, pz]
        return cls(taken.permute(0, 2, 3, 4, 1).contiguous(), mask)

    def to_dense(self) -> Tensor:
        """Return the volume [B, C, X, Y, Z], 0 where nothing is active; channels last in memory."""
        features, grid = self.features, self.mask.grid
        shape = [self.batch]
        for cells, size in zip(grid, self.patch, strict=True):
            shape += [cells, size]
        dense = features.new_zeros((*shape, self.channels))
        sample, i, j, k = self.mask.coordinates()
        dense = dense.permute(0, 1, 3, 5, 2, 4, 6, 7).index_put((sample, i, j, k), features)
        dense = dense.permute(0, 1, 4, 2, 5, 3, 6, 7)
        return dense.reshape(self.batch, *self.spatial_shape, self.channels).permute(0, 4, 1, 2, 3)

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return self.mask.batch

    @property
    def patch(self) -> tuple[int, int, int]:
        """How many voxels a patch has along x, y and z."""
        return self.features.shape[1], self.features.shape[2], self.features.shape[3]

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self.features.shape[4]

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """X, Y, Z: the voxels of the whole volume."""
        (fx, fy, fz), (px, py, pz) = self.mask.grid, self.patch
        return fx * px, fy * py, fz * pz

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
            f"PatchGrid(batch={self.batch}, channels={self.channels}, grid={self.mask.grid}, "
            f"patch={self.patch}, num_patches={self.mask.num_patches}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __add__(self, other: Any) -> PatchGrid:
        """Add features of the same patches, a number, or a tensor [1, C, 1, 1, 1]."""
        return self.with_features(self.features + self._operand("+", other))

    def __sub__(self, other: Any) -> PatchGrid:
        """Subtract, as ``+`` adds."""
        return self.with_features(self.features - self._operand("-", other))

    def __mul__(self, other: Any) -> PatchGrid:
        """Multiply, as ``+`` adds."""
        return self.with_features(self.features * self._operand("*", other))

    __radd__ = __add__
    __rmul__ = __mul__

    def _operand(self, sign: str, other: Any) -> Any:
        """Return what stands beside the features."""
        if isinstance(other, (int, float)):
            return other
        if isinstance(other, PatchGrid):
            if other.mask is not self.mask or other.patch != self.patch:
                raise ValueError(f"{_OP}: {sign} of other patches; expected those of one mask")
            return other.features
        if isinstance(other, Tensor) and other.shape in ((1, self.channels, 1, 1, 1), ()):
            return other.flatten()
        raise TypeError(
            f"{_OP}: {sign} with what {checks.describe(other)}; expected a PatchGrid, a number or "
            f"a tensor [1, C, 1, 1, 1], C={self.channels}"
        )

    def with_features(self, features: Tensor) -> PatchGrid:
        """Return other features on the same patches."""
        return PatchGrid(features, self.mask)

    def to(self, *args: Any) -> PatchGrid:
        """Move or cast as ``Tensor.to`` does; the mask follows to the device."""
        features = self.features.to(*args)
        return PatchGrid(features, self.mask.to(features.device))
