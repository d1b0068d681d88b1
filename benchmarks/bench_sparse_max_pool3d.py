"""Max pooling of active patches against torch's pool times the mask, in both dense layouts.

Levels are those of HySparK's encoder, windows of 2³ voxels; see bench_submanifold_conv3d for what
the dense rows are given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from sparseattn import PatchGrid, PatchMask, sparse_max_pool3d
from sparseattn.benchmarks.bench_submanifold_conv3d import GRID, LAYOUTS, Volume, rows_of
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work

CHANNELS = {96: 64, 48: 128, 24: 256, 12: 384}


def build(
    case: Case,
    sparse: Callable[..., PatchGrid] = sparse_max_pool3d,
    dense: Callable[..., Tensor] = max_pool3d,
    reduce: Callable[[Tensor], Tensor] = lambda windows: windows.max(1).values,
) -> Problem:
    """Make one level with random values; `reduce` pools windows [rows, 8, C], first one first."""
    random, channels = case.generator(), CHANNELS[case["size"]]
    patch, batch = case["size"] // GRID, case["batch"]
    scores = torch.rand((batch, GRID, GRID, GRID), generator=random, device=case.device)
    keep = max(1, round(case.share("density") * GRID**3))

    def index() -> PatchMask:
        return PatchMask.from_scores(scores, keep)

    mask = index()
    shape = (mask.num_patches, patch, patch, patch, channels)
    features = torch.randn(shape, generator=random, device=case.device).to(case.dtype)
    features.requires_grad_()

    def call(x: Tensor, mask: PatchMask) -> Tensor:
        return sparse(PatchGrid(x, mask), 2).features.flatten(0, 3)

    def reference(rows: Tensor, x: Tensor) -> Tensor:
        half = patch // 2
        places = torch.unravel_index(rows, (mask.num_patches, half, half, half))
        sub = torch.arange(8, device=x.device)
        at = [
            2 * c[:, None] + sub // step % 2 for c, step in zip(places[1:], (4, 2, 1), strict=True)
        ]
        return reduce(x[places[0][:, None], at[0], at[1], at[2]])

    sites, size = features.shape[:4].numel(), features.element_size()
    moved = size * channels * sites * 9 / 8
    providers = dense_providers(features, mask, dense, reference)
    return Problem(
        inputs=(features,),
        providers=(Provider("sparseattn", call, index, ours=True), *providers),
        reference=reference,
        work=Work(
            channels * sites, moved, channels * sites, moved,
            channels * batch * case["size"] ** 3,
        ),
        density=keep / GRID**3,
    )  # fmt: skip


def dense_providers(
    features: Tensor, mask: PatchMask, pool: Callable[..., Tensor], of_active: Callable[..., Tensor]
) -> list[Provider]:
    """Return torch's pool times the mask, channels first and last; sites are rows of both."""
    made = PatchGrid(features.detach(), mask).to_dense()
    half = features.shape[1] // 2
    active = mask.to_dense(half)[:, None].to(features.dtype)

    def provider(name: str, layout: torch.memory_format) -> Provider:
        volume = made.contiguous(memory_format=layout)

        def call(x: Tensor) -> Tensor:
            y = pool(Volume.apply(x, volume, mask), 2) * active
            last = layout == torch.channels_last_3d
            return y.permute(0, 2, 3, 4, 1).flatten(0, 3) if last else rows_of(y)

        return Provider(f"{pool.__name__} x mask{name}", call, dense=True, reference=reference)

    def reference(rows: Tensor, x: Tensor) -> Tensor:
        spots = torch.unravel_index(rows, active[:, 0].shape)
        place = mask.table[spots[0], spots[1] // half, spots[2] // half, spots[3] // half].long()
        sites = place.clamp_min(0)
        for spot in spots[1:]:
            sites = sites * half + spot % half
        return torch.where((place >= 0)[:, None], of_active(sites, x), 0)

    return [provider(name, layout) for name, layout in LAYOUTS.items()]


BENCHMARK = Benchmark(
    op="sparse_max_pool3d",
    build=build,
    axes={"batch": (1,), "size": (96, 48, 24, 12), "density": (0.1, 0.25, 0.5)},
    cuda_axes={"batch": (1, 4)},
    small={"size": (12,), "density": (0.25,)},
)
