"""Landmark attention in torch: both stages in chunks that fit the cache, backward recomputing.

The long side (keys in stage 1, queries in stage 2) is walked a chunk of a few heads at a time, in
memory that the chunks use in turn; weights of all tokens at once never exist. Sums run in the order
of the chunks, and the chunks follow from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseattn.ops.blocked import segment_means
from sparseattn.ops.blocked.plan import Scratch
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype

RELU_EPS = 1e-3  # added to the features of the ReLU kernel
_CHUNK_WEIGHTS = 1 << 18  # weights of a chunk: what keeps the buffers of one chunk in the cache


@dataclass(frozen=True)
class Weights:
    """How logits come from products: log weight(scale * product) + bias - square * |k|^2.

    Landmarks are scaled before the products: there are fewer of them than of anything else.
    """

    scale: float
    square: float
    is_relu: bool

    def logits(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Write log-weights of x [n, a, D] and y [n, b, D] without their bias to out [n, a, b].

        One of x and y is scaled already.
        """
        torch.bmm(x, y.mT, out=out)
        return out.clamp_(min=0).add_(RELU_EPS).log_() if self.is_relu else out

    def through(self, dlogits: Tensor, x: Tensor, y: Tensor, scratch: Scratch) -> Tensor:
        """Turn gradients of logits into gradients of scaled products, in place."""
        if self.is_relu:
            u = scratch.take("slope", tuple(dlogits.shape), dlogits.dtype)
            torch.bmm(x, y.mT, out=u)
            dlogits.mul_(u > 0).div_(u.clamp_(min=0).add_(RELU_EPS))
        return dlogits


@dataclass(frozen=True)
class _Slab:
    """A chunk of the long side: one batch entry, some heads, some tokens."""

    batch: int
    heads: slice
    tokens: slice

    def put(self, result: Tensor, x: Tensor, y: Tensor) -> None:
        """Write x @ y, widely summed, to the slab's part of result [B, H, N, D]."""
        part = result[self.batch, self.heads, self.tokens]
        if part.dtype == x.dtype and part.is_contiguous():
            torch.bmm(x, y, out=part)
        else:
            part.copy_(torch.bmm(x, y))

    def of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the slab's part of [B, H, N, ...] in `dtype`; B or H may be 1 and serve all."""
        return self.head(tensor)[:, self.tokens].to(dtype)

    def head(self, tensor: Tensor) -> Tensor:
        """Return all tokens of the slab's heads of [B, H, ...]."""
        part = tensor[self.batch if tensor.shape[0] > 1 else 0]
        if part.shape[0] == 1:
            return part.expand(self.heads.stop - self.heads.start, *part.shape[1:])
        return part[self.heads]


def _slabs(shape: tuple[int, int, int], landmarks: int) -> Iterator[list[_Slab]]:
    """Cut [B, H, N] into lists of chunks; a list has the same heads, its tokens in order."""
    batch, heads, length = shape
    if length == 0:
        return
    tokens = min(length, max(64, _CHUNK_WEIGHTS // max(1, landmarks)))
    together = max(1, _CHUNK_WEIGHTS // max(1, tokens * landmarks))
    for entry in range(batch):
        for head in range(0, heads, together):
            some = slice(head, min(head + together, heads))
            starts = range(0, length, tokens)
            yield [_Slab(entry, some, slice(i, min(i + tokens, length))) for i in starts]


def _columns(
    slab: _Slab, k: Tensor, v: Tensor, bias: Tensor | None, weights: Weights, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a chunk's keys and values, hidden ones zeroed, and what is added to its logits."""
    keys, values = slab.of(k, wide), slab.of(v, wide)
    shift = None
    if bias is not None:
        shift = slab.of(bias, wide)
        hidden = (shift == -math.inf)[..., None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    if weights.square:
        squares = keys.square().sum(-1).mul_(-weights.square)
        shift = squares if shift is None else squares.add_(shift)
    return keys, values, shift


def stage1(
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Weights,
    needs_peak: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return s [B, G, m, D], lse [B, G, m], peak [B, G] and sums [B, G, m, D], widely summed."""
    wide, count = wide_dtype(k.dtype), landmarks.shape[2]
    values = k.new_zeros((*k.shape[:2], count, k.shape[3]), dtype=wide)
    lse = k.new_full(values.shape[:3], -math.inf, dtype=wide)
    peak = k.new_full(values.shape[:2], -math.inf, dtype=wide)
    scratch = Scratch(k.device)
    for chunks in _slabs((*k.shape[:2], k.shape[2]), count):
        where = chunks[0].batch, chunks[0].heads
        rows = chunks[0].head(landmarks).to(wide) * weights.scale
        top = rows.new_full((*rows.shape[:2], 1), -math.inf)
        total, acc = torch.zeros_like(top), torch.zeros_like(rows)
        for slab in chunks:
            keys, some, shift = _columns(slab, k, v, bias, weights, wide)
            logits = scratch.take("logits", (*rows.shape[:2], keys.shape[1]), wide)
            weights.logits(logits, rows, keys)
            if needs_peak:
                shown = logits if bias is None else logits + _hidden(slab.of(bias, wide))
                peak[where] = torch.maximum(peak[where], shown.amax((1, 2)))
            if shift is not None:
                logits += shift[:, None]
            new = torch.maximum(top, logits.amax(-1, keepdim=True))
            safe = new.masked_fill(new == -math.inf, 0)
            p, fade = logits.sub_(safe).exp_(), (top - safe).exp_()
            total = total.mul_(fade).add_(p.sum(-1, keepdim=True))
            acc.mul_(fade).baddbmm_(p, some)
            top = new
        lse[where] = (top + total.log())[..., 0]
        values[where] = acc.div_(total.masked_fill(total == 0, 1))
    if segments is None:
        return values, lse, peak, None
    is_hidden = None if bias is None else bias == -math.inf
    return values, lse, peak, segment_means.sums(k, segments, count, is_hidden).contiguous()


def _with_spare_row(rows: Tensor) -> Tensor:
    """Return rows of segments with one of zeros behind them, for tokens of no segment."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def _rows_of(slab: _Slab, segments: Tensor, count: int) -> Tensor:
    """Return the segment of every token of a slab, `count` for none."""
    ids = segments[slab.batch, slab.tokens]
    return ids.where(ids >= 0, count)


def _hidden(bias: Tensor) -> Tensor:
    """Return -inf where a bias hides a key, else 0, shaped to be added to logits."""
    return torch.zeros_like(bias).masked_fill_(bias == -math.inf, -math.inf)[:, None]


def stage1_backward(
    dvalues: Tensor,
    dlse: Tensor | None,
    dsums: Tensor | None,
    values: Tensor,
    lse: Tensor,
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    weights: Weights,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return dlandmarks [B, G, m, D] or None, dk, dv, and dbias [B, G, N] or None."""
    wide = wide_dtype(k.dtype)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dlandmarks = torch.zeros_like(values) if needs[0] else None
    dbias = k.new_empty(k.shape[:3], dtype=wide) if needs[1] else None
    delta = (dvalues * values).sum(-1)
    delta = delta if dlse is None else delta - dlse
    # without segments a compiled backward hands on the zeros of an empty result
    dsums = None if dsums is None or segments is None else _with_spare_row(dsums)
    peak = lse.masked_fill(lse == -math.inf, math.inf)
    scratch = Scratch(k.device)
    for chunks in _slabs((*k.shape[:2], k.shape[2]), landmarks.shape[2]):
        rows, sent = chunks[0].head(landmarks).to(wide) * weights.scale, chunks[0].head(dvalues)
        row_peak, row_delta = chunks[0].head(peak)[:, None], chunks[0].head(delta)[:, None]
        for slab in chunks:
            where = slab.batch, slab.heads, slab.tokens
            keys, some, shift = _columns(slab, k, v, bias, weights, wide)
            shape = (*keys.shape[:2], rows.shape[1])
            p = weights.logits(scratch.take("logits", shape, wide), keys, rows).sub_(row_peak)
            if shift is not None:
                p += shift[..., None]
            p.exp_()  # [n, keys, m]
            slab.put(dv, p, sent)
            dp = scratch.take("dp", shape, wide)
            dz = torch.baddbmm(row_delta, some, sent.mT, beta=-1, out=dp).mul_(p)
            sums = dz.sum(-1, keepdim=True) if weights.square or dbias is not None else None
            if dbias is not None and sums is not None:
                dbias[where] = sums[..., 0]
            dz = weights.through(dz, keys, rows, scratch)
            dkeys = scratch.take("dkeys", tuple(keys.shape), wide)
            if dsums is not None and segments is not None:
                _of_segments(dsums[slab.batch, slab.heads], segments, slab, bias, dkeys)
                dkeys.baddbmm_(dz, rows)
            else:
                torch.bmm(dz, rows, out=dkeys)
            if weights.square and sums is not None:
                dkeys.addcmul_(sums, keys, value=-2 * weights.square)
            dk[where] = dkeys
            if dlandmarks is not None:
                dlandmarks[slab.batch, slab.heads].baddbmm_(dz.mT, keys, alpha=weights.scale)
    return dlandmarks, dk, dv, dbias


def _of_segments(
    dsums: Tensor, segments: Tensor, slab: _Slab, bias: Tensor | None, out: Tensor
) -> None:
    """Write for each key the gradient of its segment's sum, 0 for hidden keys and for none."""
    ids = _rows_of(slab, segments, dsums.shape[1] - 1)
    torch.index_select(dsums, 1, ids, out=out)
    if bias is not None:
        out.masked_fill_((slab.of(bias, bias.dtype) == -math.inf)[..., None], 0)


def stage2(
    q: Tensor,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    weights: Weights,
    has_floor: bool,
) -> Tensor:
    """Return o like q."""
    wide, count = wide_dtype(q.dtype), landmarks.shape[2]
    out = torch.empty_like(q)
    if count == 0:
        return out.zero_()
    group = q.shape[1] // max(1, values.shape[1])
    scratch = Scratch(q.device)
    for chunks in _slabs((q.shape[0], q.shape[1], q.shape[2]), count + has_floor):
        columns = _landmark_columns(chunks[0], landmarks, values, bias, group, weights.scale)
        for slab in chunks:
            p, total = _row_weights(slab.of(q, wide), columns, weights, has_floor, scratch)
            if total is None:
                slab.put(out, p, columns[1])
            else:
                made = torch.bmm(p, columns[1]).div_(total.masked_fill(total == 0, 1))
                out[slab.batch, slab.heads, slab.tokens] = made
    return out


_Columns = tuple[Tensor, Tensor, Tensor | None]


def _landmark_columns(
    slab: _Slab,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    group: int,
    scale: float,
) -> _Columns:
    """Return scaled landmarks, values and bias [n, 1, m] for the query heads of a slab."""
    wide = wide_dtype(landmarks.dtype)
    heads = range(slab.heads.start, slab.heads.stop)
    key_heads = [head // group for head in heads]

    def taken(tensor: Tensor) -> Tensor:
        part = tensor[slab.batch if tensor.shape[0] > 1 else 0].to(wide)
        if part.shape[0] == 1:
            return part.expand(len(key_heads), *part.shape[1:])
        return part if key_heads == list(range(part.shape[0])) else part[key_heads]

    shift = None if bias is None else taken(bias)[:, None]
    return taken(landmarks) * scale, taken(values), shift


def _row_weights(
    queries: Tensor, columns: _Columns, weights: Weights, has_floor: bool, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """Return weights p [n, tokens, m] of queries and what they are to be divided by, if by aught.

    Without a bias no row can be empty, and one pass of torch's softmax does it all.
    """
    landmarks, _, bias = columns
    count = landmarks.shape[1]
    p = scratch.take("logits", (*queries.shape[:2], count + has_floor), queries.dtype)
    if has_floor:
        plain = weights.logits(
            scratch.take("plain", (*queries.shape[:2], count), queries.dtype), queries, landmarks
        )
        shown = plain if bias is None else plain + _hidden(bias[:, 0, :count])
        p[..., :count] = plain
        p[..., count] = shown.amax(-1).add_(queries.square().sum(-1), alpha=weights.square)
    else:
        weights.logits(p, queries, landmarks)
    if bias is None and not has_floor:
        found = scratch.take("weights", tuple(p.shape), p.dtype)
        return torch.softmax(p, -1, out=found), None
    if bias is not None:
        p += bias
    top = p.amax(-1, keepdim=True)
    if bias is not None:
        top.masked_fill_(top == -math.inf, 0)
    p.sub_(top).exp_()
    return p, p.sum(-1, keepdim=True)


def stage2_backward(
    dout: Tensor,
    q: Tensor,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    weights: Weights,
    has_floor: bool,
    needs_landmarks: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return dq, dlandmarks [B, G, m, D] or None, and dvalues, dbias [B, G, m]."""
    wide, count = wide_dtype(q.dtype), landmarks.shape[2]
    dq = torch.empty_like(q)
    group = q.shape[1] // max(1, values.shape[1])
    shape = (*q.shape[:2], values.shape[2], q.shape[3])
    dvalues = q.new_zeros(shape, dtype=wide)
    dbias = q.new_zeros(shape[:3], dtype=wide)
    dlandmarks = q.new_zeros((*q.shape[:2], count, q.shape[3]), dtype=wide)
    scratch = Scratch(q.device)
    for chunks in _slabs((q.shape[0], q.shape[1], q.shape[2]), count + has_floor):
        columns = _landmark_columns(chunks[0], landmarks, values, bias, group, weights.scale)
        sums = [t[chunks[0].batch, chunks[0].heads] for t in (dlandmarks, dvalues, dbias)]
        for slab in chunks:
            queries, sent = slab.of(q, wide), slab.of(dout, wide)
            p, total = _row_weights(queries, columns, weights, has_floor, scratch)
            if total is not None:
                sent = sent / total.masked_fill_(total == 0, 1)  # so that p need not be divided
            sums[1].baddbmm_(p.mT, sent)
            dp = torch.bmm(sent, columns[1].mT, out=scratch.take("dp", tuple(p.shape), wide))
            dz = dp.mul_(p)
            delta = dz.sum(-1, keepdim=True)
            dz.addcmul_(p, delta if total is None else delta.div_(total), value=-1)
            if bias is not None:
                sums[2] += dz.sum(1)
            plain = weights.through(dz[..., :count], queries, columns[0], scratch)
            if has_floor:
                dqueries = torch.bmm(plain, columns[0])
                dqueries.addcmul_(dz[..., count:], queries, value=2 * weights.square)
                dq[slab.batch, slab.heads, slab.tokens] = dqueries
            else:
                slab.put(dq, plain, columns[0])
            if needs_landmarks:
                sums[0].baddbmm_(plain.mT, queries, alpha=weights.scale)
    if group > 1:
        grouped = (t.unflatten(1, (-1, group)).sum(2) for t in (dlandmarks, dvalues, dbias))
        dlandmarks, dvalues, dbias = grouped
    return dq, dlandmarks if needs_landmarks else None, dvalues, dbias
