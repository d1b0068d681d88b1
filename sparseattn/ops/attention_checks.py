"""Checks that every op on q, k and v makes of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_qkv(op: str, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Check q [B, H, Nq, D], k and v [B, G, Nk, D]; return them as autocast wants them."""
    shapes = checks.Shapes(op)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("k", k, "B G Nk D")
    shapes.bind("v", v, "B G Nk D")
    heads, key_heads = q.shape[1], k.shape[1]
    if (key_heads == 0 and heads > 0) or (key_heads > 0 and heads % key_heads):
        raise ValueError(
            f"{op}: k has {key_heads} heads; expected a divisor of H, H={heads} (from q)"
        )
    if q.shape[3] == 0:
        raise ValueError(f"{op}: q {checks.describe(q)}; expected a head dim D >= 1")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.require_device(op, name, tensor, q.device, "q")
        checks.require_dtype(op, name, tensor, *DTYPES)
    q, k, v = dispatch.autocast_inputs(q, k, v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}; "
                f"expected the dtype of q, dtype={q.dtype} (from q)"
            )
    return q, k, v


def check_scale(op: str, scale: Any, q: Tensor) -> float:
    """Check the factor of q . k; return it, D ** -0.5 for None."""
    if scale is None:
        return q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale {checks.describe(scale)}; expected a float or None")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}; expected a finite float")
    return float(scale)


def check_key_mask(op: str, key_mask: Any, k: Tensor) -> None:
    """Check a bool key mask [B, Nk], or None."""
    if key_mask is None:
        return
    shapes = checks.Shapes(op)
    shapes.bind("k", k, "B G Nk D")
    shapes.bind("key_mask", key_mask, "B Nk")
    checks.require_dtype(op, "key_mask", key_mask, torch.bool)
    checks.require_device(op, "key_mask", key_mask, k.device, "k")
