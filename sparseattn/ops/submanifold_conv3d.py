"""Convolution on the active sites of patches or voxels: the public op, its checks and dispatch."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from sparseattn.ops import convolution_checks as operands
from sparseattn.ops import patch_conv3d_registration as patches
from sparseattn.ops import sparse_conv3d_registration as voxels
from sparseattn.ops.convolution_checks import unsupported as unsupported
from sparseattn.reference.submanifold_conv3d import submanifold_conv3d as reference
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.voxel_tensor import VoxelTensor

_OP = "submanifold_conv3d"
Sites = TypeVar("Sites", PatchGrid, VoxelTensor)
Impl = Literal["auto", "triton", "torch", "reference"]


def submanifold_conv3d(
    x: Sites,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int | tuple[int, int, int] = 1,
    groups: int = 1,
    impl: Impl = "auto",
) -> Sites:
    """Convolve the active sites of a volume; sites that are not active count as 0 and stay so.

        y_i = bias + sum_t W_t x_{i + o_t}     over taps t whose site i + o_t is active
        o_t = dilation * t - (dilation * (kernel - 1)) // 2     along each axis

    That is torch's conv3d with padding "same" on the volume with zeros, looked at where it is
    active: what masked image modelling computes by multiplying with the mask after every
    convolution. Gradients are exact for the features, weight and bias.

    Args:
        x: PatchGrid or VoxelTensor with C_in channels, float32, float16, bfloat16 or float64.
        weight: [C_out, C_in / groups, kx, ky, kz], dtype of x: the layout of torch's Conv3d. Any
            kernel size, even ones too.
        bias: [C_out], dtype of x; added at active sites only.
        dilation: distance of neighbouring taps in voxels; one number serves all axes.
        groups: into how many groups the channels are cut; C_in for a depthwise convolution.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense, differentiable twice), or "auto": triton on
            CUDA where it can run, else torch.

    Returns:
        The same structure with C_out channels on the sites of x, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value; a voxel's coordinate is
            outside its volume or there twice (on a GPU that is a device-side assertion).
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        What a site holds that is not active, be it NaN, reaches nobody: it is never read. Samples
        without active patches, and no patches at all, work. If a gradient that arrives is not
        finite, that of the weight is not: impl="triton" sums pairs that exist alone, on a PatchGrid
        the others multiply zeros of sites that are not active, too, as dense convolution does.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates (impl="torch" on a GPU is as deterministic as torch's conv3d). No wait for the
        device; with a mask of fixed `keep`, shapes are static, so CUDA graphs and
        torch.compile(fullgraph=True) take a new mask at every step.
        float32 products use TF32 only where torch.backends.cudnn.allow_tf32 says so. Sums are made
        in float32 (float64 for float64). Under autocast it computes in the autocast dtype.
        Memory beyond the output: the weight once more and, in the backward, 4 bytes for each of its
        elements and at most 1024 splits of the sites; on the CPU a workspace of about 32 MiB.
        A VoxelTensor needs a kernel map, which is built once for all calls on the same coordinates;
        what it costs stands with `sparse_conv3d`.
        Not differentiable twice, except impl="reference".

    Reference:
        3D Semantic Segmentation with Submanifold Sparse Convolutional Networks (2017),
        arXiv:1711.10275, section 3; masks of patches as in Designing BERT for Convolutional
        Networks (2023), arXiv:2301.03580, section 3.1.
    """
    kinds = (PatchGrid, VoxelTensor)
    features, weight, bias = operands.operands(_OP, x, weight, bias, groups, kinds=kinds)
    window = operands.window_of(_OP, weight, stride=1, padding=0, dilation=dilation)
    x = x.with_features(features)
    chosen = operands.choose(_OP, impl, features)
    if chosen == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference(x, weight, bias, window.dilation, groups)
    spans = window.spans
    window = window._replace(low=(spans[0] // 2, spans[1] // 2, spans[2] // 2))
    if isinstance(x, PatchGrid):
        return patches.convolve(x, weight, bias, window, groups, chosen)
    return x.with_features(
        voxels.convolve(features, weight, bias, x.sites, x.sites, window, groups, chosen)
    )
