"""Kept tokens gathered into a dense tensor and put back: operators of torch, with gradients.

Gradient and inverse of a gather are gathers with the selection's other list (docs/math).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.constants import PAD_INDEX
from sparseattn.ops.token_selection import TokenSelection

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "token_gather(Tensor rows, Tensor? more, Tensor? bias, Tensor? fill, Tensor index, float pad, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gather_keys(
    k: Tensor, v: Tensor, bias: Tensor | None, selection: TokenSelection, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept k and v [B, G, K, D] and their bias [B, S, K]: -inf in slots left over.

    bias: [B, S, N] in the dtype of sums.
    """
    return _apply(k, v, bias, None, *selection, -math.inf, impl)


def gather_tokens(x: Tensor, selection: TokenSelection, impl: str) -> Tensor:
    """Return the kept rows [B, H, K, D] of x [B, H, N, D]; H is a multiple of S."""
    return _apply(x, None, None, None, *selection, 0.0, impl)[0]


def scatter_tokens(
    y: Tensor, selection: TokenSelection, passthrough: Tensor | None, impl: str
) -> Tensor:
    """Put rows y [B, H, K, D] back to their tokens: [B, H, N, D].

    A dropped token gets its row of `passthrough` [B, H, N, D], or zeros.
    """
    tokens, slots = selection
    return _apply(y, None, None, passthrough, slots, tokens, 0.0, impl)[0]


def _apply(
    rows: Tensor,
    more: Tensor | None,
    bias: Tensor | None,
    fill: Tensor | None,
    index: Tensor,
    inverse: Tensor,
    pad: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator, through autograd only if something needs a gradient."""
    inputs = (rows, more, bias, fill)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _TokenGather.apply(*inputs, index, inverse, pad, impl)
    return torch.ops.sparseattn.token_gather.default(*inputs, index, pad, impl)


class _TokenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, more, bias, fill, index, inverse, pad, impl = args
        ctx.save_for_backward(index, inverse)
        ctx.absent = more is None, bias is None, fill is None
        ctx.impl = impl
        return torch.ops.sparseattn.token_gather.default(rows, more, bias, fill, index, pad, impl)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dmore: Tensor, dbias: Tensor) -> tuple[Any, ...]:
        index, inverse = ctx.saved_tensors
        no_more, no_bias, no_fill = ctx.absent
        sent = dout, None if no_more else dmore, None if no_bias else dbias, None
        drows, dmore, dbias = _apply(*sent, inverse, index, 0.0, ctx.impl)
        dfill = None
        if not no_fill and ctx.needs_input_grad[3]:
            kept = (index >= 0).repeat_interleave(dout.shape[1] // index.shape[1], 1)
            dfill = dout.masked_fill(kept[..., None], 0)
        return (
            drows, None if no_more else dmore, None if no_bias else dbias, dfill,
            None, None, None, None,
        )  # fmt: skip


def _allocate(
    rows: Tensor, more: Tensor | None, bias: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty outputs; heads or tokens come first in memory, as they do in `rows`."""
    batch, heads, _, columns = rows.shape
    slots = index.shape[2]

    def like_rows() -> Tensor:
        if rows.stride(1) < rows.stride(2):
            return rows.new_empty((batch, slots, heads, columns)).transpose(1, 2)
        return rows.new_empty((batch, heads, slots, columns))

    nothing = rows.new_empty(0)
    return (
        like_rows(),
        nothing if more is None else like_rows(),
        rows.new_empty(0) if bias is None else bias.new_empty(index.shape),
    )


def _token_gather(
    rows: Tensor,
    more: Tensor | None,
    bias: Tensor | None,
    fill: Tensor | None,
    index: Tensor,
    pad: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    made = _allocate(rows, more, bias, index)
    if impl == "triton":
        from sparseattn.kernels.saliency_attention import gather

        gather.gather(rows, more, bias, fill, index, pad, *made)
        return made
    with torch.no_grad():
        absent, source = index == PAD_INDEX, index.clamp(min=0).long()
        heads_each = rows.shape[1] // max(1, index.shape[1])
        spread, hidden = (t.repeat_interleave(heads_each, 1) for t in (source, absent))
        for tensor, out, other in ((rows, made[0], fill), (more, made[1], None)):
            if tensor is not None and out.numel():
                _pick(tensor, spread, hidden[..., None], other, out)
        if bias is not None:
            found = bias.gather(2, source) if bias.shape[2] else made[2]
            made[2].copy_(found.masked_fill(absent, pad))
    return made


def _pick(rows: Tensor, source: Tensor, hidden: Tensor, fill: Tensor | None, out: Tensor) -> None:
    """Write rows[b, h, source[b, h]] to out, and the fill or 0 where `hidden`."""
    if rows.shape[2] == 0:
        out.zero_() if fill is None else out.copy_(fill)
        return
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    head = torch.arange(rows.shape[1], device=rows.device)[None, :, None]
    out.copy_(rows[batch, head, source.expand(*rows.shape[:2], -1)])
    if fill is None:
        out.masked_fill_(hidden, 0)
    else:
        torch.where(hidden, fill, out, out=out)


def _token_gather_fake(
    rows: Tensor, more: Tensor | None, bias: Tensor | None, fill: Tensor | None, index: Tensor,
    pad: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate(rows, more, bias, index)


for _device in ("CPU", "CUDA"):
    _library.impl("token_gather", _token_gather, _device)
torch.library.register_fake("sparseattn::token_gather", _token_gather_fake, lib=_library)
