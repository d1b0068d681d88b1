"""Cases of sparse_conv3d: new voxels in each call, strides, depthwise, odd windows; patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof import sums
from proof.case import BFLOAT16, Arguments, Case, Size
from proof.cases import submanifold_conv3d as patches
from sparseattn.ops.sparse_conv3d import sparse_conv3d
from sparseattn.ops.sparse_conv_transpose3d import sparse_conv_transpose3d
from sparseattn.ops.submanifold_conv3d import submanifold_conv3d
from sparseattn.structures.voxel_tensor import VoxelTensor
from sparseattn.testing.convolution import ConvSpec
from sparseattn.testing.voxels import VoxelSpec as Spec

OPS: dict[str, Any] = {
    "submanifold_conv3d": submanifold_conv3d,
    "sparse_conv3d": sparse_conv3d,
    "sparse_conv_transpose3d": sparse_conv_transpose3d,
}


def convolve(
    spec: Spec, impl: Any, places: Tensor, out: Tensor | None, features: Tensor, weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Convolve [B, n, C] at places [B, n, 3] to places `out`; the map is built in the call."""
    x, options = voxels(features, places, spec.shape), spec.options()
    if out is not None:
        options["out_sites"] = voxels(out[..., :1].to(features.dtype), out, spec.out_shape)
    y = OPS[spec.op](x, weight, bias, **options, impl=impl).features
    return y.unflatten(0, (places.shape[0], (places if out is None else out).shape[1]))


def voxels(features: Tensor, places: Tensor, shape: Any) -> VoxelTensor:
    """Return [B, n, C] at places [B, n, 3] of volumes of a shape."""
    batch, count = places.shape[:2]
    sample = torch.arange(batch, dtype=torch.int32, device=places.device)
    sample = sample[:, None, None].expand(batch, count, 1)
    coordinates = torch.cat((sample, places), 2).flatten(0, 1)
    return VoxelTensor(features.flatten(0, 1), coordinates, shape, batch)


def case(name: str, size: Size, spec: Spec, count: int, out_count: int = 0, **more: Any) -> Case:
    """The case of a spec with `count` voxels in each sample, and as many in the output if named."""
    kernel = (spec.kernel,) * 3 if isinstance(spec.kernel, int) else spec.kernel
    inner, outer = spec.channels
    turned = spec.op == "sparse_conv_transpose3d"
    lead = (inner, outer // spec.groups) if turned else (outer, inner // spec.groups)

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(spec.seed + seed)

        def normal(*shape: Any) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

        def draw(shape: Any, count: int) -> Tensor:
            cells = shape[0] * shape[1] * shape[2]
            ranks = torch.rand((spec.batch, cells), generator=random, device=device)
            place = ranks.argsort(1)[:, :count]
            parts = (place // (shape[1] * shape[2]), place // shape[2] % shape[1], place % shape[2])
            return torch.stack(parts, 2).to(torch.int32)

        return {
            "places": draw(spec.shape, count),
            "out": draw(spec.out_shape, out_count) if out_count else None,
            "features": normal(spec.batch, count, inner), "weight": normal(*lead, *kernel),
            "bias": normal(outer) if spec.bias else None,
        }  # fmt: skip

    reference = partial(convolve, spec, "reference")
    batched = ("places", "features", "y", *(("out",) if out_count else ()))
    return Case(
        name, size, make, partial(convolve, spec, "triton"),
        reference, ("y",),
        ("features", "weight", "bias") if spec.bias else ("features", "weight"),
        batched, sums.sizes(reference), terms=sums.terms(reference), **more,
    )  # fmt: skip


Down = partial(Spec, "sparse_conv3d", stride=2, padding=1, out="random")
SMALL = {"shape": (3, 4, 3), "out_shape": (1, 2, 2)}
WIDE = {"shape": (48, 48, 48), "out_shape": (24, 24, 24)}
SAME = {"shape": (48, 48, 48)}
FAR = {"shape": (272, 256, 256)}  # more than 2^24 cells: a hash table
Half = partial(ConvSpec, stride=2, padding=1)
ENCODER = {"batch": 2, "grid": (6, 6, 6), "keep": 54}
PATCHES = (
    patches.case(
        "patches", "small",
        ConvSpec(
            (2, 2, 1), (3, 3, 1), (3, 17), (2, 2, 1), (1, 1, 0), grid=(2, 2, 1), keep=3
        ),
    ),
    patches.case(
        "patches-depthwise", "small",
        ConvSpec(
            (2, 1, 2), (3, 1, 3), (6, 6), (2, 1, 2), (1, 0, 1), groups=6, grid=(2, 2, 1), keep=3
        ),
    ),
    patches.case("patches-p16", "full", Half(16, channels=(32, 64), **ENCODER)),
    patches.case("patches-p4", "full", Half(4, channels=(128, 256), **ENCODER)),
    patches.case(
        "patches-depthwise-p16", "full", Half(16, channels=(32, 32), groups=32, **ENCODER)
    ),
    patches.case("patches-k5-odd-channels", "edge", Half(6, 5, channels=(18, 33), padding=2)),
    patches.case("patches-stride-3-dilated", "edge", ConvSpec(6, 3, (16, 48), 3, 2, dilation=2)),
    patches.case("patches-groups-2", "edge", Half(4, channels=(64, 80), groups=2)),
    patches.case("patches-k2", "edge", Half(8, 2, channels=(64, 64), padding=0)),
    patches.case("patches-empty-sample", "edge", Half(2, channels=(64, 8), batch=3, keep="ragged")),
    patches.case("patches-none", "edge", Half(2, keep=0)),
)  # fmt: skip
HUGE = Spec(kernel=(1, 1, 3), channels=(64, 64), shape=(192, 192, 192), batch=8)
CASES = (
    case("submanifold", "small", Spec(kernel=(3, 1, 3), channels=(3, 17), shape=(3, 4, 3)), 9),
    case("strided", "small", Down((2, 1, 3), channels=(3, 4), **SMALL, padding=(0, 0, 1)), 9, 3),
    case(
        "depthwise", "small",
        Spec(kernel=(3, 1, 3), channels=(6, 6), groups=6, shape=(3, 4, 3)), 9,
    ),
    case("submanifold-k3", "full", Spec(channels=(64, 128), **SAME), 20_000),
    case("strided-k3", "full", Down(channels=(64, 128), **WIDE), 20_000, 6_000),
    case("depthwise-k5", "full", Spec(kernel=5, channels=(64, 64), groups=64, **SAME), 20_000),
    case("k1", "edge", Spec(kernel=1, channels=(64, 256), **SAME), 999),
    case("k2", "edge", Spec(kernel=2, channels=(18, 33), **SAME), 30_000),
    case("k5-dilated", "edge", Spec(kernel=5, channels=(18, 33), dilation=2, **SAME), 3_000),
    case("k7-of-343-taps", "edge", Spec(kernel=7, channels=(16, 16), **SAME), 3_000),
    case("groups-2", "edge", Spec(channels=(64, 80), groups=2, **SAME), 3_000),
    case("one-channel", "edge", Spec(channels=(1, 1), bias=False, **SAME), 3_000),
    case("full", "edge", Spec(channels=(32, 32), shape=(16, 16, 16)), 4096),
    case("one-voxel", "edge", Spec(channels=(32, 32), **SAME), 1),
    case("no-voxels", "edge", Spec(channels=(32, 32), **SAME), 0),
    case("hash-k3", "edge", Spec(channels=(2, 3), **FAR), 20_000),
    case(
        "hash-strided", "edge",
        Down(channels=(3, 2), **FAR, out_shape=(136, 128, 128)), 20_000, 9_000,
    ),
    *PATCHES,
    case("huge", "huge", HUGE, 4_300_000, dtypes=(BFLOAT16,)),
)  # fmt: skip
