"""Building the kernel map of a 3x3x3 convolution of voxels, each way, against spconv's index.

The voxels lie near a wavy surface across a volume of size³, in random order; `stride` 2 has the
padding 1 and finds the sites of its output, too. What counts is the mode "index"; "forward" only
shows that the maps are right: it sums, through them, weighted features of the voxels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work
from sparseattn.structures.kernel_map import KernelMap
from sparseattn.structures.site_lookup import Window
from sparseattn.structures.site_sets import SiteSet, touched

TAPS = 27
LARGEST_TABLE = 2**31  # bytes that a table may take here


def build(case: Case) -> Problem:
    """Make voxels, and features and weights to try maps with."""
    random, stride = case.generator(), case["stride"]
    sites, size = surface(case, random), case["size"]
    window = Window((3,) * 3, (stride,) * 3, (1,) * 3, (1,) * 3)
    half = -(-size // stride)

    def made(method: str) -> Callable[[], Tensor]:
        def index() -> Tensor:
            fine = SiteSet(sites, (size,) * 3, 1, [])
            coarse = fine if stride == 1 else touched(fine, window, (half,) * 3)
            return KernelMap.between(fine, coarse, window, method).rows

        return index

    features = torch.randn((case["voxels"], 1), generator=random, device=case.device)
    weights = torch.randn(TAPS, generator=random, device=case.device)
    inputs = (features.to(case.dtype), weights.to(case.dtype))
    truth = made("search")()

    def reference(rows: Tensor, features: Tensor, weights: Tensor) -> Tensor:
        read = truth[:, rows].long()
        found = torch.where((read >= 0)[..., None], features[read], 0)
        return (found * weights[:, None, None]).sum(0)

    def why_not(method: str) -> str:
        if method == "table" and 4 * (size + 2) ** 3 > LARGEST_TABLE:
            return f"a table takes {4 * (size + 2) ** 3 / 1e9:.0f} GB"
        return (
            "its kernel runs on a GPU" if method == "hash" and features.device.type == "cpu" else ""
        )

    pairs = float((truth >= 0).sum())
    return Problem(
        inputs=inputs,
        providers=(
            Provider("sparseattn", summed, made("auto"), ours=True),
            *(
                Provider(method, summed, made(method), unavailable=why_not(method))
                for method in ("table", "hash", "search")
            ),
            spconv_provider(sites, size, stride),
        ),
        reference=reference,
        work=Work(2 * pairs, 4 * (truth.numel() + pairs), 0, 0, 2 * truth.numel()),
        density=case["voxels"] / size**3,
    )


def surface(case: Case, random: torch.Generator) -> Tensor:
    """Return coordinates int32 [voxels, 4] near a wavy surface, in random order."""
    size, count = case["size"], case["voxels"]
    thick = math.ceil(2 * count / size**2)
    place = torch.randperm(thick * size**2, generator=random, device=case.device)[:count]
    x, y, depth = place // (size * thick), place // thick % size, place % thick
    wave = torch.sin(x * (6.0 * math.pi / size)) * torch.cos(y * (4.0 * math.pi / size))
    z = ((size - thick) * (0.5 + 0.45 * wave)).long().clamp(0, size - thick) + depth
    return torch.stack((torch.zeros_like(x), x, y, z), 1).int()


def summed(features: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sum weighted features through rows [taps, n]."""
    padded = torch.cat((features, features.new_zeros((1, 1))))  # the last is read where none is
    out = features.new_zeros((rows.shape[1], 1), dtype=torch.float32)
    for row, weight in zip(rows, weights, strict=True):
        out += padded[row.long()].float() * weight.float()
    return out.to(features.dtype)


def spconv_provider(sites: Tensor, size: int, stride: int) -> Provider:
    """Return spconv's index; on a CPU with one thread, since with two it is wrong now and then."""
    if importlib.util.find_spec("spconv") is None:
        return Provider("spconv", summed, unavailable="spconv is not installed")
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    places = sites.contiguous()

    def index() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if places.is_cuda else 1)
        try:
            return ops.get_indice_pairs(
                places, 1, [size] * 3, ConvAlgo.Native, [3] * 3, [stride] * 3, [1] * 3, [1] * 3,
                [0] * 3, stride == 1, False,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)

    def through(features: Tensor, weights: Tensor, made: Any) -> Tensor:
        out, pairs, counts = made
        half = -(-size // stride)
        key = (out[:, 1].long() * half + out[:, 2]) * half + out[:, 3]
        order = (
            torch.arange(len(key), device=key.device) if stride == 1 else key.argsort().argsort()
        )
        rows = pairs.new_full((TAPS, len(out)), -1)
        found = counts.tolist()
        if stride == 1:  # spconv counts the first half of the taps; every voxel reads itself
            found[TAPS // 2 :] = [0, *found[: TAPS // 2][::-1]]
            rows[TAPS // 2] = order
        for tap, count in enumerate(found):
            read, write = pairs[0, tap, :count].long(), pairs[1, tap, :count].long()
            rows[tap, order[write]] = read.to(rows.dtype)
        return summed(features, weights, rows)

    return Provider("spconv", through, index)


BENCHMARK = Benchmark(
    op="kernel_map",
    build=build,
    axes={"voxels": (200_000,), "size": (128, 512, 2048), "stride": (1, 2)},
    cuda_axes={"voxels": (200_000, 1_000_000)},
    small={"voxels": (300,), "size": (16,), "stride": (1,)},
    dtypes=("float32",),
)
