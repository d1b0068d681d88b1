"""newton_schulz against the same recurrence as one torch product after the other.

Keys resemble queries, as in images: the softmax matrices can be inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work
from sparseattn.ops.newton_schulz import newton_schulz
from sparseattn.ops.work import newton_schulz_flops

ITERATIONS = 6


def build(case: Case) -> Problem:
    """Make landmarks of queries and keys, and values."""
    random = case.generator()
    shape = tuple(case[axis] for axis in ("batch", "heads", "landmarks", "head_dim"))
    keys, values, noise = (
        torch.randn(shape, generator=random, device=case.device).to(case.dtype) for _ in range(3)
    )
    inputs = tuple(t.requires_grad_() for t in (keys + 0.3 * noise, keys, values))

    def ours(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return newton_schulz(queries, keys, values, iterations=ITERATIONS)

    def reference(rows: Tensor, *inputs: Tensor) -> Tensor:
        return newton_schulz(*inputs, iterations=ITERATIONS, impl="reference")[:, :, rows]

    matrices = shape[0] * shape[1]
    forward, backward = newton_schulz_flops(matrices, shape[2], shape[3], ITERATIONS)
    unit = float(keys.numel() * keys.element_size())
    return Problem(
        inputs=inputs,
        providers=(
            Provider("sparseattn", ours, ours=True),
            Provider(
                "products", products, scratch_bytes=32.0 * ITERATIONS * matrices * shape[2] ** 2
            ),
        ),
        reference=reference,
        work=Work(
            flops=forward,
            bytes=4 * unit,
            backward_flops=backward,
            backward_bytes=7 * unit,
            dense_flops=forward,
        ),
    )


def products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The recurrence in torch's batched products."""
    weights = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)
    z = weights.mT / weights.sum(2, keepdim=True).amax(3, keepdim=True)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    for _ in range(ITERATIONS):
        y = weights @ z
        z = 0.25 * z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y)))
    return z @ values


BENCHMARK = Benchmark(
    op="newton_schulz",
    build=build,
    axes={"batch": (1,), "heads": (8, 96), "head_dim": (64,), "landmarks": (32, 64, 128, 256)},
    cuda_axes={"landmarks": (64, 128, 256)},
    small={"heads": (2,), "head_dim": (16,), "landmarks": (16,)},
    dtypes=("float32",),
)
