"""Cases of sparse_conv_transpose3d: back to given voxels, at odd windows and strides."""

from __future__ import annotations

from functools import partial

from proof.cases.sparse_conv3d import case
from sparseattn.testing.voxels import VoxelSpec as Spec

Up = partial(Spec, "sparse_conv_transpose3d", stride=2, padding=1, out="random")
SMALL = {"shape": (2, 2, 2), "out_shape": (4, 4, 3)}
WIDE = {"shape": (24, 24, 24), "out_shape": (48, 48, 48)}
CASES = (
    case("inverse", "small", Up((2, 3, 1), channels=(3, 5), padding=(0, 1, 0), **SMALL), 5, 20),
    case("inverse-k3", "full", Up(channels=(128, 64), **WIDE), 6_000, 20_000),
    case("inverse-k2", "full", Up(2, padding=0, channels=(128, 64), **WIDE), 6_000, 20_000),
    case("groups-2", "edge", Up(channels=(64, 80), groups=2, **WIDE), 3_000, 9_000),
    case("depthwise", "edge", Up(channels=(33, 33), groups=33, **WIDE), 3_000, 9_000),
    case("nobody-is-reached", "edge", Up(channels=(32, 32), bias=False, **WIDE), 0, 999),
)
