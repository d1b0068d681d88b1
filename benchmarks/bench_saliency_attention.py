"""Attention to the most salient tokens, against dense attention and against gathering by hand.

The saliency is random, one for all heads, and gets its gradient in every backward. The choice of
the tokens is inside every time. The peer does what one would write without this op: top-k, gather,
and SDPA over the kept tokens with log saliency as its mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import saliency_attention
from sparseattn.benchmarks.attention import (
    attention_work,
    dense_baselines,
    qkv,
)
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider


def build(case: Case) -> Problem:
    """Make q, k, v, a saliency, and everybody who can attend by it."""
    q, k, v = qkv(case)
    tokens, keep = case["tokens"], case.share("density")
    shape = (case["batch"], tokens)
    drawn = 1 - torch.rand(shape, generator=case.generator(), device=case.device)
    saliency = drawn.requires_grad_()
    count = saliency_attention(q, k, v, saliency, keep, return_indices=True)[1].shape[2]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saliency_attention(q, k, v, saliency, keep)

    def ours_pruned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saliency_attention(q, k, v, saliency, keep, prune_queries=True)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        best, place = saliency.topk(count)
        spread = place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        mask = best.log().to(q.dtype)[:, None, None].expand(-1, 1, q.shape[2], -1)
        return scaled_dot_product_attention(q, k.gather(2, spread), v.gather(2, spread), mask)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bar = saliency.detach().topk(count).values[:, -1:]
        bias = drawn.detach().to(q.dtype).log().masked_fill(saliency < bar, -torch.inf)
        return biased_rows(rows, q, k, v, bias[:, None, None])

    def pruned(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bar = saliency.detach().topk(count).values[:, -1:]
        asks = (saliency.detach() >= bar)[:, None, rows, None]
        return reference(rows, q, k, v).where(asks, 0)

    pairs = q.shape[0] * q.shape[1] * tokens * count
    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", ours, ours=True),
            Provider("sparseattn-pruned", ours_pruned, ours=True, reference=pruned),
            Provider("gather-sdpa", by_hand),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=attention_work(q, k, pairs),
        density=count / tokens,
    )


def biased_rows(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Naive softmax attention of some queries with a bias on the logits."""
    logits = q[..., rows, :] @ k.mT * q.shape[-1] ** -0.5 + bias
    return logits.softmax(-1) @ v


BENCHMARK = Benchmark(
    op="saliency_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (6,),
        "head_dim": (64,),
        "tokens": (1024, 4096),
        "density": (0.05, 0.15, 0.25, 0.5, 0.75, 1.0),
    },
    cuda_axes={"heads": (6, 12), "batch": (8,), "tokens": (1024, 4096, 16384)},
    small={"heads": (2,), "head_dim": (16,), "tokens": (256,), "density": (0.25,)},
)
