"""Nystrom attention against the formula of the nystrom-attention package and dense attention.

Tokens that follow one another are alike, and so are a token's query and key, as in images: the
matrix between the landmarks can be inverted. The peer takes the start value of the whole batch, as
the package does, and is held against that definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import nystrom_attention
from sparseattn.benchmarks.attention import dense_baselines
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider
from sparseattn.ops.work import nystrom_work

ITERATIONS = 6
MOST_JUDGED = 2**28  # of larger q the gate judges two heads: its float64 would fill the memory


def build(case: Case) -> Problem:
    """Make q, k and v: noise on lines between random tokens, one in sixteen."""
    random, m = case.generator(), case["landmarks"]
    batch, heads, tokens, head_dim = shape = tuple(
        case[axis] for axis in ("batch", "heads", "tokens", "head_dim")
    )

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, device=case.device)

    knots = drawn(2 * batch * heads, head_dim, tokens // 16 + 2)
    lines = torch.nn.functional.interpolate(knots, tokens, mode="linear", align_corners=True)
    keys, values = lines.mT.reshape(2, *shape).unbind()
    made = (keys + 0.3 * drawn(*shape), keys + 0.3 * drawn(*shape), values + 0.3 * drawn(*shape))
    q, k, v = (t.to(case.dtype).contiguous().requires_grad_() for t in made)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, m, iterations=ITERATIONS)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return whole_factors(q, k, v, m)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, m, iterations=ITERATIONS, impl="reference")[:, :, rows]

    def reference_of_eager(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = nystrom_attention(q, k, v, m, legacy_start=True, impl="reference")
        return out[:, :, rows]

    weights = float(q.numel() // head_dim * m * q.element_size())
    providers = [Provider("sparseattn", ours, ours=True)]
    if tokens % m == 0:  # elsewhere the package pads at the front, which changes the result
        peer = Provider(
            "nystrom-attention", eager, reference=reference_of_eager, scratch_bytes=6 * weights
        )
        providers.append(peer)
    few = tuple(x.detach()[:1, :2].clone().requires_grad_() for x in (q, k, v))
    return Problem(
        inputs=(q, k, v),
        providers=(*providers, *dense_baselines(case, q, k)),
        reference=reference,
        work=nystrom_work(q.shape, k.shape, m, ITERATIONS, q.element_size()),
        judged=few if q.numel() > MOST_JUDGED else None,
    )


def whole_factors(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """Nystrom attention by its three matrices, as nystrom-attention multiplies them."""
    each = q.shape[2] // landmarks
    q = q * q.shape[-1] ** -0.5
    queries, keys = (x.unflatten(2, (landmarks, each)).sum(3) / each for x in (q, k))
    first, second, third = (
        (a @ b.mT).softmax(-1) for a, b in ((q, keys), (queries, keys), (queries, k))
    )
    z = second.mT / (second.sum(-1).amax() * second.sum(-2).amax())
    eye = torch.eye(landmarks, dtype=q.dtype, device=q.device)
    for _ in range(ITERATIONS):
        y = second @ z
        z = 0.25 * z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y)))
    return (first @ z) @ (third @ v)


BENCHMARK = Benchmark(
    op="nystrom_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (8,),
        "head_dim": (64,),
        "landmarks": (64,),
        "tokens": (256, 1024, 4096, 16384),
    },
    cuda_axes={
        "batch": (8,),
        "heads": (12,),
        "landmarks": (64, 256),
        "tokens": (1024, 4096, 16384, 65536),
    },
    cuda_cases=(
        {"batch": 4, "heads": 16, "head_dim": 128, "landmarks": 64, "tokens": 131072},
        {"batch": 1, "heads": 4, "head_dim": 64, "landmarks": 32, "tokens": 262144},
    ),
    small={"heads": (2,), "head_dim": (16,), "landmarks": (16,), "tokens": (192,)},
)
