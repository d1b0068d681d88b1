"""Average pooling of the active patches of a PatchGrid: the public op."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops.convolution_checks import unsupported
from sparseattn.ops.sparse_pool3d import Impl, Sizes, check, choose, pool
from sparseattn.reference.sparse_avg_pool3d import sparse_avg_pool3d as reference
from sparseattn.structures.patch_grid import PatchGrid

_OP = "sparse_avg_pool3d"


def sparse_avg_pool3d(
    x: PatchGrid,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] | None = None,
    padding: int | tuple[int, int, int] = 0,
    *,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    impl: Impl = "auto",
) -> PatchGrid:
    """Average windows of a volume; its patches get smaller, the mask stays.

        y_o = 1 / n_o * sum_t v_{o * stride + t - padding}     over taps t inside the volume

    where v is x at active sites and 0 at others, and n_o counts the taps of the window, active or
    not: torch's avg_pool3d of the volume with zeros, looked at where it is active.

    Args:
        x: PatchGrid, float32, float16, bfloat16 or float64.
        kernel_size: voxels of a window along each axis; one number serves all.
        stride: from one window to the next, default kernel_size; divides the patch.
        padding: voxels before the volume where windows start. 2 * padding < kernel_size <= stride +
            2 * padding, so that the output has 1 / stride of the voxels.
        count_include_pad: whether n_o counts taps outside the volume, too.
        divisor_override: what to divide by instead of n_o.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense, differentiable twice), or "auto": triton on
            CUDA, else torch.

    Returns:
        PatchGrid with patches of patch / stride voxels on the mask of x, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a stride that does not divide the patch, a window that does not fit it.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        What a site holds that is not active, be it NaN, reaches nobody. Sums are made in float32
        (float64 for float64). Deterministic: no atomics, equal bits on every call. No wait for the
        device; shapes are static. Memory beyond the output: 4 bytes for each of its sites where
        n_o differs; on the CPU a workspace of about 32 MiB. Not differentiable twice, except
        impl="reference".

    Reference:
        Designing BERT for Convolutional Networks (2023), arXiv:2301.03580, section 3.1.
    """
    sizes = check(_OP, x, kernel_size, stride, padding)
    checks.require_bool(_OP, "count_include_pad", count_include_pad)
    if divisor_override is not None:
        checks.require_int(_OP, "divisor_override", divisor_override, low=1)
    chosen = choose(_OP, impl, x, unsupported)
    if chosen == "reference":
        return reference(x, *sizes, count_include_pad, divisor_override)
    kernel, _, padding_sizes = sizes
    share, shares = 1 / (divisor_override or kernel[0] * kernel[1] * kernel[2]), None
    if divisor_override is None and not count_include_pad and any(padding_sizes):
        shares = _shares(x, *sizes)
    return pool(x, sizes, shares, share, False, chosen)


def _shares(x: PatchGrid, kernel: Sizes, stride: Sizes, padding: Sizes) -> Tensor:
    """Return 1 / n_o [P, qx, qy, qz]: how many taps lie inside is a product over the axes."""
    counts = []
    for axis, corner in enumerate(x.mask.coordinates()[1:]):
        inside = torch.arange(x.patch[axis] // stride[axis], device=x.device) * stride[axis]
        first = corner[:, None] * x.patch[axis] + inside - padding[axis]
        last = (first + kernel[axis]).clamp(max=x.spatial_shape[axis])
        counts.append(last - first.clamp(min=0))
    n = counts[0][:, :, None, None] * counts[1][:, None, :, None] * counts[2][:, None, None, :]
    return 1 / n.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
