"""What max and average pooling of a PatchGrid share: checks, window sizes, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from sparseattn import checks
from sparseattn.ops import dispatch
from sparseattn.ops import sparse_pool3d_registration as registered
from sparseattn.ops.convolution_checks import DTYPES, require_pooling
from sparseattn.structures.patch_grid import PatchGrid

Impl = Literal["auto", "triton", "torch", "reference"]
Sizes = tuple[int, int, int]
OUTSIDE = -2  # row of a patch outside the volume; -1 is that of one that is not active
MOST_TAPS = 2**15 - 1  # a tap is kept in int16


def check(
    op: str, x: Any, kernel_size: Any, stride: Any, padding: Any
) -> tuple[Sizes, Sizes, Sizes]:
    """Check the arguments; return the sizes of the window, its steps and the padding."""
    if not isinstance(x, PatchGrid):
        raise TypeError(f"{op}: x {checks.describe(x)}; expected a PatchGrid")
    checks.require_dtype(op, "x", x.features, *DTYPES)
    kernel = checks.three(op, "kernel_size", kernel_size)
    steps = kernel if stride is None else checks.three(op, "stride", stride)
    pads = checks.three(op, "padding", padding, low=0)
    require_pooling(op, x, f"kernel_size is {kernel}", kernel, steps, pads)
    if kernel[0] * kernel[1] * kernel[2] > MOST_TAPS:
        raise ValueError(f"{op}: kernel_size is {kernel}; expected at most {MOST_TAPS} taps")
    return kernel, steps, pads


def choose(op: str, impl: str, x: PatchGrid, unsupported: Callable[[Tensor], list[str]]) -> str:
    """Return the implementation to run; `unsupported` says why Triton cannot."""
    asked = impl == "triton" or (impl == "auto" and x.device.type == "cuda")
    return dispatch.choose(op, impl, x.device, unsupported(x.features) if asked else [])


def pool(
    x: PatchGrid, sizes: tuple[Sizes, Sizes, Sizes], shares: Tensor | None, share: float,
    is_max: bool, impl: str,
) -> PatchGrid:  # fmt: skip
    """Pool by an implementation other than the reference."""
    kernel, stride, padding = sizes
    reach = tuple(-(-pad // size) for pad, size in zip(padding, x.patch, strict=True))
    neighbours = x.mask.neighbour_rows((reach[0], reach[1], reach[2]), OUTSIDE)
    y = registered.apply(
        x.features, neighbours, shares, share, list(x.patch), list(kernel), list(stride),
        list(padding), is_max, impl,
    )  # fmt: skip
    return x.with_features(y)
