"""Landmarks of queries: means over segments of tokens, as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.blocked import segment_means as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype
from sparseattn.ops.once import differentiated_once
from sparseattn.structures.segments import Segments

_library = torch.library.Library("sparseattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "segment_means(Tensor q, Tensor ids, Tensor counts, Tensor starts, Tensor? order, str impl) "
    "-> Tensor",
    tags=_TAGS,
)
_library.define(
    "segment_means_backward(Tensor dq, Tensor dmeans, Tensor ids, Tensor counts, str impl) "
    "-> Tensor",
    tags=_TAGS,
)
_op = torch.ops.sparseattn.segment_means.default
_op_backward = torch.ops.sparseattn.segment_means_backward.default


def segment_means(q: Tensor, segments: Segments, impl: str) -> tuple[Tensor, Tensor]:
    """Return q itself, and the means of its segments [B, H, m, D], float32 or float64.

    What is made of both should be made of the q that is returned: the gradient of the means is
    then added to its gradient in one walk over the tokens.
    """
    lists = (segments.ids, segments.counts, segments.starts, segments.order)
    if torch.is_grad_enabled() and q.requires_grad:
        same, means = _SegmentMeans.apply(q, *lists, impl)
        return same, means
    return q, _op(q, *lists, impl)


class _SegmentMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*args[:2])
        ctx.impl = args[-1]
        return q.view_as(q), _op(q, *args)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dmeans: Tensor) -> tuple[Tensor | None, ...]:
        ids, counts = ctx.saved_tensors
        found = (_op_backward(dq, dmeans, ids, counts, ctx.impl),)
        return *differentiated_once("segment means", found, dq, dmeans), *(None,) * 5


def _forward(
    q: Tensor, ids: Tensor, counts: Tensor, starts: Tensor, order: Tensor | None, impl: str
) -> Tensor:
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import segments as kernels

        return kernels.forward(q, ids, starts, order)
    with torch.no_grad():
        return blocked.forward(q, ids, counts)


def _backward(dq: Tensor, dmeans: Tensor, ids: Tensor, counts: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import segments as kernels

        return kernels.backward(dq, dmeans, ids, counts)
    with torch.no_grad():
        return blocked.backward(dq, dmeans, ids, counts)


def _forward_fake(q: Tensor, ids: Tensor, counts: Tensor, *_: Any) -> Tensor:
    shape = (q.shape[0], q.shape[1], counts.shape[1], q.shape[3])
    return q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


def _backward_fake(dq: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dq)


for _name, _run, _fake in (
    ("segment_means", _forward, _forward_fake),
    ("segment_means_backward", _backward, _backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"sparseattn::{_name}", _fake, lib=_library)
