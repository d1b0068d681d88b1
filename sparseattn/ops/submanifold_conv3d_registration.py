"""Submanifold convolution as operators of torch, and the autograd function around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops import flops
from sparseattn.ops.blocked import submanifold_conv3d as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.once import Gradients, differentiated_once

_ARGUMENTS = "Tensor x, Tensor neighbours, Tensor order, Tensor weight"
_OPTIONS = "int[] dilation, int groups, str impl"

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    f"submanifold_conv3d({_ARGUMENTS}, Tensor? bias, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"submanifold_conv3d_backward(Tensor dy, {_ARGUMENTS}, {_OPTIONS}, bool needs_x, "
    "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, bias: Tensor | None,
    dilation: list[int], groups: int, impl: str,
) -> Tensor:  # fmt: skip
    """Run the op, through autograd only if something needs a gradient."""
    arguments = (x, neighbours, order, weight, bias, dilation, groups, impl)
    if not torch.compiler.is_compiling():
        ops = torch.ops.sparseattn
        flops.register(
            {ops.submanifold_conv3d: _flops, ops.submanifold_conv3d_backward: _backward_flops}
        )
    wanted = (x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted):
        return _SubmanifoldConv3d.apply(*arguments)
    return torch.ops.sparseattn.submanifold_conv3d.default(*arguments)


def spans(weight: Tensor, dilation: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Return how many voxels a window has beside its centre, along each axis."""
    return tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))


class _SubmanifoldConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:4])
        ctx.options = arguments[5:]
        return torch.ops.sparseattn.submanifold_conv3d.default(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        dx, dw, db = torch.ops.sparseattn.submanifold_conv3d_backward.default(
            dy, *ctx.saved_tensors, *ctx.options, needs_x, needs_weight, needs_bias
        )
        wanted: Gradients = (
            dx if needs_x else None, dw if needs_weight else None, db if needs_bias else None,
        )  # fmt: skip
        wanted = differentiated_once("submanifold_conv3d", wanted, dy, *ctx.saved_tensors)
        return wanted[0], None, None, wanted[1], wanted[2], None, None, None


def _forward(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, bias: Tensor | None,
    dilation: list[int], groups: int, impl: str,
) -> Tensor:  # fmt: skip
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import forward

        window = _window(x, weight, dilation, groups)
        return forward.forward(x, neighbours, order, weight, bias, window).to(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return blocked.forward(_problem(x, neighbours, weight, dilation, groups), weight, bias)


def _backward(
    dy: Tensor, x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor,
    dilation: list[int], groups: int, impl: str,
    needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy = dy.contiguous()
    dx = dw = None
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import backward, forward

        window = _window(x, weight, dilation, groups)
        if needs_x:
            dx = forward.input_gradient(dy, neighbours, order, weight, window).to(x.dtype)
        if needs_weight:
            dw = backward.weight_gradient(x, dy, neighbours, window)
    else:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            problem = _problem(x, neighbours, weight, dilation, groups)
            if needs_x:
                mirrored = problem._replace(x=dy, before=problem.after, after=problem.before)
                dx = blocked.input_gradient(mirrored, weight)
            if needs_weight:
                dw = blocked.weight_gradient(problem, dy, weight.shape)
    db = x.new_empty(0)
    if needs_bias:
        db = dy.flatten(0, 3).sum(0, dtype=wide_dtype(x.dtype)).to(x.dtype)
    dx = x.new_empty(0) if dx is None else dx
    dw = x.new_empty(0) if dw is None else dw.to(x.dtype).contiguous()
    return dx, dw, db


def _window(x: Tensor, weight: Tensor, dilation: list[int], groups: int) -> Any:
    from sparseattn.kernels.sparse_conv3d.call import Window

    return Window(tuple(x.shape[1:4]), tuple(weight.shape[2:]), tuple(dilation), groups)


def _problem(
    x: Tensor, neighbours: Tensor, weight: Tensor, dilation: list[int], groups: int
) -> blocked.Problem:
    before = tuple(span // 2 for span in spans(weight, dilation))
    after = tuple(span - span // 2 for span in spans(weight, dilation))
    steps = (dilation[0], dilation[1], dilation[2])
    return blocked.Problem(x, neighbours, before, after, steps, groups)


def _flops(x: Any, neighbours: Any, order: Any, weight: Any, *_: Any, **__: Any) -> int:
    """2 operations a tap, site and weight, also for taps that find no active site."""
    return 2 * math.prod(x[:4]) * math.prod(weight)


def _backward_flops(dy: Any, *shapes: Any, **_: Any) -> int:
    needs_x, needs_weight = shapes[7:9]
    return _flops(*shapes[:4]) * (bool(needs_x) + bool(needs_weight))


def _forward_fake(
    x: Tensor, neighbours: Tensor, order: Tensor, weight: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty((*x.shape[:4], weight.shape[0]))


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
    _library.impl("submanifold_conv3d", _forward, _device)
    _library.impl("submanifold_conv3d_backward", _backward, _device)
torch.library.register_fake("sparseattn::submanifold_conv3d", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::submanifold_conv3d_backward", _backward_fake, lib=_library)
