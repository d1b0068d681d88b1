"""What Nystrom attention means: its three softmax matrices, every element in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseattn.reference.newton_schulz import newton_schulz


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    num_landmarks: int,
    iterations: int,
    scale: float,
    legacy_start: bool,
    residual: Tensor | None = None,
    grid: Sequence[int] | None = None,
) -> Tensor:
    """Return o [B, H, N, D] = F1 Z_t F3 v. ids [B, N] are the tokens' landmarks, -1 for none.

    residual [G, w, ...] are filters of the tokens, or of a grid at their end, to be added.

    A token of no landmark is no key; what it holds, even NaN, reaches nobody but its own o.
    """
    if q.shape[2] == 0:
        return q + (k.sum() + v.sum()) * 0  # sums of nothing, with a gradient
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    v = v.where((ids >= 0)[:, None, :, None], 0)
    shown = v
    v = v.repeat_interleave(group, 1)
    first, third, queries, keys, exists = softmaxes(q, k, ids, num_landmarks, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    middle = newton_schulz(
        queries.to(wide), keys.to(wide), (third @ v).to(wide), exists, iterations, scale,
        legacy_start,
    )  # fmt: skip
    out = first @ middle.to(q.dtype)
    if residual is None:
        return out
    return out + _filtered(shown, residual.to(v.dtype), grid).repeat_interleave(group, 1)


def _filtered(v: Tensor, residual: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Return the sum of shifted values [B, G, N, D], a weight for each shift; zeros beyond."""
    axes = (v.shape[2],) if residual.dim() == 2 or grid is None else tuple(grid)
    prefix = v.shape[2] - math.prod(axes)
    halves = [size // 2 for size in residual.shape[1:]]
    edges = [half for half in reversed(halves) for _ in range(2)]
    padded = torch.nn.functional.pad(v[:, :, prefix:].unflatten(2, axes), (0, 0, *edges))
    total = torch.zeros_like(v[:, :, prefix:]).unflatten(2, axes)
    shifts = itertools.product(*map(range, residual.shape[1:]))
    for weight, shift in zip(residual.flatten(1).unbind(1), shifts, strict=True):
        some = (slice(at, at + size) for at, size in zip(shift, axes, strict=True))
        part = padded[(slice(None), slice(None), *some)]
        total = total + weight.view(-1, *(1,) * (len(axes) + 1)) * part
    return torch.nn.functional.pad(total.flatten(2, -2), (0, 0, prefix, 0))


def softmaxes(
    q: Tensor, k: Tensor, ids: Tensor, num_landmarks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return F1 [B, H, N, m], F3 [B, H, m, N], both landmarks, and which [B, m] exist."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    shown = (ids >= 0)[:, None, :, None]  # [B, 1, N, 1]
    k = k.where(shown, 0).repeat_interleave(group, 1)
    member = torch.nn.functional.one_hot(ids.long() + 1, num_landmarks + 1)[..., 1:].mT
    count = member.sum(2, keepdim=True)[:, None]  # [B, 1, m, 1]
    wide = torch.promote_types(q.dtype, torch.float32)
    share = (member[:, None].to(wide) / count.clamp(min=1)).to(q.dtype)
    queries, keys = share @ q.where(shown, 0), share @ k  # [B, H, m, D]
    exists = count > 0
    first = _softmax(scale * q @ keys.mT, exists.mT)
    third = _softmax(scale * queries @ k.mT, shown.mT)
    return first, third, queries, keys, exists[:, 0, :, 0]


def _softmax(logits: Tensor, shown: Tensor) -> Tensor:
    """Return softmax over what is shown, 0 for a sample in which nothing is."""
    has_some = shown.any(-1, keepdim=True)
    return logits.masked_fill(~shown & has_some, -math.inf).softmax(-1).where(has_some, 0)
