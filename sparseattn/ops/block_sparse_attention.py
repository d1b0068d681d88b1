"""Softmax attention over a BlockMask: the public op, its checks, dispatch and autograd."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, dispatch, sharded
from sparseattn.ops import block_sparse_attention_registration as registered
from sparseattn.reference.block_sparse_attention import block_sparse_attention as reference
from sparseattn.structures.block_mask import BlockMask

_OP = "block_sparse_attention"
Impl = Literal["auto", "triton", "torch", "reference"]


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, key_mask: Tensor | None = ...,
    key_bias: Tensor | None = ..., block_gate: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, key_mask: Tensor | None = ...,
    key_bias: Tensor | None = ..., block_gate: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    block_gate: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the keys that a BlockMask shows to each query.

        s_ij = scale * q_i . k_j + key_bias_j + block_gate_RC      for visible pairs, else -inf
        lse_i = log sum_j exp(s_ij),   o_i = sum_j exp(s_ij - lse_i) v_j

    with i in query block R and j in key block C. Gradients are exact for q, k, v, key_bias and
    block_gate, also through lse.

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        mask: which pairs are visible, for q_len = Nq and k_len = Nk; its batch is 1 or B, its
            heads 1 or H.
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        key_bias: floating point [B, 1 or H, Nk], added to the logits (natural log); -inf hides.
        block_gate: floating point [B, 1 or H, R, C], added to the logits of a block; -inf hides.
        scale: multiplies q . k; default D ** -0.5.
        return_lse: also return lse.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(Nq * Nk) memory, differentiable twice), or
            "auto": triton on CUDA where it can run, else torch.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q; with return_lse also lse [B, H, Nq], float32
        (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A query that sees nothing gets o = 0, lse = -inf and zero gradients.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. (The torch path on a GPU sums with atomics and is not.)
        Under autocast q, k and v are cast as scaled_dot_product_attention casts them.
        DTensors sharded over batch and heads stay so, and nothing is sent between ranks. The mask,
        and extras that are plain tensors, are the whole ones, equal on every rank.
        Memory beyond the outputs: 4 * B * H * Nq bytes for lse; backward needs as much again. No
        gradient flows to the mask. Differentiable once, except with impl="reference".

    Reference:
        FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (2023),
        arXiv:2307.08691, algorithms 1 and 2, over block lists.
    """
    if sharded.is_sharded(q, k, v):
        run = partial(block_sparse_attention, scale=scale, return_lse=True, impl=impl)
        extras = {
            "mask": mask, "key_mask": key_mask, "key_bias": key_bias, "block_gate": block_gate,
        }  # fmt: skip
        out, lse = sharded.attend(_OP, run, (q, k, v), extras)
        return (out, lse) if return_lse else out
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    _check_mask(mask, q, k)
    scale = attention_checks.check_scale(_OP, scale, q)
    bias = _fold_key_bias(q, k, key_mask, key_bias)
    gate = _check_gate(block_gate, mask, q, k)
    asked = impl == "triton" or (impl == "auto" and q.device.type == "cuda")
    chosen = dispatch.choose(_OP, impl, q.device, unsupported(q) if asked else [])
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference(q, k, v, mask, bias, gate, scale)
        lse = lse.to(registered.wide_dtype(q.dtype))
    else:
        out, lse = registered.apply(q, k, v, bias, gate, mask, scale, chosen)
    return (out, lse) if return_lse else out


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    reasons = list(dispatch.triton_reasons(q.device))
    if q.dtype == torch.float64:
        reasons.append("dtype is float64; expected float32, float16 or bfloat16")
    head_dim = q.shape[3]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        reasons.append(f"head dim is {head_dim}; expected a multiple of 8 from 16 to 256")
    return reasons


def _check_mask(mask: Any, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"{_OP}: mask {checks.describe(mask)}; expected a BlockMask")
    for name, size, source in (("q_len", q.shape[2], "q"), ("k_len", k.shape[2], "k")):
        if getattr(mask, name) != size:
            raise ValueError(
                f"{_OP}: mask has {name}={getattr(mask, name)}; "
                f"expected {name}={size} (from {source})"
            )
    for name, size in (("batch", q.shape[0]), ("heads", q.shape[1])):
        if getattr(mask, name) not in (1, size):
            raise ValueError(
                f"{_OP}: mask has {name}={getattr(mask, name)}; expected 1 or {size} (from q)"
            )
    if mask.device != q.device:
        raise ValueError(
            f"{_OP}: mask is on {mask.device}; expected the device of q, device={q.device} (from q)"
        )


def _fold_key_bias(q: Tensor, k: Tensor, key_mask: Any, key_bias: Any) -> Tensor | None:
    """Check both and return one bias [B, 1 or H, Nk] in which a masked key has -inf."""
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("k", k, "B G Nk D")
    wide = registered.wide_dtype(q.dtype)
    bias = None
    if key_bias is not None:
        shapes.bind("key_bias", key_bias, "B 1|H Nk")
        checks.require_floating(_OP, "key_bias", key_bias)
        checks.require_device(_OP, "key_bias", key_bias, q.device, "q")
        bias = key_bias.to(wide)
    if key_mask is not None:
        shapes.bind("key_mask", key_mask, "B Nk")
        checks.require_dtype(_OP, "key_mask", key_mask, torch.bool)
        checks.require_device(_OP, "key_mask", key_mask, q.device, "q")
        zero = torch.zeros((), dtype=wide, device=q.device) if bias is None else bias
        bias = torch.where(key_mask[:, None], zero, -math.inf)
    return bias


def _check_gate(block_gate: Any, mask: BlockMask, q: Tensor, k: Tensor) -> Tensor | None:
    if block_gate is None:
        return None
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.set("R", mask.num_q_blocks, "mask")
    shapes.set("C", mask.num_k_blocks, "mask")
    shapes.bind("block_gate", block_gate, "B 1|H R C")
    checks.require_floating(_OP, "block_gate", block_gate)
    checks.require_device(_OP, "block_gate", block_gate, q.device, "q")
    return block_gate.to(registered.wide_dtype(q.dtype))
