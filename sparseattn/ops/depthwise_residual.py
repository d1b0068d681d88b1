"""The depth-wise convolution of values that Nystrom attention may add to its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseattn import checks

_CONVOLUTIONS = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}


def depthwise_residual(
    v: Tensor, weight: Tensor, key_mask: Tensor | None, grid: Sequence[int] | None
) -> Tensor:
    """Return sum_t weight_t v_{i + t - half}, [B, G, N, D] like v: one filter a head, zeros beyond.

    Args:
        v: [B, G, N, D]; a token that is masked counts as 0 and may hold NaN.
        weight: [G, w] of odd sizes, along the tokens, or [G, *w] along the axes of a grid.
        key_mask: bool [B, N] or None.
        grid: sizes of the grid at the end of the tokens, if weight has so many axes. Tokens in
            front of it get 0.

    The head dim stands beside the last axis, which the convolution strides over: so a filter of a
    head is one of torch's convolutions with as many groups as heads, of any number of axes.
    """
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0)
    head_dim, prefix = v.shape[3], 0
    axes: tuple[int, ...] = (v.shape[2],)
    if weight.dim() > 2 and grid is not None:
        axes, prefix = tuple(grid), v.shape[2] - math.prod(grid)
    x = v[:, :, prefix:].reshape(*v.shape[:2], *axes[:-1], axes[-1] * head_dim)
    apart = (1,) * (len(axes) - 1) + (head_dim,)
    padding = [size // 2 * step for size, step in zip(weight.shape[1:], apart, strict=True)]
    out = _CONVOLUTIONS[len(axes)](
        x, weight.to(x.dtype)[:, None], None, 1, padding, apart, weight.shape[0]
    )
    out = out.reshape(*v.shape[:2], -1, head_dim)
    return torch.nn.functional.pad(out, (0, 0, prefix, 0)) if prefix else out


def check(op: str, weight: Any, v: Tensor, grid: Sequence[int] | None) -> None:
    """Check filters [G, w], or with a grid also [G, w, ...], an odd size for each axis."""
    checks.require_tensor(op, "residual", weight)
    checks.require_floating(op, "residual", weight)
    checks.require_device(op, "residual", weight, v.device, "v")
    axes = 0 if grid is None else len(grid)
    fits = weight.dim() in (2, max(2, axes + 1)) and weight.shape[0] == v.shape[1]
    if not fits or any(size % 2 == 0 for size in weight.shape[1:]):
        more = f" or one for each axis of the grid, [G, {', '.join(['w'] * axes)}]" if axes else ""
        raise ValueError(
            f"{op}: residual {checks.describe(weight)}; expected [G, w]{more} with odd w, "
            f"G={v.shape[1]} (from v)"
        )
