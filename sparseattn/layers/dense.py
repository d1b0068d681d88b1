"""Dense attention as the layers need it, attention weights, and keys that all queries see."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend to all keys; o [B, H, Nq, D].

    Args:
        q: [B, H, Nq, D].
        k: [B, G, Nk, D]; H is a multiple of G.
        v: [B, G, Nk, D].
        key_mask: bool [B, Nk]; True = take part. A key that does not may hold NaN.
        bias: added to the logits, broadcastable to [B, H, Nq, Nk].
        scale: multiplies q . k; default D ** -0.5.
        dropout: share of the attention weights that is dropped.
    """
    mask = bias if bias is None else bias.to(q.dtype)
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        shown = key_mask[:, None, None]
        mask = shown if mask is None else mask.masked_fill(~shown, -math.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return softmax(scale * q k + bias), [B, H, Nq, Nk]; a row of -inf gives zeros."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = torch.where(bias == -math.inf, -math.inf, logits + bias)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0).to(q.dtype)


def with_extra_keys(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> Tensor:
    """Add keys that every query sees to an attention of result `out` and log-sum `lse`.

    k and v are the extra keys and values [B, H, E, D]. The two softmaxes become one:
    o = exp(lse - t) out + sum_e exp(s_e - t) v_e with t = log(exp(lse) + sum_e exp(s_e)).
    """
    logits = (q @ k.mT).to(lse.dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    total = torch.logaddexp(lse, logits.logsumexp(-1))[..., None]
    share = (lse[..., None] - total).exp().to(out.dtype)
    return out * share + (logits - total).exp().to(out.dtype) @ v.to(out.dtype)
