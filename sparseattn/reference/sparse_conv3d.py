"""What sparse convolution means: a dense convolution, looked at where the output is active."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv3d

from sparseattn.structures.site_lookup import Three
from sparseattn.structures.site_sets import SiteSet
from sparseattn.structures.voxel_tensor import VoxelTensor, read


def sparse_conv3d(
    x: VoxelTensor, weight: Tensor, bias: Tensor | None, stride: Three, padding: Three,
    dilation: Three, groups: int, out: SiteSet,
) -> VoxelTensor:  # fmt: skip
    """Return torch's convolution of the volume with zeros, at the sites of `out`."""
    volume = conv3d(x.to_dense(), weight, bias, stride, padding, dilation, groups)
    return read(volume, out)
