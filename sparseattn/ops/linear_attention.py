"""Linear attention: weights that are products of features of single tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.ops import attention_checks, dispatch, landmark_stages, sharded
from sparseattn.ops import linear_attention_registration as registered
from sparseattn.reference.linear_attention import linear_attention as reference

_OP = "linear_attention"
_MAPS = ("elu", "relu", "identity")
FeatureMap = Literal["elu", "relu", "identity"]
Impl = Literal["auto", "triton", "torch", "reference"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap = "elu",
    *,
    key_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend with weights f(q_i) . f(k_j), linear in the number of tokens; every token sees all.

        S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j),   o_i = f(q_i) S / (f(q_i) . z)

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        feature_map: f, element by element: "elu" is elu(x) + 1, "relu" is max(x, 0), "identity"
            leaves q and k as they are, for a map that was applied before; its values should be
            positive, or the denominator may vanish.
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, differentiable twice), or "auto": triton on
            CUDA where it can run, else torch.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A query whose denominator is 0 or no normal float32 (no keys; "relu" of a query without a
        positive entry; "elu" of one whose entries are all below -87) gets o = 0 and zero gradients.
        S and z are float32 (float64 for float64) from beginning to end; the features are not
        rounded to the dtype of q.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. Under autocast all are cast as scaled_dot_product_attention casts.
        DTensors sharded over batch and heads stay so, and nothing is sent between ranks.
        Saved for the backward: the inputs and 4 * B * G * D * (D + 1) bytes. Differentiable once,
        except with impl="reference".

    Reference:
        Transformers are RNNs (2020), arXiv:2006.16236, equations 5 and 7.
    """
    if sharded.is_sharded(q, k, v):
        run = partial(linear_attention, feature_map=feature_map, impl=impl)
        return sharded.attend_without_pairs(_OP, run, (q, k, v), key_mask)
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    check_feature_map(feature_map)
    attention_checks.check_key_mask(_OP, key_mask, k)
    asked = impl == "triton" or (impl == "auto" and q.device.type == "cuda")
    chosen = dispatch.choose(_OP, impl, q.device, unsupported(q) if asked else [])
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, v, feature_map, key_mask)
    return registered.apply(q, k, v, key_mask, feature_map, chosen)


def check_feature_map(feature_map: Any, op: str = _OP) -> None:
    """Check the name of a feature map."""
    if feature_map not in _MAPS:
        options = ", ".join(repr(name) for name in _MAPS)
        raise ValueError(f"{op}: feature_map is {feature_map!r}; expected one of {options}")


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    return landmark_stages.unsupported(q)
