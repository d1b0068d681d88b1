"""Convolution from active sites to active sites: the public op, its checks and dispatch."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import convolution_checks as operands
from sparseattn.ops import patch_conv3d_registration as patches
from sparseattn.ops import sparse_conv3d_registration as registered
from sparseattn.ops.convolution_checks import unsupported as unsupported
from sparseattn.reference.sparse_conv3d import sparse_conv3d as reference
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.site_sets import SiteSet, touched
from sparseattn.structures.voxel_tensor import VoxelTensor, on_sites

_OP = "sparse_conv3d"
Sites = TypeVar("Sites", PatchGrid, VoxelTensor)
Impl = Literal["auto", "triton", "torch", "reference"]


def sparse_conv3d(
    x: Sites,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Three = 1,
    padding: int | Three = 0,
    dilation: int | Three = 1,
    groups: int = 1,
    out_sites: VoxelTensor | None = None,
    impl: Impl = "auto",
) -> Sites:
    """Convolve active sites; the output is active where you say, or wherever it reads one.

        y_i = bias + sum_t W_t x_{i * stride - padding + dilation * t}     over active sites of x

    for every active site i of the output: those of `out_sites`, or else all whose window holds an
    active site of x, in raster order. At these sites it equals torch's conv3d on the volume with
    zeros. A PatchGrid keeps its patches, with 1 / stride of the sites along each axis: what masked
    image modelling computes by multiplying with the mask. Gradients are exact for the features,
    weight and bias.

    Args:
        x: PatchGrid or VoxelTensor with C_in channels, float32, float16, bfloat16 or float64.
        weight: [C_out, C_in / groups, kx, ky, kz], dtype of x: the layout of torch's Conv3d. Any
            kernel size, even ones too.
        bias: [C_out], dtype of x; added at active sites only.
        stride: as in torch's Conv3d; one number serves all axes. Of a PatchGrid it divides the
            patch.
        padding: zeros around the volume; one number serves all axes. With a PatchGrid
            2 * padding < dilation * (kernel - 1) + 1 <= stride + 2 * padding.
        dilation: distance of neighbouring taps in voxels; one number serves all axes.
        groups: into how many groups the channels are cut; C_in for a depthwise convolution.
        out_sites: VoxelTensor whose voxels the output is active at; its features do not matter.
            Its spatial shape is that of torch's output. `x` itself makes a submanifold convolution.
            Not for a PatchGrid.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense, differentiable twice), or "auto": triton on
            CUDA where it can run, else torch.

    Returns:
        The same structure with C_out channels, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or a coordinate is outside its
            volume or there twice (on a GPU that is a device-side assertion).
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        What lies elsewhere, be it NaN, reaches nobody. Samples without active voxels, and no voxels
        at all, work.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. Maps are built once for all calls on the same coordinates. Finding the voxels
        of the output waits for the device, so under torch.compile(fullgraph=True) and in CUDA
        graphs give `out_sites`; nothing else waits.
        float32 products use TF32 only where torch.backends.cudnn.allow_tf32 says so. Sums are made
        in float32 (float64 for float64). Under autocast it computes in the autocast dtype.
        Memory beyond the output: the map, 4 bytes for each tap and site of the output and, for the
        gradient, of the input; in the Triton backward 8 bytes more for each, and 4 bytes for each
        element of the weight and at most 1024 splits of the sites. On the CPU a workspace of about
        8 MiB. A PatchGrid needs no map, and what `submanifold_conv3d` says.
        Not differentiable twice, except impl="reference".

    Reference:
        3D Semantic Segmentation with Submanifold Sparse Convolutional Networks (2017),
        arXiv:1711.10275, section 3; sites chosen by the caller as in 4D Spatio-Temporal ConvNets
        (2019), arXiv:1904.08755, section 3.
    """
    kinds = (PatchGrid, VoxelTensor)
    features, weight, bias = operands.operands(_OP, x, weight, bias, groups, kinds=kinds)
    x = x.with_features(features)
    window = operands.window_of(_OP, weight, stride=stride, padding=padding, dilation=dilation)
    out = None
    if isinstance(x, VoxelTensor):
        out = _voxels(x, window, out_sites)
    else:
        _check_patches(x, window, out_sites)
    chosen = operands.choose(_OP, impl, features)
    if chosen == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference(x, weight, bias, window, groups, out)
    if out is None:
        return patches.convolve(x, weight, bias, window, groups, chosen)
    y = registered.convolve(features, weight, bias, x.sites, out, window, groups, chosen)
    return on_sites(y, out)


def _check_patches(x: PatchGrid, window: Window, out_sites: Any) -> None:
    """Check that the output has the patches of x."""
    if out_sites is not None:
        raise ValueError(
            f"{_OP}: out_sites is a {type(out_sites).__name__}; expected None, since the output "
            "has the patches of x, a PatchGrid"
        )
    extent = tuple(span + 1 for span in window.spans)
    what = f"weight has kernel_size={extent}, dilated,"
    operands.require_pooling(_OP, x, what, extent, window.stride, window.low)


def _voxels(x: VoxelTensor, window: Window, out_sites: Any) -> SiteSet:
    """Return the sites of the output."""
    shape = _shape(x.spatial_shape, window)
    if out_sites is None:
        return touched(x.sites, window, shape)
    out = sites_of(_OP, out_sites, x)
    if out.spatial_shape != shape:
        raise ValueError(
            f"{_OP}: out_sites has spatial_shape={out.spatial_shape}; expected {shape} (from "
            "x, weight, stride, padding and dilation)"
        )
    return out


def sites_of(op: str, out_sites: Any, x: VoxelTensor) -> SiteSet:
    """Check the sites that a caller gives for the output, but for their volume; return them."""
    if not isinstance(out_sites, VoxelTensor):
        raise TypeError(f"{op}: out_sites {checks.describe(out_sites)}; expected a VoxelTensor")
    if out_sites.batch_size != x.batch_size:
        raise ValueError(
            f"{op}: out_sites has batch_size={out_sites.batch_size}; expected that of x, "
            f"batch_size={x.batch_size} (from x)"
        )
    checks.require_device(op, "out_sites", out_sites.coordinates, x.device, "x")
    return out_sites.sites


def _shape(shape: Three, window: Window) -> Three:
    """Return the spatial shape of the output, as torch does."""
    axes = zip(shape, window.low, window.spans, window.stride, strict=True)
    x, y, z = ((size + 2 * low - span - 1) // stride + 1 for size, low, span, stride in axes)
    if min(x, y, z) < 1:
        needed = tuple(s + 1 - 2 * p for s, p in zip(window.spans, window.low, strict=True))
        raise ValueError(
            f"{_OP}: x has spatial_shape={shape}; expected at least {needed} (from weight, padding "
            "and dilation)"
        )
    return x, y, z
