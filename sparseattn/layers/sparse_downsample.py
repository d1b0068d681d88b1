"""Strided convolution whose windows do not overlap, on active patches: a product of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.ops import dispatch
from sparseattn.ops.convolution_checks import require_pooling
from sparseattn.structures.patch_grid import PatchGrid

_OP = "SparseDownConv3d"


class SparseDownConv3d(nn.Conv3d):
    """``nn.Conv3d`` with kernel_size <= stride and no padding, on the patches of a ``PatchGrid``.

        y_o = bias + sum_t W_t x_{o * stride + t}

    A window lies in one patch if the stride divides it, so this is a matrix product of the voxels
    of each window, for any device and dtype; patches get smaller and the mask stays. It is the
    patch embedding and the downsampling of ConvNeXt-like encoders; ``SparseConv3d`` has windows
    that overlap. Constructor, parameters and state_dict are those of ``nn.Conv3d``.
    """

    def forward(self, x: PatchGrid) -> PatchGrid:  # type: ignore[override]
        """Convolve the windows of active patches."""
        if not isinstance(x, PatchGrid):
            raise TypeError(f"{_OP}: x {checks.describe(x)}; expected a PatchGrid")
        if obstacle := down_obstacle(self):
            raise ValueError(f"{_OP}: {obstacle}")
        stride, what = (
            checks.three(_OP, "stride", self.stride),
            f"kernel_size is {self.kernel_size}",
        )
        require_pooling(_OP, x, what, self.kernel_size, stride, (0, 0, 0))
        if x.channels != self.in_channels:
            raise ValueError(f"{_OP}: x has {x.channels} channels; expected {self.in_channels}")
        features, weight = dispatch.autocast_inputs(x.features, self.weight)
        weight = weight.flatten(1).unflatten(0, (self.groups, -1))
        y = torch.einsum("pxyzgk,gok->pxyzgo", self._windows(features), weight).flatten(4)
        return x.with_features(y if self.bias is None else y + self.bias.to(y.dtype))

    def _windows(self, features: Tensor) -> Tensor:
        """Return the voxels that each site of the output reads, channel first, then tap."""
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            # [P, qx, tx, qy, ...]: the axes before have become two each
            features = features.unflatten(1 + 2 * axis, (-1, step)).narrow(2 + 2 * axis, 0, size)
        windows = features.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
        return windows.unflatten(4, (self.groups, -1))  # [P, qx, qy, qz, G, C_in / G * taps]


def down_obstacle(conv: nn.Conv3d) -> str | None:
    """Return why the windows of a strided convolution may leave a patch, if so."""
    padded = conv.padding not in ("valid", (0, 0, 0))
    wide = any(size > step for size, step in zip(conv.kernel_size, conv.stride, strict=True))
    if padded or wide or set(conv.dilation) != {1}:
        return (
            f"stride={conv.stride} with kernel_size={conv.kernel_size}, padding={conv.padding} and "
            f"dilation={conv.dilation}; expected kernel_size <= stride, no padding, dilation 1"
        )
    return None
