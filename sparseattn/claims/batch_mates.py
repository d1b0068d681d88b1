"""Every attention op: what a sample gets never depends on the values of its batch mates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sparseattn
from sparseattn import BlockMask, orthogonal_features
from sparseattn.claims.finding import Effort, Finding, found

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TOKENS, DIM = 197, 32


def cases() -> dict[str, Attend]:
    """Return a call of every attention op; masks and saliencies are made of q and k."""
    projection = orthogonal_features(64, DIM, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(-1, 1, 32 * TOKENS).sin().view(32, TOKENS) / TOKENS**0.5

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pooled = [x.detach()[:, :, :192].unflatten(2, (12, 16)).mean(3) for x in (q, k)]
        mask = BlockMask.from_block_scores(pooled[0] @ pooled[1].mT, 0.25, 192, 192, 16)
        return sparseattn.block_sparse_attention(q[:, :, :192], k[:, :, :192], v[:, :, :192], mask)

    return {
        "block_sparse_attention": blocks,
        "topk_attention": lambda q, k, v: sparseattn.topk_attention(q, k, v, 0.25, block_size=16),
        "saliency_attention": lambda q, k, v: sparseattn.saliency_attention(
            q, k, v, q.mean((1, 3)).sigmoid().clamp_min(1e-6), 0.25
        ),
        "performer_attention": lambda q, k, v: sparseattn.performer_attention(q, k, v, projection),
        "nystrom_attention": lambda q, k, v: sparseattn.nystrom_attention(q, k, v, 16),
        "linformer_attention": lambda q, k, v: sparseattn.linformer_attention(q, k, v, weights),
        "linear_attention": sparseattn.linear_attention,
    }


def leak(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as published code of the Nyström method does: one start value for the whole batch."""
    return sparseattn.nystrom_attention(q, k, v, 16, legacy_start=True)


def batch_mates(effort: Effort) -> Finding:
    """Replace a sample's batch mates by others 30 times as large; compare its bits."""
    known = cases()
    ops = [name for name in sparseattn.__all__ if name.endswith("_attention")]
    wrong = [name for name in ops if name not in known or sees_batch_mates(known[name])]
    caught = sees_batch_mates(leak)
    measured = (
        f"outputs and gradients of {len(ops) - len(wrong)} of {len(ops)} attention ops keep their "
        f"bits{' (not: ' + ', '.join(wrong) + ')' if wrong else ''}; with legacy_start, the start "
        f"of published code, they {'change' if caught else 'do not change'}"
    )
    claim = "All: an image's result does not depend on the images beside it"
    return found(claim, measured, not wrong and caught)


def sees_batch_mates(attend: Attend) -> bool:
    """Say whether the first sample's output or gradients change with the values of the others."""
    torch.manual_seed(0)
    first, other = torch.randn(2, 3, 3, 4, TOKENS, DIM)  # q, k and v [B, H, N, D], twice
    other = torch.cat([first[:, :1], 30 * other[:, 1:]], 1)
    results = []
    for qkv in (first, other):
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        out = attend(q, k, v)
        loss = out[0].sin().sum() + out[1:].sum()
        gradients = torch.autograd.grad(loss, (q, k, v), materialize_grads=True)
        results.append([x[0] for x in (out, *gradients)])
    return not all(map(torch.equal, *results))
