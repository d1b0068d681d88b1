"""What sparse convolution means: a dense convolution, looked at where the output is active."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.nn.functional import conv3d

from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.site_lookup import Window
from sparseattn.structures.site_sets import SiteSet
from sparseattn.structures.voxel_tensor import VoxelTensor, read

Sites = TypeVar("Sites", PatchGrid, VoxelTensor)


def sparse_conv3d(
    x: Sites, weight: Tensor, bias: Tensor | None, window: Window, groups: int, out: SiteSet | None
) -> Sites:
    """Return torch's convolution of the volume with zeros, at `out` or the patches of x."""
    _, stride, padding, dilation = window
    volume = conv3d(x.to_dense(), weight, bias, stride, padding, dilation, groups)
    if isinstance(x, PatchGrid):
        return PatchGrid.from_dense(volume, x.mask)
    return read(volume, x.sites if out is None else out)
