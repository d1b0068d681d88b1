"""Convolution of voxels against dense convolution times the mask, and against spconv.

`stride` 1 is a submanifold convolution, 2 goes to every site that a voxel reaches; `depthwise` 1
has as many groups as channels. The index is all that is made of coordinates: the sites of the
output and the kernel map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from sparseattn import VoxelTensor, sparse_conv3d
from sparseattn.benchmarks import voxels
from sparseattn.benchmarks.bench_submanifold_conv3d import convolve_at
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider


def build(case: Case) -> Problem:
    """Make one layer with random values."""
    random, channels, stride = case.generator(), case["channels"], case["stride"]
    groups = channels if case["depthwise"] else 1
    sites = voxels.surfaces(case)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=case.device)
        return values.to(case.dtype).requires_grad_()

    features = normal(sites.num_voxels, channels)
    weight = normal(channels, channels // groups, 3, 3, 3)
    options: dict[str, Any] = {"stride": stride, "padding": 1, "groups": groups}

    def reached(x: VoxelTensor) -> VoxelTensor:
        return x if stride == 1 else sparse_conv3d(x, weight[:1, :1], stride=stride, padding=1)

    def index() -> tuple[VoxelTensor, VoxelTensor]:
        x = voxels.fresh(sites, sites.features.to(case.dtype))
        with torch.no_grad():
            out = reached(x)
        x.kernel_map(3, stride=stride, padding=1, out_sites=out)
        return x, out

    def sparse(x: Tensor, weight: Tensor, made: tuple[VoxelTensor, VoxelTensor]) -> Tensor:
        given = made[0].with_features(x)
        return sparse_conv3d(given, weight, out_sites=made[1], **options).features

    x, out = index()
    pairs = int((x.kernel_map(3, stride=stride, padding=1, out_sites=out).rows >= 0).sum())

    def at(places: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        scale = places.new_tensor([1, stride, stride, stride])
        return convolve_at(places * scale, sites.with_features(x).to_dense(), weight, groups)

    def reference(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return at(out.coordinates.long()[rows], x, weight)

    def dense(volume: Tensor, weight: Tensor) -> Tensor:
        return conv3d(volume, weight, stride=stride, padding=1, groups=groups)

    made = sites.with_features(features.detach()).to_dense()
    full = 27 * out.batch_size * out.spatial_shape[0] ** 3
    return Problem(
        inputs=(features, weight),
        providers=(
            Provider("sparseattn", sparse, index, ours=True),
            *voxels.dense_providers("conv3d", dense, made, sites, out, at),
            voxels.spconv_provider(sites, weight, stride),
        ),
        reference=reference,
        work=voxels.work_of(features, weight, out.num_voxels, pairs, full),
        density=case.share("density"),
        sums=True,
    )


BENCHMARK = Benchmark(
    op="sparse_conv3d",
    build=build,
    axes={
        "batch": (1,),
        "size": (96,),
        "channels": (32, 64),
        "stride": (1, 2),
        "depthwise": (0, 1),
        "density": (0.02, 0.1, 0.25),
    },
    cuda_axes={"size": (256,), "channels": (64, 256)},
    small={
        "size": (12,), "channels": (8,), "stride": (1, 2), "depthwise": (0,), "density": (0.1,),
    },
)  # fmt: skip
