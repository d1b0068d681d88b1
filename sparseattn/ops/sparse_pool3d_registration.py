"""Pooling of active patches as operators of torch, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.blocked import sparse_pool3d as blocked
from sparseattn.ops.once import differentiated_once

_OPTIONS = (
    "Tensor neighbours, Tensor? shares, float share, int[] patch, int[] kernel, int[] stride, "
    "int[] padding, bool is_max, str impl"
)

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    f"sparse_pool3d(Tensor x, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"sparse_pool3d_backward(Tensor dy, Tensor taps, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(x: Tensor, *options: Any) -> Tensor:
    """Run the op, through autograd only if something needs a gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        pooled: Tensor = _SparsePool3d.apply(x, *options)
        return pooled
    return torch.ops.sparseattn.sparse_pool3d.default(x, *options)[0]


class _SparsePool3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        y, taps = torch.ops.sparseattn.sparse_pool3d.default(x, *options)
        ctx.save_for_backward(taps, *options[:2])
        ctx.options = options[2:]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        taps, neighbours, shares = ctx.saved_tensors
        dx = torch.ops.sparseattn.sparse_pool3d_backward.default(
            dy, taps, neighbours, shares, *ctx.options
        )
        wanted = differentiated_once("sparse_pool3d", (dx,), dy)
        return wanted[0], *(None,) * (len(ctx.options) + 2)


def _forward(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    neighbours, shares, share, patch, kernel, stride, padding, is_max, impl = options
    if impl == "triton":
        from sparseattn.kernels.sparse_pool3d import pool

        window = pool.Window(tuple(patch), tuple(kernel), tuple(stride), tuple(padding))
        y, taps = pool.forward(x, neighbours, shares, share, window, is_max)
        return y.to(x.dtype), taps
    with torch.no_grad():
        return blocked.forward(x, blocked.Pool(*options[:-1]))


def _backward(dy: Tensor, taps: Tensor, *options: Any) -> Tensor:
    neighbours, shares, share, patch, kernel, stride, padding, is_max, impl = options
    dy = dy.contiguous()
    if impl == "triton":
        from sparseattn.kernels.sparse_pool3d import pool

        window = pool.Window(tuple(patch), tuple(kernel), tuple(stride), tuple(padding))
        dx = pool.backward(dy, taps, neighbours, shares, share, window, is_max)
        return dx.to(dy.dtype)
    with torch.no_grad():
        return blocked.backward(dy, taps, blocked.Pool(*options[:-1]))


def _forward_fake(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    patch, stride, is_max = options[3], options[5], options[7]
    pooled = [p // s for p, s in zip(patch, stride, strict=True)]
    y = x.new_empty((x.shape[0], *pooled, x.shape[4]))
    return y, y.new_empty(y.shape if is_max else (0,), dtype=torch.int16)


def _backward_fake(dy: Tensor, taps: Tensor, *options: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], *options[3], dy.shape[4]))


for _device in ("CPU", "CUDA"):
    _library.impl("sparse_pool3d", _forward, _device)
    _library.impl("sparse_pool3d_backward", _backward, _device)
torch.library.register_fake("sparseattn::sparse_pool3d", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::sparse_pool3d_backward", _backward_fake, lib=_library)
