"""What attention to the most salient tokens means: dense attention with all others at -inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def saliency_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saliency: Tensor,
    keep: int | tuple[int, int],
    key_mask: Tensor | None,
    forced: Tensor | None,
    threshold: float | None,
    log_bias: bool,
    scale: float,
    prune_queries: bool,
    passthrough: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Nq, D] in the dtype of q, and which tokens were kept, bool [B, S, Nk].

    saliency: [B, S, Nk], S being 1 or G. keep: a count, or a fraction as (numerator, denominator).
    What a dropped token holds, even NaN, reaches nobody.
    """
    kept = kept_tokens(saliency, keep, key_mask, forced, threshold)
    heads, key_heads = q.shape[1], k.shape[1]
    if k.shape[2] == 0 or heads == 0:
        nothing = (k.sum() + v.sum() + saliency.sum()).to(q.dtype)  # 0, with a gradient
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0) + nothing, kept
    visible = kept.repeat_interleave(heads // kept.shape[1], 1)  # [B, H, Nk]
    group = heads // key_heads
    k, v = (t.repeat_interleave(group, 1).where(visible[..., None], 0) for t in (k, v))
    sees = visible.any(-1)[..., None, None]
    asks = visible[..., None] if prune_queries else sees
    logits = (q.where(asks, 0) @ k.mT) * scale
    if log_bias:
        trusted = kept if forced is None else kept & ~forced[:, None]
        bias = saliency.where(trusted, 1).to(q.dtype).log()
        logits = logits + bias.repeat_interleave(heads // bias.shape[1], 1)[:, :, None]
    logits = logits.masked_fill(~visible[:, :, None], -math.inf).masked_fill(~sees, 0)
    weights = logits.softmax(-1).masked_fill(~visible[:, :, None], 0)
    out = weights @ v
    if prune_queries:
        instead = torch.zeros_like(out) if passthrough is None else passthrough
        out = torch.where(visible[..., None], out, instead)
    return out, kept


def kept_tokens(
    saliency: Tensor,
    keep: int | tuple[int, int],
    key_mask: Tensor | None,
    forced: Tensor | None,
    threshold: float | None,
) -> Tensor:
    """Return which tokens are kept, bool [B, S, Nk], found one sample and token at a time."""
    kept = torch.zeros_like(saliency, dtype=torch.bool)
    values = saliency.detach().cpu().tolist()
    least = 0.0 if threshold is None else float(saliency.new_tensor(threshold))
    num_tokens = saliency.shape[2]
    capacity = keep if isinstance(keep, int) else -(-num_tokens * keep[0] // keep[1])
    for b, sample in enumerate(values):
        shown = [True] * num_tokens if key_mask is None else key_mask[b].tolist()
        first = [False] * num_tokens
        if forced is not None:
            first = forced[b if forced.shape[0] > 1 else 0].tolist()
        count = keep if isinstance(keep, int) else -(-sum(shown) * keep[0] // keep[1])
        for s, line in enumerate(sample):
            tokens = [n for n, value in enumerate(line) if shown[n]]
            mine = [n for n in tokens if first[n]]
            rest = [n for n in tokens if not first[n] and line[n] > 0 and line[n] >= least]
            rest.sort(key=lambda n: -line[n])  # stable: ties to the lowest token
            for n in [*mine, *rest][: max(count, min(len(mine), capacity))]:
                kept[b, s, n] = True
    return kept
