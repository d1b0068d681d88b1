"""Inputs of convolutions of voxels: seeded sites in any order, weights, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.structures.site_lookup import Three, Window
from sparseattn.structures.site_sets import grown, touched
from sparseattn.structures.voxel_tensor import VoxelTensor
from sparseattn.testing.convolution import ConvInputs


@dataclass(frozen=True)
class VoxelSpec:
    """What inputs to make.

    channels: C_in and C_out. share: how much of the volume is active, or "ragged": another share in
    each sample, none in the first. out: where the output is active: "found" leaves it to the op,
    "input" takes the voxels of x, "random" draws as many as `share` says in a volume of out_shape.
    layout: "contiguous"; "strided": every other channel of a larger tensor. dy_layout: the same, or
    "scalar", as out.sum() sends. Coordinates are shuffled and lie column by column in memory.
    """

    op: str = "submanifold_conv3d"
    kernel: int | Three = 3
    channels: tuple[int, int] = (3, 5)
    stride: int | Three = 1
    padding: int | Three = 0
    output_padding: int | Three = 0
    dilation: int | Three = 1
    groups: int = 1
    bias: bool = True
    batch: int = 2
    shape: Three = (5, 6, 7)
    share: float | Literal["ragged"] = 0.3
    out: Literal["found", "input", "random"] = "found"
    out_shape: Three = (1, 1, 1)
    layout: Literal["contiguous", "strided"] = "contiguous"
    dy_layout: Literal["contiguous", "strided", "scalar"] = "contiguous"
    input_scale: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Return the op's keywords, but for out_sites."""
        options: dict[str, Any] = {"dilation": self.dilation, "groups": self.groups}
        if self.op != "submanifold_conv3d":
            options |= {"stride": self.stride, "padding": self.padding}
        if self.op == "sparse_conv_transpose3d" and self.out == "found":
            options["output_padding"] = self.output_padding
        return options


def make(
    spec: VoxelSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ConvInputs:
    """Make the inputs of a spec: normal values, drawn on the host."""
    random = torch.Generator().manual_seed(spec.seed)
    kernel = (spec.kernel,) * 3 if isinstance(spec.kernel, int) else spec.kernel
    inner, outer = spec.channels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(device, dtype)

    def draw(shape: Three) -> VoxelTensor:
        share = torch.full((spec.batch, 1, 1, 1), 0.0 if spec.share == "ragged" else spec.share)
        if spec.share == "ragged":
            share[:, 0, 0, 0] = torch.linspace(0, 0.6, spec.batch)
        places = (torch.rand((spec.batch, *shape), generator=random) < share).nonzero().int()
        places = places[torch.randperm(len(places), generator=random)].mT.contiguous().mT
        return VoxelTensor(places.new_ones((len(places), 1)).float(), places, shape, spec.batch)

    sites, options = draw(spec.shape).to(device), spec.options()
    if spec.out != "found":
        chosen = sites if spec.out == "input" else draw(spec.out_shape).to(device)
        options["out_sites"] = chosen
    features = normal(sites.num_voxels, inner, scale=spec.input_scale)
    turned = spec.op == "sparse_conv_transpose3d"
    weight = normal(
        *((inner, outer // spec.groups) if turned else (outer, inner // spec.groups)), *kernel
    )
    bias = normal(outer) if spec.bias else None
    count = _outputs(spec, sites, options.get("out_sites", sites))
    dy = _lay_out(normal(count, outer), spec.dy_layout)
    return ConvInputs(_lay_out(features, spec.layout), sites, weight, bias, dy, options)


def _outputs(spec: VoxelSpec, sites: VoxelTensor, given: VoxelTensor) -> int:
    """Return how many sites the output is active at."""
    if spec.op == "submanifold_conv3d" or spec.out != "found":
        return given.num_voxels
    numbers = (spec.kernel, spec.stride, spec.padding, spec.dilation, spec.output_padding)
    kernel, stride, low, dilation, more = ((n,) * 3 if isinstance(n, int) else n for n in numbers)
    window = Window(kernel, stride, low, dilation)
    ups = spec.op == "sparse_conv_transpose3d"
    shape = [
        (n - 1) * s - 2 * p + span + 1 + m if ups else (n + 2 * p - span - 1) // s + 1
        for n, s, p, span, m in zip(spec.shape, stride, low, window.spans, more, strict=True)
    ]
    derive = grown if ups else touched
    return len(derive(sites.sites, window, (shape[0], shape[1], shape[2])).coordinates)


def _lay_out(features: Tensor, layout: str) -> Tensor:
    """Return equal values in another memory layout; "scalar" makes all values one."""
    if layout == "scalar":
        return features.new_ones(()).expand(features.shape)
    if layout == "strided":
        wide = features.new_full((len(features), 2 * features.shape[1]), torch.nan)
        wide[:, ::2] = features
        return wide[:, ::2]
    return features
