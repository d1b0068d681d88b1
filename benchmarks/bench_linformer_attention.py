"""Linformer attention against the einsums of its paper and dense attention.

Keys and values have a fixed projection each, shared by all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import linformer_attention
from sparseattn.benchmarks.attention import compiled_peer, dense_baselines, qkv
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider
from sparseattn.ops.work import linformer_work


def build(case: Case) -> Problem:
    """Make q, k, v and both projections."""
    q, k, v = qkv(case)
    random, shape = case.generator(), (2, case["landmarks"], case["tokens"])
    drawn = torch.randn(shape, generator=random, device=case.device) * case["tokens"] ** -0.5
    projections = drawn.to(case.dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linformer_attention(q, k, v, *projections)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.einsum("bhnd,mn->bhmd", k, projections[0])
        values = torch.einsum("bhnd,mn->bhmd", v, projections[1])
        scores = torch.einsum("bhnd,bhmd->bhnm", q, keys) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), values)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pair = projections.to(q.dtype)
        return linformer_attention(q[:, :, rows], k, v, *pair, impl="reference")

    weights = float(q.numel() // q.shape[3] * case["landmarks"] * q.element_size())
    peer = Provider("einsum", eager, scratch_bytes=4 * weights)
    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", ours, ours=True),
            peer,
            *compiled_peer(case, peer),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=linformer_work(
            q.shape, k.shape, case["landmarks"], q.element_size(), is_trained=False
        ),
    )


BENCHMARK = Benchmark(
    op="linformer_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (8,),
        "head_dim": (64,),
        "landmarks": (256,),
        "tokens": (256, 1024, 4096, 16384),
    },
    cuda_axes={
        "batch": (8,),
        "heads": (12,),
        "tokens": (1024, 4096, 16384),
    },
    small={"heads": (2,), "head_dim": (16,), "landmarks": (16,), "tokens": (200,)},
)
