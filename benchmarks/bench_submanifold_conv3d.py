"""Submanifold convolution against dense convolution times the mask, in both dense layouts.

The layers are those of HySparK's encoder: a volume of size³ voxels in 6³ patches, with the channels
of its level; `depthwise` 1 is the depthwise convolution of the same level. The dense rows start
from a volume in their own layout, which is not timed; the gather of its gradient at the kept
patches is, a small share of them. The index is the PatchMask, built from scores.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv3d, pad

from sparseattn import PatchGrid, PatchMask, sparse_conv3d, submanifold_conv3d
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work

GRID = 6
CHANNELS = {96: (32, 64), 48: (64, 128), 24: (128, 256), 12: (256, 384)}
LAYOUTS = {"": torch.contiguous_format, " channels_last": torch.channels_last_3d}


class Volume(torch.autograd.Function):
    """Stands for features scattered into a volume: hands out one that was made before."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, volume: Tensor, mask: PatchMask) -> Tensor:
        """Return the volume."""
        ctx.mask = mask
        return volume.view_as(volume)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return what the volume's gradient is at the active patches."""
        return PatchGrid.from_dense(gradient, ctx.mask).features, None, None


def build(case: Case, stride: int = 1) -> Problem:
    """Make one layer with random values; with a stride it is `sparse_conv3d` of patches."""
    random, (inner, outer) = case.generator(), CHANNELS[case["size"]]
    groups, outer = (inner, inner) if case["depthwise"] else (1, outer)
    patch, batch = case["size"] // GRID, case["batch"]
    scores = torch.rand((batch, GRID, GRID, GRID), generator=random, device=case.device)
    keep = max(1, round(case.share("density") * GRID**3))

    def index() -> PatchMask:
        return PatchMask.from_scores(scores, keep)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=case.device)
        return values.to(case.dtype).requires_grad_()

    mask = index()
    features = normal(mask.num_patches, patch, patch, patch, inner)
    weight = normal(outer, inner // groups, 3, 3, 3)

    def sparse(x: Tensor, weight: Tensor, mask: PatchMask) -> Tensor:
        given = PatchGrid(x, mask)
        if stride == 1:
            return submanifold_conv3d(given, weight, groups=groups).features.flatten(0, 3)
        y = sparse_conv3d(given, weight, stride=stride, padding=1, groups=groups)
        return y.features.flatten(0, 3)

    def reference(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        places = torch.stack(site_places(mask, patch // stride), 1)[rows] * steps
        return convolve_at(places, PatchGrid(x, mask).to_dense(), weight, groups)

    steps = torch.tensor((1, stride, stride, stride), device=case.device)

    active = mask.to_dense(patch // stride)[:, None].to(case.dtype)
    window = torch.ones((1, 1, 3, 3, 3), device=case.device)
    reached = conv3d(mask.to_dense(patch)[:, None].float(), window, stride=stride, padding=1)
    pairs = float((reached * active).sum())
    return Problem(
        inputs=(features, weight),
        providers=(
            Provider("sparseattn", sparse, index, ours=True),
            *dense_providers(features, mask, active, groups, stride),
        ),
        reference=reference,
        work=work_of(features, weight, pairs, active.numel(), stride),
        density=keep / GRID**3,
        sums=True,
    )


def dense_providers(
    features: Tensor, mask: PatchMask, active: Tensor, groups: int, stride: int
) -> list[Provider]:
    """Return conv3d times the mask, channels first and channels last; sites are rows of both."""
    made, last = PatchGrid(features.detach(), mask).to_dense(), torch.channels_last_3d

    def provider(name: str, layout: torch.memory_format) -> Provider:
        volume = made.contiguous(memory_format=layout)

        def call(x: Tensor, weight: Tensor) -> Tensor:
            weight = weight.contiguous(memory_format=layout)
            x = Volume.apply(x, volume, mask)
            y = conv3d(x, weight, stride=stride, padding=1, groups=groups) * active
            return y.permute(0, 2, 3, 4, 1).flatten(0, 3) if layout == last else rows_of(y)

        return Provider(f"conv3d x mask{name}", call, dense=True, reference=reference)

    def reference(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        spots = torch.unravel_index(rows, (active.shape[0], *active.shape[2:]))
        places = torch.stack((spots[0], *(stride * spot for spot in spots[1:])), 1)
        found = convolve_at(places, PatchGrid(x, mask).to_dense(), weight, groups)
        return found * active[spots[0], 0, spots[1], spots[2], spots[3], None]

    return [provider(name, layout) for name, layout in LAYOUTS.items()]


def rows_of(y: Tensor) -> Tensor:
    """Return [sites, C] as a view of one sample, channels first; a copy of more samples."""
    return y[0].flatten(1).mT if y.shape[0] == 1 else y.movedim(1, 4).flatten(0, 3)


def site_places(mask: PatchMask, patch: int) -> tuple[Tensor, ...]:
    """Return sample, x, y and z of every active site, in the order of the features."""
    inside = torch.arange(patch, device=mask.device)
    sample, *corner = mask.coordinates()
    shape = (mask.num_patches, patch, patch, patch)
    views = ((1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    at = [
        (c.view(-1, 1, 1, 1) * patch + inside.view(v)).expand(shape).flatten()
        for c, v in zip(corner, views, strict=True)
    ]
    return sample.view(-1, 1, 1, 1).expand(shape).flatten(), *at


def convolve_at(places: Tensor, volume: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return a 3x3x3 convolution of a volume at some places [rows, 4], one tap after the other."""
    bordered = pad(volume, (1,) * 6)
    sample, x, y, z = places.unbind(1)
    taps = weight.unflatten(0, (groups, -1)).flatten(3).unbind(3)  # [G, C_out / G, C_in / G] each
    out = volume.new_zeros(())
    for (a, b, c), tap in zip(itertools.product(range(3), repeat=3), taps, strict=True):
        read = bordered[sample, :, x + a, y + b, z + c].unflatten(1, (groups, -1))
        out = out + torch.einsum("ngi,goi->ngo", read, tap)
    return out.flatten(1)


def work_of(features: Tensor, weight: Tensor, pairs: float, sites: int, stride: int) -> Work:
    """Count the taps that find a site, and every value once."""
    outer, inner = weight.shape[:2]
    rows = features.shape[:4].numel() // stride**3
    moved = features.numel() + rows * outer + weight.numel()
    size = features.element_size()
    return Work(
        flops=2 * pairs * inner * outer,
        bytes=size * moved,
        backward_flops=4 * pairs * inner * outer,
        backward_bytes=size * (2 * features.numel() + rows * outer + 2 * weight.numel()),
        dense_flops=2 * 27 * sites * inner * outer,
    )


BENCHMARK = Benchmark(
    op="submanifold_conv3d",
    build=build,
    axes={
        "batch": (1,),
        "size": (96, 48, 24, 12),
        "depthwise": (0, 1),
        "density": (0.1, 0.25, 0.5),
    },
    cuda_axes={"batch": (1, 4)},
    small={"size": (12,), "depthwise": (1,), "density": (0.25,)},
)
