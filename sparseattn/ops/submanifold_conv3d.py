"""Convolution on the active sites of a PatchGrid: the public op, its checks and dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import dispatch
from sparseattn.ops import submanifold_conv3d_registration as registered
from sparseattn.ops.blocked.submanifold_conv3d import reach_of
from sparseattn.reference.submanifold_conv3d import submanifold_conv3d as reference
from sparseattn.structures.patch_grid import PatchGrid

_OP = "submanifold_conv3d"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Impl = Literal["auto", "triton", "torch", "reference"]


def submanifold_conv3d(
    x: PatchGrid,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int | tuple[int, int, int] = 1,
    groups: int = 1,
    impl: Impl = "auto",
) -> PatchGrid:
    """Convolve the active sites of a volume; sites that are not active count as 0 and stay so.

        y_i = bias + sum_t W_t x_{i + o_t}     over taps t whose site i + o_t is active
        o_t = dilation * t - (dilation * (kernel - 1)) // 2     along each axis

    That is torch's conv3d with padding "same" on the volume with zeros, looked at where it is
    active: what masked image modelling computes by multiplying with the mask after every
    convolution. Gradients are exact for the features, weight and bias.

    Args:
        x: PatchGrid with C_in channels, float32, float16, bfloat16 or float64.
        weight: [C_out, C_in / groups, kx, ky, kz], dtype of x: the layout of torch's Conv3d. Any
            kernel size, even ones too.
        bias: [C_out], dtype of x; added at active sites only.
        dilation: distance of neighbouring taps in voxels; one number serves all axes.
        groups: into how many groups the channels are cut; C_in for a depthwise convolution.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense, differentiable twice), or "auto": triton on
            CUDA where it can run, else torch.

    Returns:
        PatchGrid with C_out channels on the mask of x, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        What a site holds that is not active, be it NaN, reaches nobody: it is never read. Samples
        without active patches, and no patches at all, work.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates (impl="torch" on a GPU is as deterministic as torch's conv3d). No wait for the
        device; with a mask of fixed `keep`, shapes are static, so CUDA graphs and
        torch.compile(fullgraph=True) take a new mask at every step.
        float32 products use TF32 only where torch.backends.cudnn.allow_tf32 says so. Sums are made
        in float32 (float64 for float64). Under autocast it computes in the autocast dtype.
        Memory beyond the output: the weight once more and, in the backward, 4 bytes for each of its
        elements and at most 1024 splits of the sites; on the CPU a workspace of about 32 MiB.
        Not differentiable twice, except impl="reference".

    Reference:
        3D Semantic Segmentation with Submanifold Sparse Convolutional Networks (2017),
        arXiv:1711.10275, section 3; masks of patches as in Designing BERT for Convolutional
        Networks (2023), arXiv:2301.03580, section 3.1.
    """
    features, weight, bias, steps = _check(x, weight, bias, dilation, groups)
    x = x.with_features(features)
    asked = impl == "triton" or (impl == "auto" and features.device.type == "cuda")
    chosen = dispatch.choose(_OP, impl, features.device, unsupported(features) if asked else [])
    if chosen == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference(x, weight, bias, steps, groups)
    reach = tuple(
        reach_of(span // 2, span - span // 2, size)
        for span, size in zip(registered.spans(weight, steps), x.patch, strict=True)
    )
    neighbours = x.mask.neighbour_rows((reach[0], reach[1], reach[2]))
    out = registered.apply(
        features, neighbours, x.mask.order, weight, bias, list(steps), groups, chosen
    )
    return x.with_features(out)


def unsupported(features: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such features (empty: they can)."""
    reasons = list(dispatch.triton_reasons(features.device))
    if features.dtype == torch.float64:
        reasons.append("dtype is float64; expected float32, float16 or bfloat16")
    return reasons


def _check(
    x: Any, weight: Any, bias: Any, dilation: Any, groups: Any
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int, int]]:
    """Check everything; return features, weight and bias in one dtype, and three dilations."""
    if not isinstance(x, PatchGrid):
        raise TypeError(f"{_OP}: x {checks.describe(x)}; expected a PatchGrid")
    checks.require_dtype(_OP, "x", x.features, *DTYPES)
    checks.require_int(_OP, "groups", groups, low=1)
    if x.channels % groups or x.channels == 0:
        raise ValueError(
            f"{_OP}: groups is {groups}; expected a divisor of C_in, C_in={x.channels} (from x)"
        )
    shapes = checks.Shapes(_OP)
    shapes.set("C_in/groups", x.channels // groups, "x")
    shapes.bind("weight", weight, "C_out C_in/groups kx ky kz")
    if weight.shape[0] % groups or min(weight.shape) == 0:
        raise ValueError(
            f"{_OP}: weight {checks.describe(weight)}; expected taps, and C_out a multiple of "
            f"groups, groups={groups}"
        )
    tensors = {"weight": weight}
    if bias is not None:
        shapes.bind("bias", bias, "C_out")
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        checks.require_device(_OP, name, tensor, x.device, "x")
        checks.require_dtype(_OP, name, tensor, *DTYPES)
    features, *cast = dispatch.autocast_inputs(x.features, *tensors.values())
    for name, tensor in zip(tensors, cast, strict=True):
        if tensor.dtype != features.dtype:
            raise TypeError(
                f"{_OP}: {name} has dtype {tensor.dtype}; "
                f"expected the dtype of x, dtype={features.dtype} (from x)"
            )
    steps = checks.three(_OP, "dilation", dilation)
    return features, cast[0], cast[1] if bias is not None else None, steps
