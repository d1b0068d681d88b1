"""Block-sparse attention as operators of torch, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.kernels.launch import IndexLists
from sparseattn.ops import block_sparse_attention_flops as flops
from sparseattn.ops.blocked import block_sparse_attention as blocked
from sparseattn.ops.blocked.plan import Problem
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.once import differentiated_once
from sparseattn.structures.block_mask import BlockMask

_LISTS = "Tensor {0}_offsets, Tensor {0}_indices, Tensor? partial_{0}_offsets, "
_LISTS += "Tensor? partial_{0}_indices, Tensor? partial_{0}_slots"
_EXTRAS = "Tensor? token_bits, int block_q, int block_k, float scale, str impl"
_ROWS, _COLUMNS = _LISTS.format("row"), _LISTS.format("column")

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? block_gate, "
    f"{_ROWS}, {_EXTRAS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "block_sparse_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, "
    f"Tensor k, Tensor v, Tensor? key_bias, Tensor? block_gate, {_ROWS}, {_COLUMNS}, {_EXTRAS}, "
    "bool needs_key_bias, bool needs_block_gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    block_gate: Tensor | None,
    mask: BlockMask,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Run the op, through autograd only if something needs a gradient."""
    inputs = (q, k, v, key_bias, block_gate)
    rows = _flat(mask.rows, mask.partial_rows)
    columns = _flat(mask.columns, mask.partial_columns)
    options = (mask.token_bits, *mask.block_size, scale, impl)
    if not torch.compiler.is_compiling():
        flops.register()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        constants = (*rows, *columns, *options)
        return _BlockSparseAttention.apply(*inputs, *(_saveable(value) for value in constants))
    return torch.ops.sparseattn.block_sparse_attention.default(*inputs, *rows, *options)


def _flat(full: Any, partial: Any) -> tuple[Tensor | None, ...]:
    if partial is None:
        return full.offsets, full.indices, None, None, None
    return full.offsets, full.indices, partial.offsets, partial.indices, partial.slots


def _saveable(value: Any) -> Any:
    """Copy a tensor made under inference_mode, which autograd would not save."""
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or not value.is_inference():
        return value
    return value.clone()


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        inputs, rows, options = args[:5], args[5:10], args[15:]
        out, lse = torch.ops.sparseattn.block_sparse_attention.default(*inputs, *rows, *options)
        ctx.save_for_backward(out, lse, *args[:16])
        ctx.options = options[1:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        out = saved[0]
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        if dout is None:
            dout = torch.zeros_like(out)
        needs = ctx.needs_input_grad
        gradients = torch.ops.sparseattn.block_sparse_attention_backward.default(
            dout, dlse, *saved, *ctx.options, needs[3], needs[4]
        )
        wanted = tuple(g if need else None for g, need in zip(gradients, needs[:5], strict=True))
        wanted = differentiated_once("block_sparse_attention", wanted, dout, dlse, *saved)
        return *wanted, *(None,) * (len(needs) - 5)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    key_bias, block_gate, rows = rest[0], rest[1], IndexLists(*rest[2:7])
    token_bits, block_q, block_k, scale, impl = rest[7:]
    if impl == "triton":
        from sparseattn.kernels.block_attention import forward

        return forward.forward(
            q, k, v, key_bias, block_gate, rows, token_bits, (block_q, block_k), scale
        )
    problem = Problem(q, k, v, key_bias, block_gate, rows, token_bits, (block_q, block_k), scale)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return blocked.forward(problem)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, key_bias, block_gate = rest[:5]
    rows, columns = IndexLists(*rest[5:10]), IndexLists(*rest[10:15])
    token_bits, block_q, block_k, scale, impl, needs_key_bias, needs_block_gate = rest[15:]
    needs = (needs_key_bias, needs_block_gate)
    if impl == "triton":
        from sparseattn.kernels.block_attention import backward

        dq, dk, dv, dbias, dgate = backward.backward(
            dout, dlse, out, lse, q, k, v, key_bias, block_gate, rows, columns, token_bits,
            (block_q, block_k), scale, needs,
        )  # fmt: skip
    else:
        problem = Problem(
            q, k, v, key_bias, block_gate, rows, token_bits, (block_q, block_k), scale
        )
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            dq, dk, dv, dbias, dgate = blocked.backward(problem, out, lse, dout, dlse, needs)
    nothing = lse.new_empty(0)
    dbias = nothing if dbias is None else dbias
    dgate = nothing.clone() if dgate is None else dgate
    return dq, dk, dv, dbias, dgate


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, key_bias, block_gate = rest[:5]
    needs_key_bias, needs_block_gate = rest[-2:]
    wide = wide_dtype(q.dtype)
    dbias = q.new_empty(key_bias.shape if needs_key_bias else (0,), dtype=wide)
    dgate = q.new_empty(block_gate.shape if needs_block_gate else (0,), dtype=wide)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dgate


for _device in ("CPU", "CUDA"):
    _library.impl("block_sparse_attention", _forward, _device)
    _library.impl("block_sparse_attention_backward", _backward, _device)
torch.library.register_fake("sparseattn::block_sparse_attention", _forward_fake, lib=_library)
torch.library.register_fake(
    "sparseattn::block_sparse_attention_backward", _backward_fake, lib=_library
)
