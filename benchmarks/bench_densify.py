"""Densify against a scatter into zeros and torch.where with the upsampled mask.

Levels are those of HySparK's encoder. The peer is what the released models do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import PatchGrid, PatchMask, densify
from sparseattn.benchmarks.bench_submanifold_conv3d import GRID
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work

CHANNELS = {96: 64, 48: 128, 24: 256, 12: 384}


def build(case: Case) -> Problem:
    """Make one level with random values."""
    random, channels = case.generator(), CHANNELS[case["size"]]
    patch, batch = case["size"] // GRID, case["batch"]
    scores = torch.rand((batch, GRID, GRID, GRID), generator=random, device=case.device)
    keep = max(1, round(case.share("density") * GRID**3))

    def index() -> PatchMask:
        return PatchMask.from_scores(scores, keep)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=case.device)
        return values.to(case.dtype).requires_grad_()

    mask = index()
    features, token = normal(mask.num_patches, patch, patch, patch, channels), normal(channels)

    def ours(x: Tensor, token: Tensor, mask: PatchMask) -> Tensor:
        return densify(PatchGrid(x, mask), token).permute(0, 2, 3, 4, 1).flatten(0, 3)

    def select(x: Tensor, token: Tensor, mask: PatchMask) -> Tensor:
        active = mask.to_dense(patch)[:, None]
        y = torch.where(active, PatchGrid(x, mask).to_dense(), token.view(1, -1, 1, 1, 1))
        return y.permute(0, 2, 3, 4, 1).flatten(0, 3)

    def reference(rows: Tensor, x: Tensor, token: Tensor) -> Tensor:
        size = case["size"]
        spots = torch.unravel_index(rows, (batch, size, size, size))
        at = mask.table[spots[0], spots[1] // patch, spots[2] // patch, spots[3] // patch].long()
        a, b, c = (spot % patch for spot in spots[1:])
        return torch.where((at >= 0)[:, None], x[at.clamp_min(0), a, b, c], token)

    voxels, size = batch * case["size"] ** 3, features.element_size()
    moved = size * channels * (voxels + features.shape[:4].numel())
    return Problem(
        inputs=(features, token),
        providers=(
            Provider("sparseattn", ours, index, ours=True),
            Provider("scatter and where", select, index, dense=True),
        ),
        reference=reference,
        work=Work(
            channels * voxels, moved, channels * voxels, moved, channels * voxels,
        ),
        density=keep / GRID**3,
    )  # fmt: skip


BENCHMARK = Benchmark(
    op="densify",
    build=build,
    axes={"batch": (1,), "size": (96, 48, 24, 12), "density": (0.1, 0.25, 0.5)},
    cuda_axes={"batch": (1, 4)},
    small={"size": (12,), "density": (0.25,)},
)
