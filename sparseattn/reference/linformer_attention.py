"""What Linformer attention means: softmax attention to projected keys and values."""

from __future__ import annotations

import torch
from torch import Tensor


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Return o [B, H, Nq, D]. Masked columns of the projections count as 0, whatever keys hold."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    if key_mask is not None:
        k, v = (t.where(key_mask[:, None, :, None], 0) for t in (k, v))
    k, v = torch.matmul(key_projection, k), torch.matmul(value_projection, v)  # [B, G, m, D]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return (q @ k.mT * scale).softmax(-1) @ v
