"""The two stages of landmark attention as operators of torch, with autograd functions around them.

    stage1: lse_r = log sum_j exp(a_rj),  s_r = sum_j exp(a_rj - lse_r) v_j,
            a_rj = log weight(scale * w_r.k_j) + b_j - square * |k_j|^2,
            sums_r = sum of the k_j of segment r
    stage2: o_i = sum_r softmax_r(log weight(scale * q_i.w_r) + b_r) s_r

Each is differentiable by itself, so that an op may put anything between them. Saved for the
backward are the inputs and what is of the size of the landmarks; nothing of N * m.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops import dispatch, landmark_flops
from sparseattn.ops.blocked import landmark_attention as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.once import differentiated_once

_library = torch.library.Library("sparseattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_FIRST = "Tensor landmarks, Tensor k, Tensor v, Tensor? key_bias, Tensor? segments, float scale, "
_FIRST += "float square, bool is_relu, "
_SECOND = "Tensor q, Tensor landmarks, Tensor values, Tensor? bias, float scale, float square, "
_SECOND += "bool is_relu, bool has_floor, "
_library.define(
    f"landmark_stage1({_FIRST} bool needs_peak, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "landmark_stage1_backward(Tensor dvalues, Tensor? dlse, Tensor? dsums, Tensor values, "
    f"Tensor lse, {_FIRST} bool needs_landmarks, bool needs_bias, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(f"landmark_stage2({_SECOND} str impl) -> Tensor", tags=_TAGS)
_library.define(
    f"landmark_stage2_backward(Tensor dout, {_SECOND} bool needs_landmarks, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_ops = torch.ops.sparseattn


def stage1(
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor | None = None,
    *,
    scale: float,
    square: float = 0.0,
    is_relu: bool = False,
    needs_peak: bool = False,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return s [B, G, m, D], lse [B, G, m], peak [B, G] and sums [B, G, m, D].

    peak, set with needs_peak, is max_rj scale * w_r.k_j over keys that are not hidden. sums, empty
    without segments, adds up the keys of each segment.

    Args:
        landmarks: [1 or B, 1 or G, m, D], dtype of k. Where H query heads have landmarks of their
            own and k has G heads, give them as [B, G, H / G * m, D].
        k, v: [B, G, N, D]; key_bias: float32 [B, 1 or G, N], natural log, -inf hides the key.
        segments: int32 [B, N], the segment of each key, from 0 to m - 1; -1 for none. A hidden key
            counts for none.
        scale, square, is_relu: the weight, see above; relu(x) + 0.001 in place of exp(x).
        impl: "triton" or "torch".

    All results are float32 (float64 for float64); no gradient flows through the peak. A landmark
    that sees no key has s = 0 and lse = -inf.
    """
    inputs = (landmarks, k, v, key_bias, segments)
    options = (scale, square, is_relu, needs_peak, impl)
    landmark_flops.register()
    if _wants_gradient(*inputs):
        return _Stage1.apply(*inputs, *options)
    return _ops.landmark_stage1.default(*inputs, *options)


def stage2(
    q: Tensor,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    square: float = 0.0,
    is_relu: bool = False,
    has_floor: bool = False,
    impl: str,
) -> Tensor:
    """Return o [B, H, N, D] like q.

    Args:
        q: [B, H, N, D].
        landmarks: [1 or B, 1 or G, m, D], dtype of q; H is a multiple of G.
        values: [B, G, m, D], any float dtype; rounded to the dtype of q on the Triton path.
        bias: float32 [B, G, m] or None, natural log, -inf hides the landmark; [1 or B, 1, m] if it
            needs no gradient.
        has_floor: values and bias have one more entry, a column of logit
            max_r(scale * q_i.w_r) + square * |q_i|^2 + bias_m through whose maximum no gradient
            flows.
        scale, is_relu, impl: as in stage1.
    """
    inputs = (q, landmarks, values, bias)
    options = (scale, square, is_relu, has_floor, impl)
    landmark_flops.register()
    if _wants_gradient(*inputs):
        return _Stage2.apply(*inputs, *options)
    return _ops.landmark_stage2.default(*inputs, *options)


def hiding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bias [B, 1, N] of 0, and -inf where the mask [B, N] is False."""
    if mask is None:
        return None
    zero = torch.zeros((), dtype=wide_dtype(dtype), device=mask.device)
    return torch.where(mask[:, None], zero, -math.inf)


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    reasons = list(dispatch.triton_reasons(q.device))
    if q.dtype == torch.float64:
        reasons.append("dtype is float64; expected float32, float16 or bfloat16")
    head_dim = q.shape[3]
    if head_dim % 8 or not 16 <= head_dim <= 128:
        reasons.append(f"head dim is {head_dim}; expected a multiple of 8 from 16 to 128")
    return reasons


def choose(op: str, impl: str, q: Tensor) -> str:
    """Return the implementation that runs."""
    asked = impl == "triton" or (impl == "auto" and q.device.type == "cuda")
    return dispatch.choose(op, impl, q.device, unsupported(q) if asked else [])


def _wants_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


class _Stage1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, lse, peak, sums = _ops.landmark_stage1.default(*args)
        ctx.save_for_backward(values, lse, *args[:5])
        ctx.options = args[5:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak)
        return values, lse, peak, sums

    @staticmethod
    def backward(
        ctx: Any, dvalues: Tensor | None, dlse: Tensor | None, _: Any, dsums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        values, landmarks, key_bias = saved[0], saved[2], saved[5]
        if dvalues is None and dlse is None and dsums is None:
            return (None,) * len(needs)
        if dvalues is None:
            dvalues = torch.zeros_like(values)
        *options, _, impl = ctx.options
        dlandmarks, dk, dv, dbias = _ops.landmark_stage1_backward.default(
            dvalues, dlse, dsums, *saved, *options, needs[0], needs[3], impl
        )
        if needs[0]:
            dlandmarks = dlandmarks.sum_to_size(landmarks.shape).to(landmarks.dtype)
        if needs[3]:
            dbias = dbias.sum_to_size(key_bias.shape)
        found = _asked((dlandmarks, dk, dv, dbias), needs)
        return *differentiated_once("landmark stage 1", found, dvalues, dlse, dsums, *saved), *(
            None,
        ) * 6


class _Stage2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:4])
        ctx.options = args[4:]
        return _ops.landmark_stage2.default(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        _, landmarks, values, _ = saved
        *options, impl = ctx.options
        dq, dlandmarks, dvalues, dbias = _ops.landmark_stage2_backward.default(
            dout, *saved, *options, needs[1], impl
        )
        if needs[1]:
            dlandmarks = dlandmarks.sum_to_size(landmarks.shape).to(landmarks.dtype)
        found = _asked((dq, dlandmarks, dvalues.to(values.dtype), dbias), needs)
        return *differentiated_once("landmark stage 2", found, dout, *saved), *(None,) * 5


def _asked(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs[:4], strict=True))


# -- the operators -----------------------------------------------------------------------------


def _stage1(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, scale, square, is_relu, needs_peak, impl = args
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import stage1 as kernels

        found = kernels.forward(*args[:-1])
    else:
        with torch.no_grad(), torch.autocast(inputs[1].device.type, enabled=False):
            rest = (blocked.Weights(scale, square, is_relu), needs_peak)
            found = blocked.stage1(*(*inputs, *rest))
    return *found[:3], _or_nothing(found[3], found[0])


def _stage1_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, scale, square, is_relu, needs_landmarks, needs_bias, impl = args
    needs = (needs_landmarks, needs_bias)
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import stage1 as kernels

        found = kernels.backward(*(*args[:-3], needs))
    else:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            rest = (blocked.Weights(scale, square, is_relu), needs)
            found = blocked.stage1_backward(*(*inputs, *rest))
    dlandmarks, dk, dv, dbias = found
    return _or_nothing(dlandmarks, inputs[0]), dk, dv, _or_nothing(dbias, inputs[0])


def _stage2(*args: Any) -> Tensor:
    *inputs, scale, square, is_relu, has_floor, impl = args
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import stage2 as kernels

        return kernels.forward(*args[:-1])
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        rest = (blocked.Weights(scale, square, is_relu), has_floor)
        return blocked.stage2(*(*inputs, *rest))


def _stage2_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, scale, square, is_relu, has_floor, needs_landmarks, impl = args
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import stage2 as kernels

        found = kernels.backward(*args[:-1])
    else:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            rest = (blocked.Weights(scale, square, is_relu), has_floor, needs_landmarks)
            found = blocked.stage2_backward(*(*inputs, *rest))
    dq, dlandmarks, dvalues, dbias = found
    return dq, _or_nothing(dlandmarks, dvalues), dvalues, dbias


def _or_nothing(gradient: Tensor | None, dvalues: Tensor) -> Tensor:
    """Operators return tensors: an empty one stands for a gradient nobody asked for."""
    return dvalues.new_empty(0) if gradient is None else gradient


def _stage1_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    landmarks, k, segments = args[0], args[1], args[4]
    shape, wide = (k.shape[0], k.shape[1], landmarks.shape[2]), wide_dtype(k.dtype)
    values = k.new_empty((*shape, k.shape[3]), dtype=wide)
    sums = values.new_empty(0) if segments is None else torch.empty_like(values)
    return values, values.new_empty(shape), values.new_empty(shape[:2]), sums


def _stage1_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, k, v = args[3], args[6], args[7]
    needs_landmarks, needs_bias = args[-3:-1]
    dlandmarks = torch.empty_like(values) if needs_landmarks else values.new_empty(0)
    dbias = values.new_empty(k.shape[:3] if needs_bias else (0,))
    return dlandmarks, torch.empty_like(k), torch.empty_like(v), dbias


def _stage2_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


def _stage2_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, landmarks, values, needs_landmarks = args[1], args[2], args[3], args[-2]
    dvalues = q.new_empty(values.shape, dtype=wide_dtype(q.dtype))
    shape = (*values.shape[:2], landmarks.shape[2], q.shape[3]) if needs_landmarks else (0,)
    return (
        torch.empty_like(q),
        dvalues.new_empty(shape),
        dvalues,
        dvalues.new_empty(dvalues.shape[:3]),
    )


for _name, _run, _fake in (
    ("landmark_stage1", _stage1, _stage1_fake),
    ("landmark_stage1_backward", _stage1_backward, _stage1_backward_fake),
    ("landmark_stage2", _stage2, _stage2_fake),
    ("landmark_stage2_backward", _stage2_backward, _stage2_backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"sparseattn::{_name}", _fake, lib=_library)
