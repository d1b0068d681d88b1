"""Linformer attention: keys and values shortened along the tokens by a linear map."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, dispatch, landmark_stages, sharded
from sparseattn.ops.once import differentiated_once
from sparseattn.reference.linformer_attention import linformer_attention as reference

_OP = "linformer_attention"
Impl = Literal["auto", "triton", "torch", "reference"]


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend to m projected keys in place of Nk: linear in the number of tokens.

        o_i = sum_r softmax_r(scale * q_i . (E k)_r) (F v)_r

    with E = key_projection and F = value_projection. Columns of masked keys count as 0.

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        key_projection: [m, Nk], shared by the heads, or [G, m, Nk]; floating point, rounded to the
            dtype of q.
        value_projection: the same for values; default key_projection.
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        scale: multiplies q . (E k); default D ** -0.5.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(Nq * m) memory, differentiable twice), or
            "auto": triton on CUDA where it can run, else torch. The projections are torch's matrix
            products everywhere.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A sample whose keys are all masked gets o = 0 and zero gradients.
        Deterministic where torch's matrix products are; a sample does not depend on the values of
        its batch mates. Exact gradients for q, k, v and both projections.
        Under autocast all are cast as scaled_dot_product_attention casts.
        DTensors sharded over batch and heads stay so; nothing is sent between ranks but gradients
        of the projections, which are equal on every rank.
        Saved for the backward: the inputs and the projected keys and values, 2 * B * G * m * D
        elements; the weights [Nq, m] are made anew. A layer that projects its tokens before it
        makes keys of them, E (x W) = (E x) W, saves more. Differentiable once, except with
        impl="reference".

    Reference:
        Linformer: Self-Attention with Linear Complexity (2020), arXiv:2006.04768, equation 7.
    """
    if sharded.is_sharded(q, k, v):
        run = partial(linformer_attention, scale=scale, impl=impl)
        projections = {"key_projection": key_projection, "value_projection": value_projection}
        beside = {
            name: (tensor, 1 if getattr(tensor, "ndim", 2) == 3 else 2)
            for name, tensor in projections.items()
        }
        return sharded.attend_without_pairs(_OP, run, (q, k, v), key_mask, beside)
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    scale = attention_checks.check_scale(_OP, scale, q)
    key_projection, value_projection = check_projections(key_projection, value_projection, k)
    attention_checks.check_key_mask(_OP, key_mask, k)
    chosen = landmark_stages.choose(_OP, impl, q)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            return reference(q, k, v, key_projection, value_projection, key_mask, scale)
        keys = _Project.apply(key_projection, k, key_mask)
        values = _Project.apply(value_projection, v, key_mask)
    return landmark_stages.stage2(q, keys, values, None, scale=scale, impl=chosen)


def project_tokens(projection: Tensor, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return E x [B, m, C] of tokens x [B, Nk, C], and E 1 [B or 1, m], over tokens shown.

    projection: E, [m, Nk]. For layers that make keys and values of projected tokens.
    """
    x, narrow = dispatch.autocast_inputs(x, projection)
    with torch.autocast(x.device.type, enabled=False):
        found = _Project.apply(narrow.to(x.dtype), x[:, None], key_mask)[:, 0]
        if key_mask is None:
            return found, projection.sum(-1)[None]
        return found, key_mask.to(projection.dtype) @ projection.mT


def attend_projected(
    q: Tensor, keys: Tensor, values: Tensor, scale: float | None, impl: Impl
) -> Tensor:
    """Attend to keys and values [B, G, m, D] that are projected already; the rest as above."""
    q, keys, values = attention_checks.check_qkv(_OP, q, keys, values)
    scale = attention_checks.check_scale(_OP, scale, q)
    chosen = landmark_stages.choose(_OP, impl, q)
    if chosen == "reference":
        one = torch.eye(keys.shape[2], dtype=q.dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, keys, values, one, one, None, scale)
    return landmark_stages.stage2(q, keys, values, None, scale=scale, impl=chosen)


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    return landmark_stages.unsupported(q)


class _Project(torch.autograd.Function):
    """projection @ x over the tokens that take part, without a copy of either that outlives it.

    The gradient of a shared projection is one product over all samples and heads: summing one of
    its size for each would need B * G times its memory.
    """

    @staticmethod
    def forward(ctx: Any, projection: Tensor, x: Tensor, key_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(projection, x, key_mask)
        return torch.matmul(projection, _shown(x, key_mask))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: an activation checkpoint refuses a second time
        projection, x, key_mask = saved
        dprojection = dx = None
        if ctx.needs_input_grad[0]:
            sums = "bgmd,bgnd->mn" if projection.dim() == 2 else "bgmd,bgnd->gmn"
            dprojection = torch.einsum(sums, dy, _shown(x, key_mask))
        if ctx.needs_input_grad[1]:
            dx = _shown(torch.matmul(projection.mT, dy), key_mask)
        return differentiated_once(_OP, (dprojection, dx, None), dy, *saved)


def _shown(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def check_projections(key: Any, value: Any, k: Tensor) -> tuple[Tensor, Tensor]:
    """Check both projections; return them in the dtype of k, the key's twice without another."""
    key = _check_projection("key_projection", key, k)
    if value is None:
        return key, key
    value = _check_projection("value_projection", value, k)
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{_OP}: value_projection {checks.describe(value)}; expected as many "
            f"rows as key_projection, m={key.shape[-2]} (from key_projection)"
        )
    return key, value


def _check_projection(name: str, projection: Any, k: Tensor) -> Tensor:
    shapes = checks.Shapes(_OP)
    shapes.bind("k", k, "B G Nk D")
    checks.require_tensor(_OP, name, projection)
    shapes.bind(name, projection, "m Nk" if projection.dim() == 2 else "G m Nk")
    checks.require_floating(_OP, name, projection)
    checks.require_device(_OP, name, projection, k.device, "k")
    if projection.shape[-2] == 0:
        raise ValueError(f"{_OP}: {name} {checks.describe(projection)}; expected m >= 1 rows")
    return projection.to(k.dtype)
