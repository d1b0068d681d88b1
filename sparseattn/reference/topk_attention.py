"""What top-k attention means: blocks are pooled, scored and chosen one row at a time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
from torch import Tensor

from sparseattn.reference.block_sparse_attention import block_sparse_attention
from sparseattn.structures.block_mask import BlockMask


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    keep: int | float | Tensor,
    block_size: tuple[int, int],
    mode: str,
    pooling: str,
    always: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    gate: Tensor | None,
    scale: float,
) -> tuple[Tensor, BlockMask]:
    """Return o [B, H, Nq, D] in the dtype of q, and the mask of the chosen blocks.

    weights: of queries [B, Nq] and keys [B, Nk], >= 0, or None for 1; a token of weight 0 is not
    pooled. gate: [1 or H, 1, 1]. Scores are float32, or float64 for float64 inputs.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    pooled_q, has_queries = pool_blocks(q, weights[0], block_size[0], pooling)
    pooled_k, has_keys = pool_blocks(k, weights[1], block_size[1], pooling)
    scores = pooled_q @ pooled_k.repeat_interleave(group, 1).mT * scale
    present = (has_queries[:, None, :, None] & has_keys[:, None, None]).expand(scores.shape)
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    for place in itertools.product(*(range(size) for size in scores.shape[:3])):
        row = keep.expand(scores.shape[:3])[place].item() if isinstance(keep, Tensor) else keep
        kept[place][_choose(scores.detach()[place], present[place], row, mode)] = True
    if always is not None:
        kept = kept | always
    mask = BlockMask.from_dense(kept, q.shape[2], k.shape[2], block_size)
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=scores.dtype, device=q.device)
        bias = bias.masked_fill(~key_mask, -math.inf)[:, None]
    block_gate = None if gate is None else gate.to(scores.dtype) * scores
    return block_sparse_attention(q, k, v, mask, bias, block_gate, scale)[0], mask


def pool_blocks(x: Tensor, weights: Tensor | None, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return one vector a block, [B, H, L, D], 0 where no token weighs, and whether one does."""
    x = x if x.dtype == torch.float64 else x.float()
    if weights is None:
        weights = x.new_ones((x.shape[0], x.shape[2]))
    pooled = [x.new_zeros((*x.shape[:2], 0, x.shape[3]))]
    present = [torch.zeros((x.shape[0], 0), dtype=torch.bool, device=x.device)]
    for start in range(0, x.shape[2], block):
        part, weight = (t[..., start : start + block, :] for t in (x, weights[:, None, :, None]))
        used, total = weight > 0, weight.sum(2, keepdim=True)
        if kind == "max":
            first = part.masked_fill(~used, -math.inf).argmax(2, keepdim=True)
            value = part.gather(2, first)
        else:
            value = (part.where(used, 0) * weight).sum(2, keepdim=True) / total.where(total > 0, 1)
        pooled.append(value.where(total > 0, 0))
        present.append(used.any(2)[:, 0])
    return torch.cat(pooled, 2), torch.cat(present, 1)


def _choose(scores: Tensor, present: Tensor, keep: int | float, mode: str) -> list[int]:
    """Return the columns that one row keeps, best first."""
    ends = torch.finfo(scores.dtype)
    scores = scores.nan_to_num(nan=ends.min, posinf=ends.max, neginf=ends.min)
    values = scores.tolist()
    ranked = sorted(present.nonzero()[:, 0].tolist(), key=lambda column: (-values[column], column))
    if mode == "top_k":
        if isinstance(keep, float):
            keep = math.ceil(Fraction(keep).limit_denominator(10**6) * len(values))
        return ranked[: max(0, keep)]
    shares = scores.masked_fill(~present, -math.inf).softmax(-1).tolist()
    if mode == "threshold":
        return [c for at, c in enumerate(ranked) if at == 0 or shares[c] >= keep]
    chosen: list[int] = []
    for column in ranked:
        if chosen and sum(shares[c] for c in chosen) >= keep:
            break
        chosen.append(column)
    return chosen
