"""Convolution through a kernel map as operators of torch, and the autograd function around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.constants import SITES_PER_LIST
from sparseattn.ops import flops
from sparseattn.ops.blocked import sparse_conv3d as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype
from sparseattn.ops.once import Gradients, differentiated_once
from sparseattn.structures.kernel_map import Pairs, kernel_map
from sparseattn.structures.site_lookup import Window
from sparseattn.structures.site_sets import SiteSet

_ARGUMENTS = "Tensor x, Tensor weight"
_MAP = "Tensor rows, Tensor? order, Tensor? lists"
_BACK = "Tensor? back_rows, Tensor? back_order, Tensor? back_lists"  # None: the map is symmetric
_PAIRS = "Tensor? inputs, Tensor? outputs, Tensor? offsets"

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    f"sparse_conv3d({_ARGUMENTS}, Tensor? bias, {_MAP}, int groups, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"sparse_conv3d_backward(Tensor dy, {_ARGUMENTS}, {_MAP}, {_BACK}, {_PAIRS}, int groups, "
    "str impl, bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, fine: SiteSet, coarse: SiteSet, window: Window,
    groups: int, impl: str, *, upwards: bool = False,
) -> Tensor:  # fmt: skip
    """Convolve features of the fine sites to the coarse ones, or `upwards` from coarse to fine.

    weight is torch's [C_out, C_in / groups, kx, ky, kz]. Maps for the gradients are made only if
    they are wanted.
    """
    if not torch.compiler.is_compiling():
        ops = torch.ops.sparseattn
        flops.register({ops.sparse_conv3d: _flops, ops.sparse_conv3d_backward: _backward_flops})
    sort = impl == "triton"
    made = kernel_map(fine, coarse, window, backwards=upwards, sort=sort)
    arguments = (x, weight, bias, made.rows, made.order, made.lists, groups, impl)
    wanted = [t is not None and t.requires_grad for t in (x, weight, bias)]
    if not (torch.is_grad_enabled() and any(wanted)):
        return torch.ops.sparseattn.sparse_conv3d.default(*arguments)
    back: tuple = (None, None, None)
    if wanted[0] and not made.symmetric:
        turned = kernel_map(fine, coarse, window, backwards=not upwards, sort=sort)
        back = (turned.rows, turned.order, turned.lists)
    pairs: tuple = (None, None, None)
    if wanted[1] and sort:
        key = ("pairs", upwards)
        found: Pairs = fine.find(key, window, coarse.coordinates, made.pairs)
        pairs = tuple(found)
    return _SparseConv3d.apply(*arguments, *back, *pairs)


class _SparseConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:2], *arguments[3:6], *arguments[8:])
        ctx.options = arguments[6:8]
        return torch.ops.sparseattn.sparse_conv3d.default(*arguments[:8])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx, dw, db = torch.ops.sparseattn.sparse_conv3d_backward.default(
            dy, *ctx.saved_tensors, *ctx.options, *needs
        )
        wanted: Gradients = (
            dx if needs_x else None, dw if needs_weight else None, db if needs_bias else None,
        )  # fmt: skip
        wanted = differentiated_once("sparse_conv3d", wanted, dy, *ctx.saved_tensors[:2])
        return *wanted, *(None,) * 11


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, order: Tensor | None,
    lists: Tensor | None, groups: int, impl: str,
) -> Tensor:  # fmt: skip
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import map_forward

        table = _table(rows, order, lists)
        return map_forward.forward(x, table, weight, bias, groups).to(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return blocked.forward(x, rows, order, weight, bias, groups)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, order: Tensor | None,
    lists: Tensor | None, back_rows: Tensor | None, back_order: Tensor | None,
    back_lists: Tensor | None, inputs: Tensor | None, outputs: Tensor | None,
    offsets: Tensor | None, groups: int, impl: str,
    needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy = dy.contiguous()
    dx = dw = None
    back = (rows, order, lists) if back_rows is None else (back_rows, back_order, back_lists)
    flipped = back_rows is None
    if impl == "triton":
        from sparseattn.kernels.sparse_conv3d import map_backward, map_forward

        if needs_x:
            table = _table(*back)
            dx = map_forward.input_gradient(dy, table, weight, groups, flipped).to(x.dtype)
        if needs_weight:
            pairs = _given(inputs, outputs, offsets)
            dw = map_backward.weight_gradient(x, dy, pairs, weight.shape, groups)
    else:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if needs_x:
                dx = blocked.input_gradient(dy, *back[:2], weight, groups, flipped)
            if needs_weight:
                dw = blocked.weight_gradient(x, dy, rows, order, weight.shape, groups)
    db = x.new_empty(0)
    if needs_bias:
        db = dy.sum(0, dtype=accumulate_dtype(x.dtype)).to(x.dtype)
    dx = x.new_empty(0) if dx is None else dx
    dw = x.new_empty(0) if dw is None else dw.to(x.dtype).contiguous()
    return dx, dw, db


def _table(rows: Tensor, order: Tensor | None, lists: Tensor | None) -> Any:
    from sparseattn.kernels.sparse_conv3d.call import Table

    order, lists = _given(order, lists)
    return Table(rows, order, lists, SITES_PER_LIST)


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    found = tuple(tensor for tensor in tensors if tensor is not None)
    if len(found) < len(tensors):
        raise ValueError("sparse_conv3d: the map is not sorted; expected a sorted one for triton")
    return found


def _flops(x: Any, weight: Any, bias: Any, rows: Any, *_: Any, **__: Any) -> int:
    """2 operations a weight and pair, of which a tap has one a site of input and output at most."""
    return 2 * min(x[0], rows[1]) * math.prod(weight)


def _backward_flops(dy: Any, x: Any, weight: Any, rows: Any, *rest: Any, **_: Any) -> int:
    needs_x, needs_weight = rest[-3:-1]
    return _flops(x, weight, None, rows) * (bool(needs_x) + bool(needs_weight))


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty((rows.shape[1], weight.shape[0]))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = rest[-3:]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("sparse_conv3d", _forward, _device)
    _library.impl("sparse_conv3d_backward", _backward, _device)
torch.library.register_fake("sparseattn::sparse_conv3d", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::sparse_conv3d_backward", _backward_fake, lib=_library)
