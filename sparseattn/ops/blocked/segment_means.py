"""Sums and means over segments of tokens in torch, some thousand tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseattn.ops.blocked.plan import accumulate_dtype

_CHUNK_TOKENS = 1 << 13


def forward(q: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return the means [B, H, m, D] of q [B, H, N, D], widely summed."""
    wide = accumulate_dtype(q.dtype)
    sums = q.new_zeros((q.shape[0], q.shape[1], counts.shape[1], q.shape[3]), dtype=wide)
    for batch, some, own in _chunks(q, ids):
        add_rows(sums[batch], own, q[batch, :, some].to(wide))
    return sums.div_(counts.clamp(min=1)[:, None, :, None])


def add_rows(sums: Tensor, ids: Tensor, x: Tensor) -> None:
    """Add the rows of x [n, T, D] to those of sums [n, m, D] that ids [T] name; -1 names none.

    By a product with zeros and ones of the segments that are met: torch's index_add_ walks the
    tokens one by one on a CPU.
    """
    low, high = (int(end) for end in ids.aminmax())
    if high < 0:
        return
    if low < 0:
        x, low = x.masked_fill((ids < 0)[:, None], 0), 0  # they may hold NaN
    segments = torch.arange(low, high + 1, dtype=ids.dtype, device=ids.device)
    is_member = (ids == segments[:, None]).to(x.dtype)
    sums[:, low : high + 1] += torch.bmm(is_member.expand(len(x), -1, -1), x)


def backward(dq: Tensor, dmeans: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Return dq [B, H, N, D] with the gradient through the means added."""
    out = torch.empty_like(dq)
    rows = with_spare_row(dmeans / counts.clamp(min=1)[:, None, :, None])
    for batch, some, own in _chunks(dq, ids):
        found = rows[batch].index_select(1, spare_row(own, counts.shape[1]))
        torch.add(dq[batch, :, some], found, out=out[batch, :, some])
    return out


def with_spare_row(rows: Tensor) -> Tensor:
    """Return rows of segments with one of zeros behind them, for tokens of no segment."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def spare_row(ids: Tensor, count: int) -> Tensor:
    """Return the row of every token, `count` for those of no segment."""
    return ids.where(ids >= 0, count)


def _chunks(q: Tensor, ids: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Walk samples and their tokens: the sample, some tokens, and their segments."""
    for batch in range(q.shape[0]):
        for start in range(0, q.shape[2], _CHUNK_TOKENS):
            some = slice(start, min(start + _CHUNK_TOKENS, q.shape[2]))
            yield batch, some, ids[batch if len(ids) > 1 else 0, some]
