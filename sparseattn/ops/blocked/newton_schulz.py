"""The recurrence of newton_schulz in torch, for any number of landmarks and any start value.

Its products must not be rounded: where torch's switches let float32 products be TF32 or bfloat16,
they are made in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparseattn.ops.blocked.plan import accumulate_dtype

_CHUNK_WEIGHTS = 1 << 20  # elements of the matrices that are worked on at a time


def forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    iterations: int,
    scale: float,
    legacy_start: bool,
) -> Tensor:
    """Return Z_t values, [B, H, m, D], in the dtype of sums."""
    out = values.new_empty(values.shape, dtype=accumulate_dtype(queries.dtype))
    if out.numel() == 0:
        return out
    q, k, s = _wide(queries, keys, values)
    a = _softmax(q, k, mask, scale)
    norm, _ = _norms(a, values.shape[0], legacy_start)
    found = out.flatten(0, 1)
    for some in _chunks(a):
        z = a[some].mT / norm[some]
        for _ in range(iterations):
            z = z @ _polynomial(a[some], z)[2] / 4
        found[some] = (z @ s[some]).to(out.dtype)
    return out


def backward(
    dout: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    iterations: int,
    scale: float,
    legacy_start: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqueries, dkeys and dvalues [B, H, m, D], from iterates that are made anew."""
    shape, dtype = values.shape, accumulate_dtype(queries.dtype)
    if values.numel() == 0:
        empty = values.new_zeros(shape, dtype=dtype)
        return empty, empty.clone(), empty.clone()
    q, k, s = _wide(queries, keys, values)
    sent = dout.to(q.dtype).flatten(0, 1)
    a = _softmax(q, k, mask, scale)
    norm, share = _norms(a, shape[0], legacy_start)
    da, ds, dnorm = torch.zeros_like(a), torch.empty_like(s), torch.empty_like(norm)
    for some in _chunks(a):
        iterates = [a[some].mT / norm[some]]
        for _ in range(iterations):
            iterates.append(iterates[-1] @ _polynomial(a[some], iterates[-1])[2] / 4)
        ds[some] = iterates[-1].mT @ sent[some]
        dz = sent[some] @ s[some].mT
        for z in reversed(iterates[:-1]):
            dz = _step_back(dz, a[some], z, da[some])
        da[some] += dz.mT / norm[some]
        dnorm[some] = -(dz * iterates[0]).sum((1, 2), keepdim=True) / norm[some]
    if legacy_start:
        dnorm = dnorm.sum(0, keepdim=True)
    da.addcmul_(dnorm, share)
    dlogits = da.sub_((da * a).sum(-1, keepdim=True)).mul_(a).mul_(scale)
    found = (dlogits @ k, dlogits.mT @ q, ds)
    dqueries, dkeys, dvalues = (t.to(dtype).contiguous().view(shape) for t in found)
    return dqueries, dkeys, dvalues


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors [B * H, m, D] in the dtype of products."""
    dtype = accumulate_dtype(tensors[0].dtype)
    try:
        is_rounded = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer switches, one for each device and library
        is_rounded = True
    dtype = torch.float64 if is_rounded else dtype
    return tuple(tensor.to(dtype).flatten(0, 1) for tensor in tensors)


def _chunks(a: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // (a.shape[1] * a.shape[2]))
    return (slice(i, min(i + step, len(a))) for i in range(0, len(a), step))


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale * q @ k.T) [B * H, m, m], 0 in rows and columns that are masked."""
    logits = (q @ k.mT).mul_(scale)
    if mask is None:
        return logits.softmax(-1)
    shown = mask.repeat_interleave(len(q) // len(mask), 0)
    logits.masked_fill_(~shown[:, None], -math.inf)
    weights = logits.softmax(-1)  # NaN where a sample has no landmarks
    return weights.masked_fill_(~(shown[:, None] & shown[:, :, None]), 0)


def _norms(a: Tensor, batch: int, legacy_start: bool) -> tuple[Tensor, Tensor]:
    """Return what Z_0 is divided by [B * H, 1, 1], and how its gradient is shared by the columns.

    Equal columns share alike, as torch's amax has it; with legacy_start equal matrices do, too.
    """
    sums = a.sum(1, keepdim=True)  # of columns, [B * H, 1, m]
    norm = sums.amax(2, keepdim=True)
    share = (sums == norm).to(a.dtype)
    share /= share.sum(2, keepdim=True)
    if legacy_start:
        own, norm = norm, norm.amax(0, keepdim=True).expand_as(norm)
        is_largest = (own == norm).to(a.dtype)
        share *= is_largest / is_largest.sum(0, keepdim=True)
    return norm.masked_fill(norm == 0, 1), share


def _polynomial(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = a z, 15 I - y (7 I - y) and 13 I - y (15 I - y (7 I - y))."""
    y = a @ z
    second = torch.baddbmm(y, y, y, beta=-7)
    second.diagonal(dim1=1, dim2=2).add_(15)
    third = torch.bmm(y, second).neg_()
    third.diagonal(dim1=1, dim2=2).add_(13)
    return y, second, third


def _step_back(dz: Tensor, a: Tensor, z: Tensor, da: Tensor) -> Tensor:
    """Return the gradient of z from that of z (13 I - ...) / 4, and add to da."""
    y, second, third = _polynomial(a, z)
    dthird = torch.bmm(z.mT, dz).div_(4)
    dsecond = torch.bmm(y.mT, dthird).neg_()
    dy = torch.baddbmm(dsecond, dthird, second.mT, beta=-7, alpha=-1)
    dy.baddbmm_(dsecond, y.mT).baddbmm_(y.mT, dsecond)
    da.baddbmm_(dy, z.mT)
    return torch.bmm(dz, third.mT).div_(4).baddbmm_(a.mT, dy)
