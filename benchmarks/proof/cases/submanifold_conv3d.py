"""Cases of submanifold_conv3d: levels of HySparK's encoder, depthwise and not, and odd windows.

`case` serves `sparse_conv3d` of patches, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof import sums
from proof.case import BFLOAT16, Arguments, Case, Size
from sparseattn.ops.sparse_conv3d import sparse_conv3d
from sparseattn.ops.submanifold_conv3d import submanifold_conv3d
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.testing.convolution import ConvSpec as Spec


def convolve(
    impl: Any, where: Tensor | PatchMask, features: Tensor, weight: Tensor, bias: Tensor | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Convolve [B, keep, px, py, pz, C] on the patches of highest score; or [P, ...] on a mask."""
    if isinstance(where, PatchMask):
        rows, mask = features, where
    else:  # at every step a new mask, as in masked image modelling
        rows, mask = features.flatten(0, 1), PatchMask.from_scores(where, features.shape[1])
    op = sparse_conv3d if "stride" in options else submanifold_conv3d
    y = op(PatchGrid(rows, mask), weight, bias, **options, impl=impl).features
    return y.unflatten(0, features.shape[:-4])


TRITON, REFERENCE = partial(convolve, "triton"), partial(convolve, "reference")


def case(name: str, size: Size, spec: Spec, **more: Any) -> Case:
    """The case of a spec; its mask is drawn in the call, where samples keep equally many."""
    patch = (spec.patch,) * 3 if isinstance(spec.patch, int) else spec.patch
    kernel = (spec.kernel,) * 3 if isinstance(spec.kernel, int) else spec.kernel
    inner, outer = spec.channels
    ragged = spec.keep == "ragged"
    steps = {} if spec.stride is None else {"stride": spec.stride, "padding": spec.padding}

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(spec.seed + seed)

        def normal(*shape: Any) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

        where: Any = torch.rand((spec.batch, *spec.grid), generator=random, device=device)
        lead: tuple[Any, ...] = (spec.batch, spec.keep)
        if ragged:  # the first sample keeps none
            share = torch.linspace(0, 0.6, spec.batch, device=device)[:, None, None, None]
            where = PatchMask.from_mask(where < share)
            lead = (where.num_patches,)
        return {
            "where": where, "features": normal(*lead, *patch, inner),
            "weight": normal(outer, inner // spec.groups, *kernel),
            "bias": normal(outer) if spec.bias else None,
            "dilation": spec.dilation, "groups": spec.groups, **steps,
        }  # fmt: skip

    return Case(
        name, size, make, TRITON, REFERENCE, ("y",),
        ("features", "weight", "bias") if spec.bias else ("features", "weight"),
        () if ragged or spec.batch == 1 else ("where", "features", "y"),
        sums.sizes(REFERENCE), terms=sums.terms(REFERENCE), **more,
    )  # fmt: skip


def level(patch: int, channels: tuple[int, int], batch: int, **more: Any) -> Spec:
    """A convolution of HySparK's encoder: 54 of 6^3 patches, a quarter, in every sample."""
    return Spec(patch, channels=channels, batch=batch, grid=(6, 6, 6), keep=54, **more)


DEPTHWISE = {"channels": (18, 18), "groups": 18}
EDGES = {
    "k1": Spec(4, 1, channels=(64, 256)),
    "k2": Spec(2, 2),
    "k5": Spec(3, 5, channels=(18, 33)),
    "k5-three-patches-away": Spec(1, (1, 5, 1), dilation=3),
    "three-sizes": Spec((1, 2, 3), (1, 3, 2), dilation=(1, 2, 3)),
    "p5": Spec(5, channels=(48, 80)),
    "p16-one-channel": Spec(16, channels=(1, 1), keep=2),
    "to-one-channel": Spec(2, channels=(7, 1), bias=False),
    "groups-2": Spec(2, channels=(64, 80), groups=2),
    "depthwise-k5": Spec(3, 5, **DEPTHWISE),
    "depthwise-even": Spec(3, (2, 4, 1), dilation=2, bias=False, **DEPTHWISE),
    "depthwise-multiplier": Spec(2, channels=(4, 12), groups=4),
    "empty-sample": Spec(2, channels=(64, 64), batch=3, keep="ragged"),
    "empty-sample-depthwise": Spec(4, batch=3, keep="ragged", **DEPTHWISE),
    "full": Spec(2, keep=12),
    "no-patches": Spec(2, keep=0),
}
HUGE = {"batch": 38, "grid": (6, 6, 6), "keep": 216}
CASES = (
    case("k3", "small", Spec((2, 1, 2), (3, 1, 3), channels=(3, 17), grid=(2, 2, 1), keep=3)),
    case(
        "depthwise", "small",
        Spec((1, 2, 2), (3, 1, 3), channels=(6, 6), groups=6, grid=(2, 2, 1), keep=3),
    ),
    case("stem-p16", "full", level(16, (1, 32), 2)),
    case("depthwise-p16", "full", level(16, (32, 32), 2, groups=32)),
    case("conv-p8", "full", level(8, (64, 128), 2)),
    case("conv-p4", "full", level(4, (128, 256), 10)),  # so many patches that tiles go by place
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
    case("huge", "huge", Spec(16, channels=(64, 64), **HUGE), dtypes=(BFLOAT16,)),
    case(
        "huge-depthwise", "huge", Spec(16, channels=(64, 64), groups=64, **HUGE),
        dtypes=(BFLOAT16,),
    ),
)  # fmt: skip
