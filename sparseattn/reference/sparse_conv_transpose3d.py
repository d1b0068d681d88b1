"""What transposed sparse convolution means: the dense one, looked at where the output is active."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import conv_transpose3d

from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.site_sets import SiteSet
from sparseattn.structures.voxel_tensor import VoxelTensor, read


def sparse_conv_transpose3d(
    x: VoxelTensor, weight: Tensor, bias: Tensor | None, window: Window, output_padding: Three,
    groups: int, out: SiteSet,
) -> VoxelTensor:  # fmt: skip
    """Return torch's transposed convolution of the volume with zeros, at the sites of `out`."""
    _, stride, padding, dilation = window
    volume = conv_transpose3d(
        x.to_dense(), weight, bias, stride, padding, output_padding, groups, dilation
    )
    return read(volume, out)
