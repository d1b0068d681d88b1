"""Which tokens of a sample are kept, as lists of a size that depends on shapes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.constants import PAD_INDEX


class TokenSelection(NamedTuple):
    """The kept tokens, in both directions. S is 1, or one selection for each key head.

    tokens  [B, S, K]  int32: the token of each slot, ascending; PAD_INDEX in slots left over
    slots   [B, S, N]  int32: the slot of each token; PAD_INDEX for a token that was dropped
    """

    tokens: Tensor
    slots: Tensor


Keep = int | tuple[int, int]  # a count, or a fraction as numerator and denominator


def select_tokens(
    saliency: Tensor,
    keep: Keep,
    key_mask: Tensor | None = None,
    forced: Tensor | None = None,
    threshold: float | None = None,
) -> TokenSelection:
    """Select the `keep` tokens of highest saliency, forced ones first, ties to the lowest index.

    Nothing waits for the device and nothing is differentiable.

    Args:
        saliency: floating point [B, S, N]. A token whose saliency is not above 0, or NaN, or below
            the threshold, is dropped.
        keep: how many tokens at most, or which share of the tokens that key_mask shows, rounded up.
        key_mask: bool [B, N]: False drops a token, forced or not.
        forced: bool [B or 1, N]: tokens that are kept whatever their saliency is, as many as fit.
        threshold: the least saliency that is kept.
    """
    saliency = saliency.detach()
    num_tokens = saliency.shape[2]
    capacity = keep_capacity(keep, num_tokens)
    eligible = saliency > 0 if threshold is None else (saliency > 0) & (saliency >= threshold)
    rank = saliency.masked_fill(~eligible, -math.inf)
    if forced is not None:
        rank = rank.masked_fill(forced[:, None], math.inf)
    if key_mask is not None:
        rank = rank.masked_fill(~key_mask[:, None], -math.inf)
    if capacity == 0:
        tokens = rank.new_empty((*rank.shape[:2], 0), dtype=torch.int32)
        return TokenSelection(tokens, torch.full_like(rank, PAD_INDEX, dtype=torch.int32))
    best = rank.topk(capacity, sorted=True).values
    limit = None
    if key_mask is not None and isinstance(keep, tuple):
        limit = (key_mask.sum(-1) * keep[0] + keep[1] - 1) // keep[1]
        if forced is not None:
            limit = torch.maximum(limit, (forced & key_mask).sum(-1)).clamp(max=capacity)
        limit = limit[:, None, None]
        last = (limit - 1).clamp(min=0).expand(*rank.shape[:2], 1)
        best = best.gather(-1, last).masked_fill(limit == 0, math.inf)
    return _both_directions(
        _highest(rank, best[..., -1:], capacity if limit is None else limit), capacity
    )


def _highest(rank: Tensor, bar: Tensor, count: Tensor | int) -> Tensor:
    """Return bool like `rank`: the `count` highest of every line, whose least is `bar`."""
    above, level = rank > bar, rank == bar
    room = count - above.sum(-1, keepdim=True)
    return (above | (level & (level.cumsum(-1) <= room))) & (rank > -math.inf)


def keep_capacity(keep: Keep, num_tokens: int) -> int:
    """Return how many slots a selection of `num_tokens` tokens has."""
    if isinstance(keep, tuple):
        return -(-num_tokens * keep[0] // keep[1])
    return keep if keep < num_tokens else num_tokens


def _both_directions(kept: Tensor, capacity: int) -> TokenSelection:
    """Return the lists of bool [B, S, N], of which no line keeps more than `capacity`."""
    running = kept.cumsum(-1, dtype=torch.int32)
    slots = torch.where(kept, running - 1, PAD_INDEX)
    ranks = torch.arange(1, capacity + 1, dtype=torch.int32, device=kept.device)
    ranks = ranks.expand(*kept.shape[:2], -1).contiguous()
    tokens = torch.searchsorted(running, ranks, out_int32=True)
    tokens = torch.where(tokens < kept.shape[2], tokens, PAD_INDEX)
    return TokenSelection(tokens, slots)
