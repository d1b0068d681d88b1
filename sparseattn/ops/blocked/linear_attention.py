"""Linear attention in torch: sums over chunks of tokens, features made anew in the backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.ops.blocked.plan import settle_exp

_CHUNK = 1 << 18  # numbers of a chunk of tokens: what keeps its features in the cache


def _feature(x: Tensor, feature_map: str) -> Tensor:
    """Return elu(x) + 1, max(x, 0) or x, in memory that may be written.

    The first is exp(min(x, 0)) + max(x, 0): adding 1 to expm1(x) would round small features to
    multiples of the last bit of 1, that of -17 to 0.
    """
    if feature_map == "elu":
        settle_exp()
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))
    return x.relu() if feature_map == "relu" else x.clone()


def _through(dx: Tensor, feature: Tensor, feature_map: str) -> Tensor:
    """Multiply a gradient by the slope of the map, in place: elu(x) + 1 has its value below 1."""
    if feature_map == "elu":
        return dx.mul_(feature.clamp(max=1))
    return dx.mul_(feature > 0) if feature_map == "relu" else dx


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Cut [B, H, N, D] into (batch entry, tokens)."""
    batch, heads, length, head_dim = x.shape
    step = max(64, _CHUNK // max(1, heads * head_dim))
    for entry in range(batch if heads else 0):
        for start in range(0, length, step):
            yield entry, slice(start, min(start + step, length))


def _hidden(key_mask: Tensor | None, entry: int, tokens: slice) -> Tensor | None:
    return None if key_mask is None else ~key_mask[entry, tokens, None]


def _shown(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x if hidden is None else x.masked_fill(hidden, 0)


def sums(k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str) -> Tensor:
    """Return S and z as [B, G, D, D + 1]: sum f(k_j) v_j^T, and sum f(k_j) in the last column."""
    wide, head_dim = wide_dtype(k.dtype), k.shape[3]
    total = k.new_zeros((*k.shape[:2], head_dim, head_dim + 1), dtype=wide)
    for entry, tokens in _chunks(k):
        hidden = _hidden(key_mask, entry, tokens)
        keys = _shown(k[entry, :, tokens].to(wide), hidden)
        feature = _shown(_feature(keys, feature_map), hidden)
        values = _shown(v[entry, :, tokens].to(wide), hidden)
        total[entry, ..., :head_dim].baddbmm_(feature.mT, values)
        total[entry, ..., head_dim] += feature.sum(1)
    return total


def _vanishes(below: Tensor) -> Tensor:
    """Say which denominators are 0, or so small that their inverse is none."""
    return below.abs() < torch.finfo(below.dtype).tiny


def _state(total: Tensor, entry: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return S [H, D, D] and z [H, D, 1] for the query heads of a batch entry."""
    state = total[entry].repeat_interleave(heads // max(1, total.shape[1]), 0)
    return state[..., :-1], state[..., -1:]


def forward(q: Tensor, total: Tensor, feature_map: str) -> Tensor:
    """Return o like q; 0 where the denominator is 0."""
    out = torch.empty_like(q)
    for entry, tokens in _chunks(q):
        S, z = _state(total, entry, q.shape[1])
        feature = _feature(q[entry, :, tokens].to(total.dtype), feature_map)
        below = feature @ z
        is_zero = _vanishes(below)
        above = torch.bmm(feature, S).div_(below.masked_fill(is_zero, 1))
        out[entry, :, tokens] = above.masked_fill_(is_zero, 0).to(out.dtype)
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    total: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide, group = total.dtype, q.shape[1] // max(1, k.shape[1])
    dtotal = torch.zeros_like(total)
    for entry, tokens in _chunks(q):
        S, z = _state(total, entry, q.shape[1])
        feature = _feature(q[entry, :, tokens].to(wide), feature_map)
        below = feature @ z
        is_zero = _vanishes(below)
        inverse = below.masked_fill_(is_zero, 1).reciprocal_().masked_fill_(is_zero, 0)
        sent = dout[entry, :, tokens].to(wide) * inverse
        dfeature = torch.bmm(sent, S.mT)
        weight = (dfeature * feature).sum(-1, keepdim=True).mul_(inverse).neg_()
        dfeature.addcmul_(weight, z.mT)
        dq[entry, :, tokens] = _through(dfeature, feature, feature_map).to(dq.dtype)
        parts = torch.cat((torch.bmm(feature.mT, sent), feature.mT @ weight), -1)
        dtotal[entry] += parts.unflatten(0, (-1, group)).sum(1)
    for entry, tokens in _chunks(k):
        hidden = _hidden(key_mask, entry, tokens)
        dS, dz = dtotal[entry, ..., :-1], dtotal[entry, ..., -1:]
        keys = _shown(k[entry, :, tokens].to(wide), hidden)
        feature = _feature(keys, feature_map)
        values = _shown(v[entry, :, tokens].to(wide), hidden)
        dfeature = torch.bmm(values, dS.mT).add_(dz.mT)
        dkeys = _through(dfeature, feature, feature_map)
        dk[entry, :, tokens] = _shown(dkeys, hidden).to(dk.dtype)
        dv[entry, :, tokens] = _shown(torch.bmm(feature, dS), hidden).to(dv.dtype)
    return dq, dk, dv
