"""Linear attention as operators of torch, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.ops import landmark_flops
from sparseattn.ops.blocked import linear_attention as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.once import differentiated_once

_library = torch.library.Library("sparseattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask"
_library.define(
    f"linear_attention({_INPUTS}, str feature_map, str impl) -> (Tensor, Tensor)", tags=_TAGS
)
_library.define(
    f"linear_attention_backward(Tensor dout, {_INPUTS}, Tensor sums, str feature_map, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_ops = torch.ops.sparseattn


def apply(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str, impl: str
) -> Tensor:
    """Run the op, through autograd only if something needs a gradient."""
    landmark_flops.register()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _LinearAttention.apply(q, k, v, key_mask, feature_map, impl)
    return _ops.linear_attention.default(q, k, v, key_mask, feature_map, impl)[0]


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out, sums = _ops.linear_attention.default(*args)
        ctx.save_for_backward(*args[:4], sums)
        ctx.options = args[4:]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = _ops.linear_attention_backward.default(dout, *saved, *ctx.options)
        wanted = tuple(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False))
        return *differentiated_once("linear_attention", wanted, dout, *saved), None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from sparseattn.kernels.linear_attention import launchers

        sums = launchers.sums(k, v, key_mask, feature_map)
        return launchers.forward(q, sums, feature_map), sums
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        sums = blocked.sums(k, v, key_mask, feature_map)
        return blocked.forward(q, sums, feature_map), sums


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, impl = args
    if impl == "triton":
        from sparseattn.kernels.linear_attention import launchers

        return launchers.backward(*inputs)
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return blocked.backward(*inputs)


def _forward_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = k.new_empty((*k.shape[:2], k.shape[3], k.shape[3] + 1), dtype=wide_dtype(k.dtype))
    return torch.empty_like(q), sums


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


for _device in ("CPU", "CUDA"):
    _library.impl("linear_attention", _forward, _device)
    _library.impl("linear_attention_backward", _backward, _device)
torch.library.register_fake("sparseattn::linear_attention", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::linear_attention_backward", _backward_fake, lib=_library)
