"""Max pooling of the active patches of a PatchGrid: the public op."""

from __future__ import annotations

from sparseattn.ops.convolution_checks import unsupported
from sparseattn.ops.sparse_pool3d import Impl, check, choose, pool
from sparseattn.reference.sparse_max_pool3d import sparse_max_pool3d as reference
from sparseattn.structures.patch_grid import PatchGrid

_OP = "sparse_max_pool3d"


def sparse_max_pool3d(
    x: PatchGrid,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] | None = None,
    padding: int | tuple[int, int, int] = 0,
    *,
    impl: Impl = "auto",
) -> PatchGrid:
    """Take the maximum over windows of a volume; its patches get smaller, the mask stays.

        y_o = max_t v_{o * stride + t - padding}     over taps t inside the volume

    where v is x at active sites and 0 at others: torch's max_pool3d of the volume with zeros,
    looked at where it is active. A window inside a patch, as with stride = kernel_size, meets no
    zero.

    Args:
        x: PatchGrid, float32, float16, bfloat16 or float64.
        kernel_size: voxels of a window along each axis; one number serves all.
        stride: from one window to the next, default kernel_size; divides the patch.
        padding: voxels before the volume where windows start; they take no part. 2 * padding <
            kernel_size <= stride + 2 * padding, so that the output has 1 / stride of the voxels.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (dense), or "auto": triton on CUDA, else torch.

    Returns:
        PatchGrid with patches of patch / stride voxels on the mask of x, dtype of x.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a stride that does not divide the patch, a window that does not fit it.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        The gradient goes to the first of equal values in raster order, as in torch, and to nobody
        where that is the 0 of a site that is not active. NaN is above all numbers. Who gets the
        gradient of a window of -inf alone is left open, as in torch.
        Deterministic: no atomics, equal bits on every call. No wait for the device; shapes are
        static. Memory beyond the output: 2 bytes for each of its elements, kept for the backward;
        on the CPU a workspace of about 32 MiB. Not differentiable twice, except
        impl="reference".

    Reference:
        Designing BERT for Convolutional Networks (2023), arXiv:2301.03580, section 3.1.
    """
    sizes = check(_OP, x, kernel_size, stride, padding)
    chosen = choose(_OP, impl, x, unsupported)
    if chosen == "reference":
        return reference(x, *sizes)
    return pool(x, sizes, None, 1.0, True, chosen)
