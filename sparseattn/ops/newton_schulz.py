"""The middle of Nystrom attention: a pseudo-inverse by Newton-Schulz steps, times values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, dispatch, landmark_flops, landmark_stages
from sparseattn.ops.blocked import newton_schulz as blocked
from sparseattn.ops.blocked.plan import accumulate_dtype
from sparseattn.ops.once import differentiated_once
from sparseattn.reference.newton_schulz import newton_schulz as reference

_OP = "newton_schulz"
_MOST_LANDMARKS = 128  # beyond them one program a head leaves most of a GPU idle
Impl = Literal["auto", "triton", "torch", "reference"]


def newton_schulz(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    iterations: int = 6,
    landmark_mask: Tensor | None = None,
    scale: float | None = None,
    legacy_start: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Multiply values by an approximate pseudo-inverse of the landmarks' softmax matrix.

        out = Z_t values,    A = softmax(scale * queries @ keys.T)
        Z_0 = A.T / max_c sum_r A_rc
        Z_{i+1} = Z_i (13 I - Y (15 I - Y (7 I - Y))) / 4,    Y = A Z_i

    The t steps are the definition: an ill-conditioned A is far from inverted after six of them.

    Args:
        queries: [B, H, m, D], float32, float16, bfloat16 or float64: landmarks of the queries.
        keys: [B, H, m, D], dtype of queries: landmarks of the keys.
        values: [B, H, m, D], floating point.
        iterations: t, at least 1.
        landmark_mask: bool [B, m]; True = the landmark exists. Rows and columns of others are 0,
            and so are their results; they may not hold NaN.
        scale: multiplies queries @ keys.T; default D ** -0.5.
        legacy_start: divide Z_0 by the largest column sum of all samples and heads, as
            transformers and nystrom-attention do, for models trained with it. A sample then
            depends on its batch mates, wherever t steps do not converge.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1; at most
            128 landmarks, own start values), "torch" (any device), "reference" (naive,
            differentiable twice), or "auto": triton on CUDA where it can run, else torch.

    Returns:
        out [B, H, m, D], float32, or float64 for float64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A sample without landmarks gets 0 and zero gradients. All products are float32 whatever
        torch's switches allow, since TF32 and 16 bits break the recurrence, and autocast is off.
        Deterministic where torch's matrix products are; without legacy_start a sample does not
        depend on the values of its batch mates.
        Saved for the backward: the inputs. It makes the iterates anew, in 4 (t + 11) m'^2 bytes a
        head, with m' the power of two from m. Differentiable once, except with impl="reference".

    Reference:
        Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention (2021),
        arXiv:2102.03902, equation 11.
    """
    scale = _check(queries, keys, values, landmark_mask, iterations, scale, legacy_start)
    asked = impl == "triton" or (impl == "auto" and queries.device.type == "cuda")
    reasons = unsupported(queries, legacy_start=legacy_start) if asked else []
    chosen = dispatch.choose(_OP, impl, queries.device, reasons)
    inputs = (queries, keys, values)
    options = (landmark_mask, iterations, scale, legacy_start)
    if chosen == "reference":
        wide = accumulate_dtype(queries.dtype)
        queries, keys, values = (t.to(wide) for t in inputs)
        with torch.autocast(queries.device.type, enabled=False):
            return reference(queries, keys, values, *options)
    landmark_flops.register()
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    call = _NewtonSchulz.apply if wants_gradient else _op
    out: Tensor = call(*inputs, *options, chosen)
    return out


def unsupported(queries: Tensor, *, legacy_start: bool = False) -> list[str]:
    """Return why the Triton kernels cannot run such landmarks (empty: they can)."""
    reasons = landmark_stages.unsupported(queries)
    if queries.shape[2] > _MOST_LANDMARKS:
        reasons.append(f"m is {queries.shape[2]}; expected at most {_MOST_LANDMARKS} landmarks")
    if legacy_start:
        reasons.append("legacy_start is True; expected False: programs do not know other heads")
    return reasons


def _check(
    queries: Any, keys: Any, values: Any, mask: Any, iterations: Any, scale: Any, legacy: Any
) -> float:
    shapes = checks.Shapes(_OP)
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        shapes.bind(name, tensor, "B H m D")
        checks.require_device(_OP, name, tensor, queries.device, "queries")
    checks.require_dtype(_OP, "queries", queries, *attention_checks.DTYPES)
    checks.require_dtype(_OP, "keys", keys, queries.dtype)
    checks.require_floating(_OP, "values", values)
    if mask is not None:
        shapes.bind("landmark_mask", mask, "B m")
        checks.require_dtype(_OP, "landmark_mask", mask, torch.bool)
        checks.require_device(_OP, "landmark_mask", mask, queries.device, "queries")
    checks.require_int(_OP, "iterations", iterations, low=1)
    checks.require_bool(_OP, "legacy_start", legacy)
    return attention_checks.check_scale(_OP, scale, queries)


# -- the operators -----------------------------------------------------------------------------

_library = torch.library.Library("sparseattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_ARGUMENTS = "Tensor queries, Tensor keys, Tensor values, Tensor? landmark_mask, "
_ARGUMENTS += "int iterations, float scale, bool legacy_start, str impl"
_library.define(f"newton_schulz({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(
    f"newton_schulz_backward(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)
_op = torch.ops.sparseattn.newton_schulz.default
_op_backward = torch.ops.sparseattn.newton_schulz_backward.default


class _NewtonSchulz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:4])
        ctx.options = args[4:]
        return _op(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = _op_backward(dout, *saved, *ctx.options)
        gradients = tuple(
            g.to(t.dtype) if need else None
            for g, t, need in zip(found, saved, ctx.needs_input_grad, strict=False)
        )
        return *differentiated_once(_OP, gradients, dout, *saved), *(None,) * 5


def _forward(*args: Any) -> Tensor:
    *inputs, legacy_start, impl = args
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import newton_schulz as kernels

        return kernels.forward(*inputs)
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return blocked.forward(*(*inputs, legacy_start))


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, legacy_start, impl = args
    if impl == "triton":
        from sparseattn.kernels.landmark_attention import newton_schulz as kernels

        return kernels.backward(*inputs)
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        return blocked.backward(*(*inputs, legacy_start))


def _forward_fake(queries: Tensor, _: Tensor, values: Tensor, *__: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=accumulate_dtype(queries.dtype))


def _backward_fake(dout: Tensor, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = dout.new_empty(dout.shape, dtype=accumulate_dtype(queries.dtype))
    return found, torch.empty_like(found), torch.empty_like(found)


for _name, _run, _fake in (
    ("newton_schulz", _forward, _forward_fake),
    ("newton_schulz_backward", _backward, _backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"sparseattn::{_name}", _fake, lib=_library)
