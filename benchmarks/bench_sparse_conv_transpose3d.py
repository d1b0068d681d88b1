"""Inverse convolution of voxels against dense transposed convolution times the mask.

From the sites that a convolution of stride 2 reaches back to those it came from. The index is all
that is made of coordinates: the coarse sites and the kernel map.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose3d

from sparseattn import VoxelTensor, sparse_conv3d, sparse_conv_transpose3d
from sparseattn.benchmarks import voxels
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider

STEPS: dict[str, Any] = {"stride": 2, "padding": 1}


def build(case: Case) -> Problem:
    """Make one layer with random values."""
    random, channels = case.generator(), case["channels"]
    fine = voxels.surfaces(case)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=case.device)
        return values.to(case.dtype).requires_grad_()

    weight = normal(channels, channels, 3, 3, 3)

    def index() -> tuple[VoxelTensor, VoxelTensor]:
        top = voxels.fresh(fine, fine.features.to(case.dtype))
        with torch.no_grad():
            return sparse_conv3d(top, weight[:1, :1], **STEPS), top

    coarse, top = index()
    features = normal(coarse.num_voxels, channels)

    def sparse(x: Tensor, weight: Tensor, made: tuple[VoxelTensor, VoxelTensor]) -> Tensor:
        given = made[0].with_features(x)
        return sparse_conv_transpose3d(given, weight, out_sites=made[1], **STEPS).features

    def at(places: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        volume, out = coarse.with_features(x).to_dense(), x.new_zeros(())
        most = torch.tensor(coarse.spatial_shape, device=x.device)
        for a, b, c in itertools.product(range(3), repeat=3):
            reads = places[:, 1:] + 1 - torch.tensor([a, b, c], device=x.device)
            fits = ((reads % 2 == 0) & (reads >= 0) & (reads // 2 < most)).all(1, keepdim=True)
            i, j, k = (reads // 2).clamp(most * 0, most - 1).unbind(1)
            read = torch.where(fits, volume[places[:, 0], :, i, j, k], 0)
            out = out + read @ weight[:, :, a, b, c]
        return out

    def reference(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return at(fine.coordinates.long()[rows], x, weight)

    size = case["size"]
    more = (size - 1) % 2

    def dense(volume: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose3d(volume, weight, **STEPS, output_padding=more)

    made = coarse.with_features(features.detach()).to_dense()
    found = top.kernel_map(3, **STEPS, out_sites=coarse)
    full = 27 * coarse.batch_size * coarse.spatial_shape[0] ** 3
    return Problem(
        inputs=(features, weight),
        providers=(
            Provider("sparseattn", sparse, index, ours=True),
            *voxels.dense_providers("conv_transpose3d", dense, made, coarse, fine, at),
        ),
        reference=reference,
        work=voxels.work_of(features, weight, fine.num_voxels, int((found.rows >= 0).sum()), full),
        density=case.share("density"),
        sums=True,
    )


BENCHMARK = Benchmark(
    op="sparse_conv_transpose3d",
    build=build,
    axes={"batch": (1,), "size": (96,), "channels": (32, 64), "density": (0.02, 0.1, 0.25)},
    cuda_axes={"size": (256,), "channels": (64, 256)},
    small={"size": (12,), "channels": (8,), "density": (0.1,)},
)
