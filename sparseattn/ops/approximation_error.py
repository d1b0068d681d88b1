"""How far an attention's result is from softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype

_OP = "approximation_error"
_BLOCK = 1 << 22  # weights held at once


@torch.no_grad()
def approximation_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Measure how far a result is from that of exact softmax attention, head by head.

        error_bh = |out_bh - o_bh|_2 / |o_bh|_2,   o_i = sum_j softmax_j(scale * q_i . k_j) v_j

    Args:
        q: [B, H, Nq, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, Nk, D], dtype of q; H is a multiple of G (grouped queries).
        v: [B, G, Nk, D], dtype of q.
        out: [B, H, Nq, D], floating point: what an approximation gave for them.
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        query_mask: bool [B, Nq]; True = counts. A query that does not may hold NaN.
        scale: multiplies q . k; default D ** -0.5.

    Returns:
        [B, H], float32 (float64 for float64); 0 where both are zero.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Notes:
        A query without keys has o = 0. Costs what exact attention costs, in float32 or wider, for
        a block of queries of one head at a time: some 4 million weights in memory, never Nq x Nk.
        Give a part of the queries, with their part of out, for an estimate. No gradient flows.
        Deterministic where torch's matrix products are.

    Reference:
        Attention Is All You Need (2017), arXiv:1706.03762, equation 1.
    """
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    scale = attention_checks.check_scale(_OP, scale, q)
    attention_checks.check_key_mask(_OP, key_mask, k)
    shapes = checks.Shapes(_OP)
    shapes.bind("q", q, "B H Nq D")
    shapes.bind("out", out, "B H Nq D")
    checks.require_floating(_OP, "out", out)
    checks.require_device(_OP, "out", out, q.device, "q")
    if query_mask is not None:
        shapes.bind("query_mask", query_mask, "B Nq")
        checks.require_dtype(_OP, "query_mask", query_mask, torch.bool)
        checks.require_device(_OP, "query_mask", query_mask, q.device, "q")
    squares = q.new_zeros((2, *q.shape[:2]), dtype=torch.float64)
    group = q.shape[1] // max(1, k.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        for sample in range(q.shape[0]):
            shown = None if key_mask is None else key_mask[sample]
            counts = None if query_mask is None else query_mask[sample]
            for head in range(q.shape[1]):
                keys, values = k[sample, head // group], v[sample, head // group]
                asked = (q[sample, head], out[sample, head])
                squares[:, sample, head] = _squares(*asked, keys, values, shown, counts, scale)
    error = (squares[0] / squares[1].masked_fill(squares[0] == 0, 1)).sqrt()
    return error.to(wide_dtype(q.dtype))


def _squares(
    q: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    shown: Tensor | None,
    counts: Tensor | None,
    scale: float,
) -> Tensor:
    """Return |out - o|^2 and |o|^2 of one head, over the queries that count."""
    if counts is not None:
        q, out = q[counts], out[counts]
    if shown is not None:
        k, v = k[shown], v[shown]
    wide = wide_dtype(q.dtype)
    k, v = k.to(wide), v.to(wide)
    total = torch.zeros(2, dtype=torch.float64, device=q.device)
    rows = max(1, _BLOCK // max(1, k.shape[0]))
    for first in range(0, q.shape[0], rows):
        logits = (q[first : first + rows].to(wide) @ k.mT).mul_(scale)
        exact = logits.softmax(-1) @ v  # without keys a product over nothing: 0
        difference = out[first : first + rows].to(wide) - exact
        total += torch.stack([x.double().square().sum() for x in (difference, exact)])
    return total
