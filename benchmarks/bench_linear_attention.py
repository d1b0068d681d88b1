"""Linear attention, elu(x) + 1, against einsums over its features and dense attention.

flash-linear-attention, where it is installed, has no form that is not causal: it solves another
problem of the same size, and is held to that.
"""

from __future__ import annotations

import importlib.util

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
            Provider(
                "fla-causal",
                chunked_causal,
                reference=causal_rows,
                unavailable=_fla_reason(case),
            ),
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


def causal_rows(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Naive causal linear attention of some queries."""
    weights = (F.elu(q[:, :, rows]) + 1) @ (F.elu(k) + 1).mT
    later = torch.arange(k.shape[2], device=rows.device) > rows[:, None]
    weights = weights.masked_fill(later, 0)
    return weights @ v / weights.sum(-1, keepdim=True)


def chunked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-linear-attention, whose layout is [B, N, H, D]."""
    from fla.ops.linear_attn import chunk_linear_attn

    features = ((F.elu(x) + 1).transpose(1, 2) for x in (q, k))
    out: Tensor = chunk_linear_attn(*features, v.transpose(1, 2), scale=1.0, normalize=True)[0]
    return out.transpose(1, 2)


def _fla_reason(case: Case) -> str:
    if case.device.type != "cuda":
        return "needs a CUDA device"
    return "" if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"


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
    cuda_cases=({"batch": 1, "heads": 8, "head_dim": 64, "tokens": 65536},),
    small={"heads": (2,), "head_dim": (16,), "tokens": (200,)},
)
