"""What the convolutions check alike: features, weight, bias, groups and windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import dispatch
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.voxel_tensor import VoxelTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def operands(
    op: str, x: Any, weight: Any, bias: Any, groups: Any, *, kinds: tuple[Any, ...],
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Check the tensors of a convolution; return features, weight and bias in one dtype.

    kinds: what x may be. transposed: the weight is [C_in, C_out / groups, kx, ky, kz].
    """
    if not isinstance(x, kinds):
        rule = " or a ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{op}: x {checks.describe(x)}; expected a {rule}")
    checks.require_dtype(op, "x", x.features, *DTYPES)
    checks.require_int(op, "groups", groups, low=1)
    if x.channels % groups or x.channels == 0:
        raise ValueError(
            f"{op}: groups is {groups}; expected a divisor of C_in, C_in={x.channels} (from x)"
        )
    outer = _weight(op, x, weight, groups, transposed)
    tensors = {"weight": weight}
    if bias is not None:
        shapes = checks.Shapes(op)
        shapes.set("C_out", outer, "weight")
        shapes.bind("bias", bias, "C_out")
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        checks.require_device(op, name, tensor, x.device, "x")
        checks.require_dtype(op, name, tensor, *DTYPES)
    features, *cast = dispatch.autocast_inputs(x.features, *tensors.values())
    for name, tensor in zip(tensors, cast, strict=True):
        if tensor.dtype != features.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; "
                f"expected the dtype of x, dtype={features.dtype} (from x)"
            )
    return features, cast[0], cast[1] if bias is not None else None


def window_of(op: str, weight: Tensor, *, stride: Any, padding: Any, dilation: Any) -> Window:
    """Check what says where a convolution reads, one number or three each; return the window."""
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    steps, low, spread = (checks.three(op, n, v, int(n != "padding")) for n, v in numbers.items())
    return Window((weight.shape[2], weight.shape[3], weight.shape[4]), steps, low, spread)


def require_pooling(
    op: str, x: PatchGrid, what: str, extent: tuple[int, ...], stride: Three, padding: Three
) -> None:
    """Raise ValueError unless the output has patches, too, with 1 / stride of the sites.

    extent: how many voxels a window covers along each axis; `what` says so.
    """
    if any(size % step for size, step in zip(x.patch, stride, strict=True)):
        raise ValueError(
            f"{op}: stride is {stride}; expected divisors of the patch, patch={x.patch} (from x): "
            "the output has patches again"
        )
    sides = zip(extent, stride, padding, strict=True)
    if any(2 * pad >= size or size > step + 2 * pad for size, step, pad in sides):
        raise ValueError(
            f"{op}: {what} with stride={stride} and padding={padding}; expected "
            "2 * padding < kernel_size <= stride + 2 * padding along each axis: the volume of the "
            "output has 1 / stride of the voxels then"
        )


def unsupported(features: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such features (empty: they can)."""
    reasons = list(dispatch.triton_reasons(features.device))
    if features.dtype == torch.float64:
        reasons.append("dtype is float64; expected float32, float16 or bfloat16")
    return reasons


def choose(op: str, impl: str, features: Tensor) -> str:
    """Return the implementation to run."""
    asked = impl == "triton" or (impl == "auto" and features.device.type == "cuda")
    return dispatch.choose(op, impl, features.device, unsupported(features) if asked else [])


def _weight(op: str, x: PatchGrid | VoxelTensor, weight: Any, groups: int, transposed: bool) -> int:
    """Check the weight's shape; return C_out."""
    shapes = checks.Shapes(op)
    if transposed:
        shapes.set("C_in", x.channels, "x")
        shapes.bind("weight", weight, "C_in C_out/groups kx ky kz")
        if min(weight.shape) == 0:
            raise ValueError(
                f"{op}: weight {checks.describe(weight)}; expected taps, and C_out of 1 or more"
            )
        return int(weight.shape[1] * groups)
    shapes.set("C_in/groups", x.channels // groups, "x")
    shapes.bind("weight", weight, "C_out C_in/groups kx ky kz")
    if weight.shape[0] % groups or min(weight.shape) == 0:
        raise ValueError(
            f"{op}: weight {checks.describe(weight)}; expected taps, and C_out a multiple of "
            f"groups, groups={groups}"
        )
    return int(weight.shape[0])
