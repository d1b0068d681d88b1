"""Convolution of active patches as operators of torch, and the autograd function around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops import flops
from sparseattn.ops.blocked import patch_conv3d as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.once import Gradients, differentiated_once
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.site_lookup import Three, Window

_ARGUMENTS = "Tensor x, Tensor neighbours, Tensor order, Tensor weight"
_OPTIONS = "int[] reach, int[] window, int groups, str impl"  # as Window.pack() gives it

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    f"patch_conv3d({_ARGUMENTS}, Tensor? bias, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"patch_conv3d_backward(Tensor dy, {_ARGUMENTS}, {_OPTIONS}, bool needs_x, "
    "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def convolve(
    x: PatchGrid, weight: Tensor, bias: Tensor | None, window: Window, groups: int, impl: str
) -> PatchGrid:
    """Convolve active patches; those of the output have 1 / stride of the sites along each axis."""
    reach = _reach(window, x.patch)
    arguments = (
        x.features, x.mask.neighbour_rows(reach), x.mask.order, weight, bias, list(reach),
        window.pack(), groups, impl,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        ops = torch.ops.sparseattn
        flops.register({ops.patch_conv3d: _flops, ops.patch_conv3d_backward: _backward_flops})
    wanted = (x.features, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted):
        return x.with_features(_PatchConv3d.apply(*arguments))
    return x.with_features(torch.ops.sparseattn.patch_conv3d.default(*arguments))


def _reach(window: Window, patch: Three) -> Three:
    """Return how many patches away the farthest tap reads along each axis, 1 or more."""
    axes = zip(window.low, window.spans, window.stride, patch, strict=True)
    x, y, z = (max(1, -(-max(low, span + 1 - s - low) // p)) for low, span, s, p in axes)
    return x, y, z


class _PatchConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:4])
        ctx.options = arguments[5:]
        return torch.ops.sparseattn.patch_conv3d.default(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        dx, dw, db = torch.ops.sparseattn.patch_conv3d_backward.default(
            dy, *ctx.saved_tensors, *ctx.options, needs_x, needs_weight, needs_bias
        )
        wanted: Gradients = (
            dx if needs_x else None, dw if needs_weight else None, db if needs_bias else None,
        )  # fmt: skip
        wanted = differentiated_once("patch_conv3d", wanted, dy, *ctx.saved_tensors)
        return wanted[0], None, None, wanted[1], wanted[2], *(None,) * 4


def _forward(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, bias: Tensor | None,
    reach: list[int], window: list[int], groups: int, impl: str,
) -> Tensor:  # fmt: skip
    taps = Window.unpack(window)
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import forward

        there = _window(x, taps, groups)
        return forward.forward(x, neighbours, order, weight, bias, there).to(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        problem = blocked.Problem(x.contiguous(), neighbours, tuple(reach), taps, groups)
        return blocked.forward(problem, weight, bias)


def _backward(
    dy: Tensor, x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor,
    reach: list[int], window: list[int], groups: int, impl: str,
    needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, taps = dy.contiguous(), Window.unpack(window)
    dx = dw = None
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import backward, backward_dx

        there = _window(x, taps, groups)
        if needs_x:
            dx = backward_dx.input_gradient(dy, neighbours, order, weight, there).to(x.dtype)
        if needs_weight:
            dw = backward.weight_gradient(x, dy, neighbours, there)
    else:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            problem = blocked.Problem(x.contiguous(), neighbours, tuple(reach), taps, groups)
            if needs_x:
                dx = blocked.input_gradient(problem._replace(x=dy), weight)
            if needs_weight:
                dw = blocked.weight_gradient(problem, dy, weight.shape)
    db = x.new_empty(0)
    if needs_bias:
        db = dy.flatten(0, 3).sum(0, dtype=wide_dtype(x.dtype)).to(x.dtype)
    dx = x.new_empty(0) if dx is None else dx
    dw = x.new_empty(0) if dw is None else dw.to(x.dtype).contiguous()
    return dx, dw, db


def _window(x: Tensor, taps: Window, groups: int) -> Any:
    from sparseattn.kernels.sparse_conv3d import call

    return call.Window(tuple(x.shape[1:4]), *taps, groups)


def _flops(
    x: Any, neighbours: Any, order: Any, weight: Any, bias: Any, reach: Any, window: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """2 operations a tap, site and weight, also for taps that find no active site."""
    sites = math.prod(x[:4]) // math.prod(Window.unpack(window).stride)
    return 2 * sites * math.prod(weight)


def _backward_flops(dy: Any, *shapes: Any, **_: Any) -> int:
    needs_x, needs_weight = shapes[8:10]
    each = _flops(*shapes[:4], None, *shapes[4:6])
    return each * (bool(needs_x) + bool(needs_weight))


def _forward_fake(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, bias: Tensor | None,
    reach: list[int], window: list[int], *rest: Any,
) -> Tensor:  # fmt: skip
    stride = Window.unpack(window).stride
    pooled = [size // step for size, step in zip(x.shape[1:4], stride, strict=True)]
    return x.new_empty((x.shape[0], *pooled, weight.shape[0]))


def _backward_fake(
    dy: Tensor, x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = rest[-3:]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("patch_conv3d", _forward, _device)
    _library.impl("patch_conv3d_backward", _backward, _device)
torch.library.register_fake("sparseattn::patch_conv3d", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::patch_conv3d_backward", _backward_fake, lib=_library)
