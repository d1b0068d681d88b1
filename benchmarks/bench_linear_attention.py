"""Linear attention, elu(x) + 1, against einsums over its features and dense attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseattn import linear_attention
from sparseattn.benchmarks.attention import dense_baselines, qkv
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider
from sparseattn.ops.work import linear_work


def build(case: Case) -> Problem:
    """Make q, k and v."""
    q, k, v = qkv(case)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q[:, :, rows], k, v, impl="reference")

    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", linear_attention, ours=True),
            Provider("einsum", eager),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=linear_work(q.shape, k.shape, q.element_size()),
    )


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, one tensor operation after the other."""
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    inverse = 1 / torch.einsum("bhnd,bhd->bhn", phi_q, phi_k.sum(2))
    return torch.einsum("bhnd,bhde,bhn->bhne", phi_q, phi_k.mT @ v, inverse)


BENCHMARK = Benchmark(
    op="linear_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (8,),
        "head_dim": (64,),
        "tokens": (256, 1024, 4096, 16384),
    },
    cuda_axes={
        "batch": (2,),
        "heads": (16,),
        "head_dim": (64, 128),
        "tokens": (1024, 4096, 16384, 32768),
    },
    small={"heads": (2,), "head_dim": (16,), "tokens": (200,)},
)
