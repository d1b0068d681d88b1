"""Convolution of patches with a stride of 2 against dense convolution times the mask.

The layers of bench_submanifold_conv3d as a network would shrink volumes with them: 3x3x3 taps with
a padding of 1, from patches of size / 6 voxels to patches of half as many.
"""

from __future__ import annotations

from functools import partial

from sparseattn.benchmarks.bench_submanifold_conv3d import build
from sparseattn.benchmarks.registry import Benchmark

BENCHMARK = Benchmark(
    op="sparse_conv3d_patches",
    build=partial(build, stride=2),
    axes={"batch": (1,), "size": (96, 48, 24, 12), "depthwise": (0, 1), "density": (0.1, 0.25)},
    cuda_axes={"batch": (1, 4)},
    small={"size": (12,), "depthwise": (1,), "density": (0.25,)},
)
