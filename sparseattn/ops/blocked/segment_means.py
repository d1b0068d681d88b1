"""Means over segments of tokens in torch, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseattn.ops.blocked.plan import accumulate_dtype

_CHUNK_TOKENS = 1 << 10  # what is gathered for all heads stays in the cache


def forward(q: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return the means [B, H, m, D] of q [B, H, N, D], widely summed."""
    return sums(q, ids, counts.shape[1]) / counts.clamp(min=1)[:, None, :, None]


def sums(x: Tensor, ids: Tensor, count: int, is_hidden: Tensor | None = None) -> Tensor:
    """Return the sums [B, H, m, D] of x [B, H, N, D] over segments, widely summed.

    is_hidden: bool [B, 1 or H, N], what counts for none; None: nothing. All heads of a token are
    added at once, for which index_add_ hardly takes longer than for one.
    """
    wide = accumulate_dtype(x.dtype)
    found = x.new_zeros((x.shape[0], x.shape[1], count + 1, x.shape[3]), dtype=wide)
    for batch, some, places in _chunks(x, ids, count):
        rows = x[batch, :, some].to(wide)
        if is_hidden is not None:
            rows = rows.masked_fill(is_hidden[batch, :, some, None], 0)
        found[batch].index_add_(1, places, rows)
    return found[:, :, :count]  # without the spare row, of tokens of no segment


def backward(dq: Tensor, dmeans: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return dq [B, H, N, D] with the gradient through the means added."""
    out = torch.empty_like(dq)
    dmeans = dmeans / counts.clamp(min=1)[:, None, :, None]
    rows = torch.nn.functional.pad(dmeans, (0, 0, 0, 1))
    for batch, some, places in _chunks(dq, ids, counts.shape[1]):
        found = rows[batch].index_select(1, places)
        torch.add(dq[batch, :, some], found, out=out[batch, :, some])
    return out


def _chunks(q: Tensor, ids: Tensor, count: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Walk samples and their tokens: the sample, some tokens, and their rows, `count` for none."""
    for batch in range(q.shape[0]):
        for start in range(0, q.shape[2], _CHUNK_TOKENS):
            some = slice(start, min(start + _CHUNK_TOKENS, q.shape[2]))
            places = ids[batch if len(ids) > 1 else 0, some]
            yield batch, some, places.where(places >= 0, count)
