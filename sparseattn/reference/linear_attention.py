"""What linear attention means: weights that are products of features of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

MAPS = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),  # elu(x) + 1, not rounded
    "relu": torch.relu,
    "identity": lambda x: x,
}


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, key_mask: Tensor | None
) -> Tensor:
    """Return o [B, H, Nq, D]; 0 where the denominator is 0."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    shown = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    shown = (shown if key_mask is None else key_mask)[:, None, :, None]
    k, v = (t.where(shown, 0).repeat_interleave(group, 1) for t in (k, v))
    phi_q, phi_k = MAPS[feature_map](q), MAPS[feature_map](k).where(shown, 0)
    above = phi_q @ (phi_k.mT @ v)
    below = phi_q @ phi_k.sum(2)[..., None]
    is_zero = below == 0
    return (above / below.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
