"""Performer (FAVOR+) attention: softmax attention through random features, linear in the tokens."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, landmark_stages, sharded
from sparseattn.reference.performer_attention import performer_attention as reference

_OP = "performer_attention"
_KERNELS = ("softmax", "cosh", "relu")
Kernel = Literal["softmax", "cosh", "relu"]
Impl = Literal["auto", "triton", "torch", "reference"]


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: Kernel = "softmax",
    key_mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Attend through m random features: linear in the number of tokens, no Nq x Nk, no N x m.

        o_i = sum_j a_ij v_j / sum_j a_ij,   a_ij = sum_r phi_r(q_i) phi_r(k_j)
        with x' = sqrt(scale) x:
        softmax: phi_r(x) = exp(w_r.x' - |x'|^2 / 2)      cosh: the same for w_r and for -w_r
        relu:    phi_r(x) = max(w_r.x', 0) + 0.001

    The softmax and cosh kernels estimate attention with exp(scale * q.k) without bias, and are
    computed as two softmaxes, first of the features over the keys and then of the queries over the
    features: nothing overflows, and no constant has to be added for that.

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        projection: [m, D], floating point, rounded to the dtype of q; its rows are the w_r, as
            orthogonal_features draws them.
        kernel: "softmax", "cosh" (2 m features) or "relu".
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        scale: multiplies q . k, > 0; default D ** -0.5.
        eps: for models trained with features exp(...) + eps, each side shifted by its largest
            w_r.x': 1e-4 in performer-pytorch, 1e-6 in the JAX original; "softmax" only. At
            ordinary input sizes such an eps outweighs most features; 0 leaves it out.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(N * m) memory, differentiable twice), or
            "auto": triton on CUDA where it can run, else torch.

    Returns:
        o [B, H, Nq, D], dtype and memory layout of q.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A sample whose keys are all masked gets o = 0 and zero gradients. Padding with key_mask
        gives what the shorter input gives.
        Deterministic: equal bits on every call, and a sample does not depend on the values of its
        batch mates. (With eps on a GPU, torch's own sums take part.)
        Exact gradients for q, k, v and projection; with eps none through the two maxima, as in the
        originals. Under autocast all are cast as scaled_dot_product_attention casts.
        DTensors sharded over batch and heads stay so; nothing is sent between ranks but the
        gradient of projection, which is equal on every rank.
        Saved for the backward: the inputs and 4 * B * G * m * (D + 1) bytes. Differentiable once,
        except with impl="reference".

    Reference:
        Rethinking Attention with Performers (2020), arXiv:2009.14794, lemma 1 and section 2.4.
    """
    if sharded.is_sharded(q, k, v):
        run = partial(performer_attention, kernel=kernel, scale=scale, eps=eps, impl=impl)
        beside = {"projection": (projection, 2)}
        return sharded.attend_without_pairs(_OP, run, (q, k, v), key_mask, beside)
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    projection = check_projection(projection, q)
    scale = check_scale(scale, q)
    check_kernel(kernel, eps)
    bias = _key_bias(k, key_mask)
    chosen = landmark_stages.choose(_OP, impl, q)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, v, projection, kernel, key_mask, scale, eps)
    if kernel == "cosh":
        projection = torch.cat((projection, -projection))
    landmarks = projection[None, None]
    root, is_relu = math.sqrt(scale), kernel == "relu"
    options: dict[str, Any] = {"scale": root, "is_relu": is_relu, "impl": chosen}
    values, lse, peak, _ = landmark_stages.stage1(
        landmarks, k, v, bias, square=0.0 if is_relu else scale / 2, needs_peak=eps > 0, **options
    )
    if eps:
        values, lse = _with_eps(values, lse, peak, v, key_mask, eps)
        options |= {"square": scale / 2, "has_floor": True}
    return landmark_stages.stage2(q, landmarks, values, lse, **options)


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    return landmark_stages.unsupported(q)


def _with_eps(
    values: Tensor, lse: Tensor, peak: Tensor, v: Tensor, key_mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return values and lse for features of keys that are exp(a - peak) + eps, with a floor.

    The floor is the column of the eps that is added to the features of queries.
    """
    if key_mask is None:
        count = lse.new_full((v.shape[0], 1, 1), v.shape[2])
        added = v.sum(2, dtype=lse.dtype)
    else:
        count = key_mask.sum(1, dtype=lse.dtype)[:, None, None]
        added = v.masked_fill(~key_mask[:, None, :, None], 0).sum(2, dtype=lse.dtype)
    largest = peak.masked_fill(peak == -math.inf, 0)[..., None]
    features = (lse - largest).exp()  # summed over keys, [B, G, m]
    below = features + eps * count
    above = features[..., None] * values + eps * added[:, :, None]
    below = torch.cat((below, eps * below.sum(2, keepdim=True)), 2)
    above = torch.cat((above, eps * above.sum(2, keepdim=True)), 2)
    is_empty = below == 0
    below = below.masked_fill(is_empty, 1)
    return above / below[..., None], below.log().masked_fill(is_empty, -math.inf)


def check_projection(projection: Any, q: Tensor) -> Tensor:
    """Check a projection [m, D]; return it in the dtype of q."""
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("projection", projection, "m D")
    checks.require_floating(_OP, "projection", projection)
    checks.require_device(_OP, "projection", projection, q.device, "q")
    if projection.shape[0] == 0:
        raise ValueError(
            f"{_OP}: projection {checks.describe(projection)}; expected m >= 1 features"
        )
    return projection.to(q.dtype)


def check_scale(scale: Any, q: Tensor) -> float:
    """Check a scale, whose root is taken; return it, D ** -0.5 for None."""
    scale = attention_checks.check_scale(_OP, scale, q)
    if scale <= 0:
        raise ValueError(f"{_OP}: scale is {scale}; expected a finite float > 0")
    return scale


def check_kernel(kernel: Any, eps: Any, op: str = _OP) -> None:
    """Check the name of a kernel, and an eps for it."""
    if kernel not in _KERNELS:
        options = ", ".join(repr(name) for name in _KERNELS)
        raise ValueError(f"{op}: kernel is {kernel!r}; expected one of {options}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps {checks.describe(eps)}; expected a float")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps is {eps}; expected a finite float >= 0")
    if eps and kernel != "softmax":
        raise ValueError(f"{op}: eps is {eps}; expected 0 with kernel={kernel!r}")


def _key_bias(k: Tensor, key_mask: Any) -> Tensor | None:
    """Check key_mask and return a bias [B, 1, Nk] in which a masked key has -inf."""
    attention_checks.check_key_mask(_OP, key_mask, k)
    return landmark_stages.hiding_bias(key_mask, k.dtype)
