"""What submanifold convolution means: a dense convolution of a volume that is 0 elsewhere."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.nn.functional import conv3d, pad

from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.voxel_tensor import VoxelTensor, read

Sites = TypeVar("Sites", PatchGrid, VoxelTensor)


def submanifold_conv3d(
    x: Sites,
    weight: Tensor,
    bias: Tensor | None,
    dilation: tuple[int, int, int],
    groups: int,
) -> Sites:
    """Return the convolution at the active sites, with torch's padding "same"."""
    volume = x.to_dense()
    for axis in range(3):  # pad() itself, since padding="same" of float16 is not in every torch
        span = dilation[axis] * (weight.shape[2 + axis] - 1)
        before = [0, 0] * (2 - axis) + [span // 2, span - span // 2]
        volume = pad(volume, before)
    volume = conv3d(volume, weight, bias, dilation=dilation, groups=groups)
    if isinstance(x, VoxelTensor):
        return read(volume, x.sites)
    return PatchGrid.from_dense(volume, x.mask)
