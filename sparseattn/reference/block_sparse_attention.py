"""What block-sparse attention means. It goes through the token mask and never through a list."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseattn.structures.block_mask import BlockMask


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    key_bias: Tensor | None,
    block_gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Nq, D] and the natural-log lse [B, H, Nq], both in the dtype of q.

    A bias or gate of -inf hides its keys. A query that sees nothing gets o = 0, lse = -inf and
    zero gradients; what a hidden key or such a query holds, even NaN, reaches nobody.
    """
    if mask.k_len == 0:
        nothing = q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0)
        for empty in (k, v, key_bias, block_gate):  # sums of nothing: 0, with a gradient
            nothing = nothing if empty is None else nothing + empty.sum().to(q.dtype)
        return nothing, nothing.sum(-1) - math.inf
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = mask.to_dense().expand(q.shape[0], q.shape[1], -1, -1)
    logits_bias = q.new_zeros(())
    if key_bias is not None:
        present = (key_bias != -math.inf).expand(-1, q.shape[1], -1)
        k = k.where(present[..., None], 0)
        v = v.where(present[..., None], 0)
        visible = visible & present[:, :, None]
        logits_bias = logits_bias + key_bias[:, :, None].to(q.dtype)
    if block_gate is not None:
        gate = block_gate.repeat_interleave(mask.block_size[0], 2)[:, :, : mask.q_len]
        gate = gate.repeat_interleave(mask.block_size[1], 3)[..., : mask.k_len]
        visible = visible & (gate != -math.inf)
        logits_bias = logits_bias + gate.to(q.dtype)
    sees = visible.any(-1, keepdim=True)
    q = q.where(sees, 0)
    logits = (q @ k.mT) * scale + logits_bias
    logits = logits.masked_fill(~visible, -math.inf)
    weights = logits.masked_fill(~sees, 0).softmax(-1).masked_fill(~visible, 0)
    lse = logits.masked_fill(~sees, 0).logsumexp(-1).masked_fill(~sees[..., 0], -math.inf)
    return weights @ v, lse
