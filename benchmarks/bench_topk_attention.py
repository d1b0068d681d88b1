"""Top-k attention against dense attention: pooling, choice and lists are in every time.

Queries and keys are normal, so every row keeps as many blocks, all over the sequence. A query block
is `tall` key blocks high.
`in-two-steps` is the same op with the choice and its lists as an index, which is timed alone too.
The peer is FlexAttention with the same choice made by torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseattn import BlockMask, block_sparse_attention, topk_attention
from sparseattn.benchmarks.attention import (
    attention_rows,
    attention_work,
    dense_baselines,
    flex_providers,
    qkv,
)
from sparseattn.benchmarks.bench_block_sparse_attention import flex_mask
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider
from sparseattn.ops import topk_attention as op


def build(case: Case) -> Problem:
    """Make q, k, v, and everybody who can attend to the best blocks of every row."""
    q, k, v = qkv(case)
    tokens, block = case["tokens"], (case["tall"] * case["block"], case["block"])
    keep = case.share("density")
    attend = partial(topk_attention, keep=keep, block_size=block)
    with torch.no_grad():
        mask = topk_attention(q, k, v, keep, block_size=block, return_mask=True)[1]
    density = float(mask.density())
    kept = mask.block_states() != -1

    def choose() -> BlockMask:
        return op.choose(
            q.detach(), k.detach(), keep, block, mode="top_k", pooling="mean",
            always=None, weights=(None, None), gate=None, scale=q.shape[3] ** -0.5,
            impl="triton" if q.is_cuda else "torch",
        )[0]  # fmt: skip

    def choose_flex() -> Any:
        pooled_q, pooled_k = (
            x.detach().float().unflatten(2, (-1, size)).mean(3)
            for x, size in zip((q, k), block, strict=True)
        )
        count = mask.rows.capacity // mask.num_q_blocks
        return flex_mask(pooled_q @ pooled_k.mT, count, tokens, block)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = kept[:, :, rows // block[0]].repeat_interleave(block[1], 3)[..., :tokens]
        return attention_rows(rows, q, k, v, shown)

    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", attend, ours=True),
            Provider("in-two-steps", block_sparse_attention, choose, ours=True),
            *flex_providers(case, q, k, choose_flex, lambda: mask.to_flex()),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=attention_work(q, k, density * q.shape[0] * q.shape[1] * tokens**2),
        density=density,
    )


BENCHMARK = Benchmark(
    op="topk_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (6,),
        "head_dim": (64,),
        "block": (64,),
        "tall": (1, 4),
        "tokens": (1024, 4096, 16384),
        "density": (0.1, 0.25, 0.5, 1.0),
    },
    cuda_axes={"heads": (16,), "tall": (1,), "tokens": (1024, 4096, 16384, 32768)},
    small={"heads": (2,), "head_dim": (16,), "tokens": (256,), "density": (0.5,)},
)
