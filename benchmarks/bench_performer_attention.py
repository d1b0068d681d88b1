"""Performer attention against eager random features and dense attention.

Queries and keys have standard deviation 0.5, where random features still say something of softmax.
The eager peer is written as performer-pytorch computes it: both feature matrices in memory, the
largest product and eps in each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import orthogonal_features, performer_attention
from sparseattn.benchmarks.attention import compiled_peer, dense_baselines
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider
from sparseattn.ops.work import performer_work

EPS = 1e-4


def build(case: Case) -> Problem:
    """Make q, k, v and a projection."""
    random = case.generator()
    shape = tuple(case[axis] for axis in ("batch", "heads", "tokens", "head_dim"))
    q, k, v = (
        (torch.randn(shape, generator=random, device=case.device) * size)
        .to(case.dtype)
        .requires_grad_()
        for size in (0.5, 0.5, 1.0)
    )
    drawn = torch.Generator().manual_seed(case.seed)
    projection = orthogonal_features(case["features"], case["head_dim"], generator=drawn)
    projection = projection.to(case.device, case.dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return performer_attention(q, k, v, projection)

    def with_eps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return performer_attention(q, k, v, projection, eps=EPS)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_features(q, k, v, projection)

    def reference(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        directions = projection.to(q.dtype)
        return performer_attention(q[:, :, rows], k, v, directions, impl="reference")

    def reference_with_eps(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        directions = projection.to(q.dtype)
        return performer_attention(q[:, :, rows], k, v, directions, eps=EPS, impl="reference")

    features = float(q.numel() * case["features"] * q.element_size())
    peer = Provider(
        "eager-features",
        eager,
        reference=reference_with_eps,
        scratch_bytes=8 * features / case["head_dim"],
    )
    return Problem(
        inputs=(q, k, v),
        providers=(
            Provider("sparseattn", ours, ours=True),
            Provider("sparseattn-eps", with_eps, ours=True, reference=reference_with_eps),
            peer,
            *compiled_peer(case, peer),
            *dense_baselines(case, q, k),
        ),
        reference=reference,
        work=performer_work(q.shape, k.shape, case["features"], q.element_size()),
    )


def eager_features(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Performer attention by its features, one tensor operation after the other."""
    normaliser, ratio = q.shape[-1] ** -0.25, projection.shape[0] ** -0.5

    def features(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        products = torch.einsum("bhnd,md->bhnm", normaliser * x, projection)
        diagonal = (x**2).sum(-1, keepdim=True) / 2 * normaliser**2
        shifted = products - diagonal - products.amax(dims, keepdim=True).detach()
        return ratio * (shifted.exp() + EPS)

    phi_q, phi_k = features(q, (-1,)), features(k, (-1, -2))
    inverse = 1.0 / torch.einsum("bhnm,bhm->bhn", phi_q, phi_k.sum(-2))
    context = torch.einsum("bhnm,bhnd->bhmd", phi_k, v)
    return torch.einsum("bhmd,bhnm,bhn->bhnd", context, phi_q, inverse)


BENCHMARK = Benchmark(
    op="performer_attention",
    build=build,
    axes={
        "batch": (1,),
        "heads": (8,),
        "head_dim": (64,),
        "features": (256,),
        "tokens": (256, 1024, 4096, 16384),
    },
    cuda_axes={
        "batch": (8,),
        "heads": (12,),
        "features": (64, 128, 256),
        "tokens": (1024, 4096, 16384, 65536),
    },
    small={"heads": (2,), "head_dim": (16,), "features": (16,), "tokens": (200,)},
)
