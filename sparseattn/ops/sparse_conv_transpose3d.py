"""Transposed convolution of active voxels: the public op, its checks and dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import convolution_checks as operands
from sparseattn.ops import sparse_conv3d_registration as registered
from sparseattn.ops.convolution_checks import unsupported as unsupported
from sparseattn.ops.sparse_conv3d import sites_of
from sparseattn.reference.sparse_conv_transpose3d import sparse_conv_transpose3d as reference
from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.site_sets import grown
from sparseattn.structures.voxel_tensor import VoxelTensor, on_sites

_OP = "sparse_conv_transpose3d"
Impl = Literal["auto", "triton", "torch", "reference"]


def sparse_conv_transpose3d(
    x: VoxelTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Three = 1,
    padding: int | Three = 0,
    output_padding: int | Three = 0,
    dilation: int | Three = 1,
    groups: int = 1,
    out_sites: VoxelTensor | None = None,
    impl: Impl = "auto",
) -> VoxelTensor:
    """Convolve the active voxels of volumes backwards through a strided convolution.

        y_i = bias + sum_{j, t : j * stride - padding + dilation * t = i} W_t^T x_j

    over active sites j of x, for every active site i of the output: those of `out_sites`, or else
    all that an active site of x reaches, in raster order. At these sites it equals torch's
    conv_transpose3d on the volume with zeros. With the input of an earlier `sparse_conv3d` as
    `out_sites`, and its stride, padding and dilation, it goes back through the same kernel map to
    the same voxels: an inverse convolution. Gradients are exact for the features, weight and bias.

    Args:
        x: VoxelTensor with C_in channels, float32, float16, bfloat16 or float64.
        weight: [C_in, C_out / groups, kx, ky, kz], dtype of x: the layout of torch's
            ConvTranspose3d. Any kernel size, even ones too.
        bias: [C_out], dtype of x; added at active sites only.
        stride: as in torch's ConvTranspose3d; one number serves all axes.
        padding: how many voxels the output loses on each side; one number serves all axes.
        output_padding: how many it gains behind, less than stride or dilation; one number serves
            all axes. With `out_sites` their spatial shape says it.
        dilation: distance of neighbouring taps in voxels; one number serves all axes.
        groups: into how many groups the channels are cut.
        out_sites: VoxelTensor whose voxels the output is active at; its features do not matter.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense, differentiable twice), or "auto": triton on
            CUDA where it can run, else torch.

    Returns:
        VoxelTensor with C_out channels, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or a coordinate is outside its
            volume or there twice (on a GPU that is a device-side assertion).
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        What lies elsewhere, be it NaN, reaches nobody. Samples without active voxels, and no voxels
        at all, work. Precision, determinism, waiting, memory and derivatives are those of
        `sparse_conv3d`.

    Reference:
        4D Spatio-Temporal ConvNets (2019), arXiv:1904.08755, section 3; the inverse convolution of
        SECOND: Sparsely Embedded Convolutional Detection (2018), Sensors 18(10):3337.
    """
    features, weight, bias = operands.operands(
        _OP, x, weight, bias, groups, kinds=(VoxelTensor,), transposed=True
    )
    x = x.with_features(features)
    more = checks.three(_OP, "output_padding", output_padding, low=0)
    window = operands.window_of(_OP, weight, stride=stride, padding=padding, dilation=dilation)
    smallest = _smallest(x.spatial_shape, window)
    if out_sites is None:
        shape = (smallest[0] + more[0], smallest[1] + more[1], smallest[2] + more[2])
        _check_extra(f"output_padding is {more}", more, smallest, window)
        out = grown(x.sites, window, shape)
    else:
        out = sites_of(_OP, out_sites, x)
        x_more, y_more, z_more = (a - b for a, b in zip(out.spatial_shape, smallest, strict=True))
        more = (x_more, y_more, z_more)
        _check_extra(f"out_sites has spatial_shape={out.spatial_shape}", more, smallest, window)
    chosen = operands.choose(_OP, impl, features)
    if chosen == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference(x, weight, bias, window, more, groups, out)
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # as a Conv3d's
    y = registered.convolve(
        features, turned, bias, out, x.sites, window, groups, chosen, upwards=True
    )
    return on_sites(y, out)


def _smallest(shape: Three, window: Window) -> Three:
    """Return the spatial shape of the output without output padding, as torch does."""
    axes = zip(shape, window.low, window.spans, window.stride, strict=True)
    x, y, z = ((size - 1) * stride - 2 * low + span + 1 for size, low, span, stride in axes)
    return x, y, z


def _check_extra(what: str, extra: Three, smallest: Three, window: Window) -> None:
    """Check how many voxels the output has behind the smallest one."""
    most = tuple(max(s, d) - 1 for s, d in zip(window.stride, window.dilation, strict=True))
    sizes = [least + more for least, more in zip(smallest, extra, strict=True)]
    if min(sizes) < 1 or not all(0 <= e <= m for e, m in zip(extra, most, strict=True)):
        raise ValueError(
            f"{_OP}: {what}; expected an output of {smallest} voxels, 0 to {most} more along each "
            "axis, and at least 1 (from x, weight, stride, padding and dilation)"
        )
