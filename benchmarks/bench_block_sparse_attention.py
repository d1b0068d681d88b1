"""Block-sparse attention against dense attention and FlexAttention.

The mask keeps random key blocks, as many in every row, other ones for each head and sample. A query
block is `tall` key blocks high. The index is built from block scores: the choice of the best blocks
of each row, then the lists.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.benchmarks.attention import (
    attention_rows,
    attention_work,
    dense_baselines,
    flex_providers,
    qkv,
)
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider


def build(case: Case) -> Problem:
    """Make q, k, v, a random mask, and everybody who can attend over it."""
    q, k, v = qkv(case)
    tokens, block = case["tokens"], (case["tall"] * case["block"], case["block"])
    rows, columns = (-(-tokens // size) for size in block)
    keep = max(1, round(case.share("density") * columns))
    random = case.generator()
    shape = (case["batch"], case["heads"], rows, columns)
    scores = torch.rand(shape, generator=random, device=case.device)

    def index() -> BlockMask:
        return BlockMask.from_block_scores(scores, keep, tokens, tokens, block)

    flex_index = partial(flex_mask, scores, keep, tokens, block)
    mask = index()
    density = float(mask.density())
    kept = mask.block_states() != -1

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = kept[:, :, rows // block[0]].repeat_interleave(block[1], 3)[..., :tokens]
        return attention_rows(rows, q, k, v, shown)

    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", block_sparse_attention, index, ours=True),
            *flex_providers(case, q, k, flex_index, lambda: index().to_flex()),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=attention_work(q, k, density * q.shape[0] * q.shape[1] * tokens**2),
        density=density,
    )


def flex_mask(scores: Tensor, keep: int, tokens: int, block: tuple[int, int]) -> Any:
    """Build FlexAttention's mask the way it is fastest there: counts and sorted indices."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    best = scores.topk(keep, sorted=False).indices.sort(-1).values
    indices = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    indices[..., :keep] = best
    none = torch.zeros(scores.shape[:3], dtype=torch.int32, device=scores.device)
    return FlexBlockMask.from_kv_blocks(
        none,
        torch.zeros_like(indices),
        none + keep,
        indices,
        BLOCK_SIZE=block,
        seq_lengths=(tokens, tokens),
    )


BENCHMARK = Benchmark(
    op="block_sparse_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (6,),
        "head_dim": (64,),
        "block": (64,),
        "tall": (1, 4),
        "tokens": (1024, 2048, 4096, 8192),
        "density": (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0),
    },
    cuda_axes={
        "heads": (16,),
        "head_dim": (64, 128),
        "block": (64, 128),
        "tall": (1,),
        "tokens": (1024, 4096, 16384, 32768),
    },
    small={"heads": (2,), "head_dim": (16,), "tokens": (256,), "density": (0.5,)},
)
