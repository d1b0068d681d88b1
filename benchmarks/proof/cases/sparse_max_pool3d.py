"""Cases of sparse_max_pool3d: levels of HySparK's encoder, windows across patches, padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import BFLOAT16, Arguments, Case, Size
from sparseattn.ops.sparse_avg_pool3d import sparse_avg_pool3d
from sparseattn.ops.sparse_max_pool3d import sparse_max_pool3d
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.testing.patches import POOLS, PoolSpec

Options = dict[str, Any]


def pooled(op: Any, impl: str, scores: Tensor, features: Tensor, window: Options) -> Tensor:
    """Pool [B, keep, px, py, pz, C] on the patches of highest score: at every step a new mask."""
    mask = PatchMask.from_scores(scores, features.shape[1])
    y = op(PatchGrid(features.flatten(0, 1), mask), impl=impl, **window).features
    return y.unflatten(0, features.shape[:2])


def case(op: Any, name: str, size: Size, spec: PoolSpec, options: Options, **more: Any) -> Case:
    """The case of a spec, with halves for values: equal ones are frequent."""
    patch = (spec.patch,) * 3 if isinstance(spec.patch, int) else spec.patch

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(seed)
        shape = (spec.batch, spec.keep, *patch, spec.channels)
        features = torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)
        features.mul_(2).round_().div_(2)
        scores = torch.rand((spec.batch, *spec.grid), generator=random, device=device)
        return {"scores": scores, "features": features, "window": spec.window | options}

    def sizes(arguments: Arguments, sent: dict[str, Tensor], truth: Any, _: Any) -> Any:
        leaf = arguments["features"].detach().requires_grad_()
        y = pooled(op, "reference", arguments["scores"], leaf, arguments["window"])
        (found,) = torch.autograd.grad(y, leaf, sent["y"].abs())
        return {"dfeatures": found}

    batched = ("scores", "features", "y") if spec.batch > 1 else ()
    return Case(
        name, size, make, partial(pooled, op, "triton"), partial(pooled, op, "reference"), ("y",),
        ("features",), batched, sizes, **more,
    )  # fmt: skip


def cases(op: Any, options: Options) -> tuple[Case, ...]:
    """The cases of one op; `options` are for windows with padding."""

    def of(name: str, size: Size, spec: PoolSpec, **more: Any) -> Case:
        return case(op, name, size, spec, options if spec.padding else {}, **more)

    level = {"batch": 2, "grid": (6, 6, 6), "keep": 54}
    huge = PoolSpec(16, channels=64, batch=38, grid=(6, 6, 6), keep=216)
    edges = {n: spec for n, spec in POOLS.items() if spec.keep not in (0, "ragged") and spec.batch}
    return (
        of("aligned", "small", PoolSpec(2, channels=2, grid=(2, 2, 1), keep=3)),
        of("across", "small", PoolSpec(1, (1, 3, 1), 1, (0, 1, 0), grid=(2, 2, 1), keep=3)),
        of("p16", "full", PoolSpec(16, channels=64, **level)),
        of("p16-overlapping", "full", PoolSpec(16, 3, 2, 1, channels=32, **level)),
        of("p4", "full", PoolSpec(4, channels=256, **level)),
        *(of(f"edge-{name}", "edge", spec) for name, spec in edges.items()),
        of("huge", "huge", huge, dtypes=(BFLOAT16,)),
    )


MAXIMUM, MEAN = sparse_max_pool3d, sparse_avg_pool3d
CASES = cases(MAXIMUM, {})
