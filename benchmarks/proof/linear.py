"""What the case files of the linear attentions have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import Arguments, Case, Size
from sparseattn.testing.landmarks import LandmarkSpec, OpInputs, judge

Maker = Callable[[LandmarkSpec, torch.dtype, torch.device], OpInputs]
Beside = Callable[[Callable[..., Tensor], LandmarkSpec], dict[str, Tensor]]


def case(
    op: Callable[..., Tensor],
    name: str,
    size: Size,
    spec: LandmarkSpec,
    make: Maker,
    beside: Beside | None = None,
    **options: Any,
) -> Case:
    """The case of a spec.

    make: makes the inputs, as in sparseattn.testing.landmarks. beside: beside(normal, spec) -> what
    a "huge" case has besides q, k and v. options: of the op.
    """

    def drawn(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        seeded = replace(spec, seed=spec.seed + 2 * seed)  # the next one draws a projection
        return make(seeded, dtype, device).arguments

    def huge(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(seed)  # the host would take minutes

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

        q, k, v = (normal(spec.batch, spec.heads, spec.q_len, spec.head_dim) for _ in range(3))
        return {"q": q, "k": k, "v": v} | (beside(normal, spec) if beside else {})

    attend = partial(op, **options)
    shapes = replace(spec, batch=1, q_len=1, k_len=1)
    gradients = make(shapes, torch.float32, torch.device("cpu")).leaves
    return Case(
        name, size, huge if size == "huge" else drawn, partial(attend, impl="triton"),
        partial(attend, impl="reference"), gradients=gradients,
        batched=("q", "k", "v", "key_mask", "out") if spec.batch > 1 else (), judge=judge,
        dtypes=("bfloat16",) if size == "huge" else Case.dtypes,
    )  # fmt: skip
