"""What the benchmarks of convolutions of voxels share: the sites, dense peers, and spconv.

The sites are thick surfaces: where a smooth random field is nearest to its median. Layers have
3x3x3 taps. Features are given as rows, so dense peers start from a volume in their own layout,
which is not timed; the gather of its gradient at the active voxels is, a small share of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sparseattn import VoxelTensor
from sparseattn.benchmarks.registry import Case, Provider, Work

LAYOUTS = {"": torch.contiguous_format, " channels_last": torch.channels_last_3d}
Dense = Callable[[Tensor, Tensor], Tensor]


class Volume(torch.autograd.Function):
    """Stands for features scattered into a volume: hands out one that was made before."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, volume: Tensor, places: Tensor) -> Tensor:
        """Return the volume."""
        ctx.places = places
        return volume.view_as(volume)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return what the volume's gradient is at the active voxels."""
        sample, x, y, z = ctx.places.long().unbind(1)
        return gradient[sample, :, x, y, z], None, None


def surfaces(case: Case) -> VoxelTensor:
    """Return the sites of a case: the share `density` of volumes of `size` voxels a side."""
    size, random = case["size"], case.generator()
    shape = (case["batch"], 1, *(max(2, size // 8),) * 3)
    field = torch.randn(shape, generator=random, device=case.device)
    field = interpolate(field, size=(size,) * 3, mode="trilinear")[:, 0]
    far = (field - field.median()).abs().flatten()
    count = max(1, round(case.share("density") * far.numel()))
    active = torch.zeros_like(far, dtype=torch.bool)
    active[far.topk(count, largest=False).indices] = True
    places = active.view_as(field).nonzero().to(torch.int32)
    return VoxelTensor(far.new_ones((count, 1)), places, (size,) * 3, case["batch"])


def fresh(sites: VoxelTensor, features: Tensor) -> VoxelTensor:
    """Return features on voxels of which nothing is known yet."""
    return VoxelTensor(features, sites.coordinates, sites.spatial_shape, sites.batch_size)


def dense_providers(
    name: str, dense: Dense, made: Tensor, sites: VoxelTensor, out: VoxelTensor,
    reference: Callable[..., Tensor],
) -> list[Provider]:  # fmt: skip
    """Return a dense convolution times the mask, channels first and channels last.

    reference: (places, features, weight) -> the convolution at places [rows, 4] of the output.
    """
    sample, x, y, z = out.coordinates.long().unbind(1)
    mask = made.new_zeros((out.batch_size, 1, *out.spatial_shape))
    mask[sample, 0, x, y, z] = 1

    def provider(suffix: str, layout: torch.memory_format) -> Provider:
        volume = made.contiguous(memory_format=layout)

        def call(features: Tensor, weight: Tensor) -> Tensor:
            weight = weight.contiguous(memory_format=layout)
            y = dense(Volume.apply(features, volume, sites.coordinates), weight) * mask
            return y.movedim(1, 4).flatten(0, 3)

        return Provider(f"{name} x mask{suffix}", call, dense=True, reference=at_rows)

    def at_rows(rows: Tensor, features: Tensor, weight: Tensor) -> Tensor:
        places = torch.stack(torch.unravel_index(rows, (out.batch_size, *out.spatial_shape)), 1)
        b, i, j, k = places.unbind(1)
        return reference(places, features, weight) * mask[b, 0, i, j, k, None]

    return [provider(suffix, layout) for suffix, layout in LAYOUTS.items()]


def spconv_provider(sites: VoxelTensor, weight: Tensor, stride: int) -> Provider:
    """Return spconv; on a CPU with one thread, since with two its index is wrong now and then.

    With a stride its rows are in an order of its own; they are put in raster order, a small share.
    """
    name, outer, inner = "spconv", weight.shape[0], weight.shape[1]
    if importlib.util.find_spec("spconv") is None:
        return Provider(name, lambda *_: weight, unavailable="spconv is not installed")
    if weight.dtype == torch.bfloat16:
        return Provider(name, lambda *_: weight, unavailable="spconv has no bfloat16")
    if weight.shape[1] == 1 and outer > 1:
        return Provider(name, lambda *_: weight, unavailable="spconv has no depthwise convolution")
    import spconv.pytorch as spconv

    options = {"bias": False, "padding": 1, "indice_key": "bench"}
    if stride == 1:
        module = spconv.SubMConv3d(inner, outer, 3, **options)
    else:
        module = spconv.SparseConv3d(inner, outer, 3, stride=stride, **options)
    module = module.to(weight.device, weight.dtype)

    def convolve(x: Tensor, weight: Tensor, given: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if x.is_cuda else 1)
        try:
            turned = weight.permute(0, 2, 3, 4, 1).contiguous()
            return torch.func.functional_call(
                module, {"weight": turned}, (given.replace_feature(x),)
            )
        finally:
            torch.set_num_threads(threads)

    def run(x: Tensor, weight: Tensor, made: tuple[Any, Tensor | None]) -> Tensor:
        given, order = made
        y: Tensor = convolve(x, weight, given).features
        return y if order is None else y[order]

    def index() -> tuple[Any, Tensor | None]:
        features = weight.new_ones((sites.num_voxels, inner))
        places = sites.coordinates.contiguous()
        made = spconv.SparseConvTensor(
            features, places, list(sites.spatial_shape), sites.batch_size
        )
        with torch.no_grad():
            y = convolve(features, weight.detach(), made)
        if stride == 1:
            return made, None
        key = y.indices[:, 0].long()
        for axis, size in enumerate(y.spatial_shape, 1):
            key = key * size + y.indices[:, axis]
        return made, key.argsort()

    return Provider(name, run, index, backward=weight.is_cuda)  # its backward asks for a stream


def work_of(features: Tensor, weight: Tensor, rows: int, pairs: int, dense: int) -> Work:
    """Count pairs of sites, and every value once; `dense` is the number of pairs of a full grid."""
    outer = weight.numel() // (weight.shape[1] * 27)
    each = 2 * weight.numel() / 27
    size = features.element_size()
    moved = features.numel() + rows * outer + weight.numel()
    return Work(
        flops=pairs * each,
        bytes=size * moved,
        backward_flops=2 * pairs * each,
        backward_bytes=size * (2 * features.numel() + rows * outer + 2 * weight.numel()),
        dense_flops=dense * each,
    )
