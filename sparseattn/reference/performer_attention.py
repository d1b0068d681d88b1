"""What Performer attention means: explicit random features, every one of every token in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELU_EPS = 1e-3


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str,
    key_mask: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """Return o [B, H, Nq, D]: sum_j a_ij v_j / sum_j a_ij with a_ij = sum_r phi_r(q_i) phi_r(k_j).

    A sample without keys gives 0; what a masked key holds, even NaN, reaches nobody.
    """
    if k.shape[2] == 0:
        empty = k.sum() + v.sum() + projection.sum() * 0  # sums of nothing, with a gradient
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0) + empty
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    shown = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    shown = (shown if key_mask is None else key_mask)[:, None, :, None]
    k, v = (t.where(shown, 0).repeat_interleave(group, 1) for t in (k, v))
    if kernel == "cosh":
        projection = torch.cat((projection, -projection))
    of_q, of_k = (math.sqrt(scale) * t @ projection.mT for t in (q, k))  # [B, H, N, m]
    if kernel == "relu":
        phi_q, phi_k = (t.relu() + RELU_EPS for t in (of_q, of_k))
    elif eps:
        phi_q, phi_k = eps_features(of_q, of_k, q, k, shown, scale, eps)
    else:
        return _two_softmaxes(of_q, of_k, k, v, shown, scale)
    phi_k = phi_k.where(shown, 0)
    above = phi_q @ (phi_k.mT @ v)
    below = phi_q @ phi_k.sum(2)[..., None]
    return above / below.where(shown.any(2, keepdim=True), 1)


def eps_features(
    of_q: Tensor, of_k: Tensor, q: Tensor, k: Tensor, shown: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the features exp(..) + eps of q and k, shifted by the largest w_r.x'."""
    peak = of_k.masked_fill(~shown, -math.inf).amax((2, 3), keepdim=True).detach()
    peak = peak.where(shown.any(2, keepdim=True), 0)
    phi_q = (of_q - scale / 2 * q.square().sum(-1, keepdim=True)) - of_q.amax(-1, True).detach()
    phi_k = (of_k - scale / 2 * k.square().sum(-1, keepdim=True)) - peak
    return phi_q.exp() + eps, phi_k.exp() + eps


def _two_softmaxes(
    of_q: Tensor, of_k: Tensor, k: Tensor, v: Tensor, shown: Tensor, scale: float
) -> Tensor:
    """Do the same for phi_r(x) = exp(w_r.x' - |x'|^2 / 2), whose exponents under- and overflow."""
    logits = of_k - scale / 2 * k.square().sum(-1, keepdim=True)
    seen = shown.any(2, keepdim=True)
    logits = logits.masked_fill(~shown & seen, -math.inf).mT  # [B, H, m, Nk]
    values = logits.softmax(-1) @ v
    out = (of_q + logits.logsumexp(-1)[:, :, None]).softmax(-1) @ values
    return out.where(seen, 0)
