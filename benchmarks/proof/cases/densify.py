"""Cases of densify: levels of HySparK's encoder, odd sizes, no hidden patches, all hidden."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import BFLOAT16, Arguments, Case, Size
from sparseattn.ops.densify import densify
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask


def dense(impl: Any, scores: Tensor, features: Tensor, token: Tensor) -> Tensor:
    """Densify [B, keep, px, py, pz, C] on the patches of highest score: each step a new mask."""
    mask = PatchMask.from_scores(scores, features.shape[1])
    return densify(PatchGrid(features.flatten(0, 1), mask), token, impl=impl)


def sizes(arguments: Arguments, sent: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
    """The size of the terms of the token's gradient."""
    leaf = arguments["token"].detach().requires_grad_()
    y = dense("reference", arguments["scores"], arguments["features"].detach(), leaf)
    return {"dtoken": torch.autograd.grad(y, leaf, sent["y"].square())[0].sqrt()}


def case(
    name: str, size: Size, patch: tuple[int, int, int], channels: int, grid: tuple[int, ...],
    keep: int, batch: int = 2, **more: Any,
) -> Case:  # fmt: skip
    """The case of some sizes."""

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(seed)
        features = torch.empty((batch, keep, *patch, channels), dtype=dtype, device=device)
        token = torch.empty(channels, dtype=dtype, device=device)
        return {
            "scores": torch.rand((batch, *grid), generator=random, device=device),
            "features": features.normal_(generator=random),
            "token": token.normal_(generator=random),
        }

    return Case(
        name, size, make, partial(dense, "triton"), partial(dense, "reference"), ("y",),
        ("features", "token"), ("scores", "features", "y"), sizes, **more,
    )  # fmt: skip


CASES = (
    case("three-sizes", "small", (1, 2, 3), 5, (2, 2, 1), 2),
    case("p16", "full", (16, 16, 16), 64, (6, 6, 6), 54),
    case("p2", "full", (2, 2, 2), 384, (6, 6, 6), 54),
    case("p1", "edge", (1, 1, 1), 33, (5, 3, 7), 20),
    case("full", "edge", (4, 4, 4), 18, (2, 2, 2), 8),
    case("hidden", "edge", (4, 4, 4), 18, (2, 2, 2), 0),
    case("huge", "huge", (16, 16, 16), 64, (6, 6, 6), 54, batch=38, dtypes=(BFLOAT16,)),
)
