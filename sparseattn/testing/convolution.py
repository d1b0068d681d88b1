"""Convolution ops held against the tolerance rule: seeded inputs, results, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.structures.voxel_tensor import VoxelTensor
from sparseattn.testing.tolerance import Judgement, judge, require

Convolve = Callable[..., Any]


@dataclass(frozen=True)
class ConvSpec:
    """What inputs to make.

    channels: C_in and C_out. stride: None for a submanifold convolution. keep: active patches of
    every sample, or "ragged": another number in each, the first sample none. layout: "contiguous";
    "channels-first" in memory; "strided": every other channel of a larger tensor. dy_layout: the
    same, or "scalar", as out.sum() sends.
    """

    patch: int | tuple[int, int, int]
    kernel: int | tuple[int, int, int] = 3
    channels: tuple[int, int] = (3, 5)
    stride: int | tuple[int, int, int] | None = None
    padding: int | tuple[int, int, int] = 0
    dilation: int | tuple[int, int, int] = 1
    groups: int = 1
    bias: bool = True
    batch: int = 2
    grid: tuple[int, int, int] = (2, 3, 2)
    keep: int | Literal["ragged"] = 5
    layout: Literal["contiguous", "channels-first", "strided"] = "contiguous"
    dy_layout: Literal["contiguous", "channels-first", "strided", "scalar"] = "contiguous"
    input_scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ConvInputs:
    """Arguments of a convolution, and the gradient sent into its features.

    mask: where the features are; a VoxelTensor stands for its voxels.
    """

    features: Tensor
    mask: PatchMask | VoxelTensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    options: dict[str, Any]

    def place(self, features: Tensor) -> Any:
        """Return features where these inputs are, a PatchGrid or a VoxelTensor."""
        if isinstance(self.mask, VoxelTensor):
            return self.mask.with_features(features)
        return PatchGrid(features, self.mask)

    def map(self, change: Callable[[Tensor], Tensor]) -> ConvInputs:
        """Pass every floating tensor through `change`."""
        bias = None if self.bias is None else change(self.bias)
        features, weight, dy = (change(t) for t in (self.features, self.weight, self.dy))
        return replace(self, features=features, weight=weight, bias=bias, dy=dy)

    def to(self, dtype: torch.dtype) -> ConvInputs:
        """Return the inputs in `dtype`."""
        return self.map(lambda tensor: tensor.to(dtype))


def make(
    spec: ConvSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ConvInputs:
    """Make the inputs of a spec: normal values, drawn on the host."""
    random = torch.Generator().manual_seed(spec.seed)
    scores = torch.rand((spec.batch, *spec.grid), generator=random)
    if spec.keep == "ragged":
        share = torch.linspace(0, 0.6, spec.batch)[:, None, None, None]
        mask = PatchMask.from_mask(scores < share)
    else:
        mask = PatchMask.from_scores(scores, spec.keep)
    patch, kernel, stride = (
        (n,) * 3 if isinstance(n, int) else n for n in (spec.patch, spec.kernel, spec.stride or 1)
    )
    inner, outer = spec.channels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(device, dtype)

    features = normal(mask.num_patches, *patch, inner, scale=spec.input_scale)
    weight = normal(outer, inner // spec.groups, *kernel)
    bias = normal(outer) if spec.bias else None
    pooled = (size // step for size, step in zip(patch, stride, strict=True))
    dy = lay_out(normal(mask.num_patches, *pooled, outer), spec.dy_layout)
    options: dict[str, Any] = {"dilation": spec.dilation, "groups": spec.groups}
    if spec.stride is not None:
        options |= {"stride": spec.stride, "padding": spec.padding}
    return ConvInputs(lay_out(features, spec.layout), mask.to(device), weight, bias, dy, options)


def lay_out(features: Tensor, layout: str) -> Tensor:
    """Return equal values in another memory layout; "scalar" makes all values the first one."""
    if layout == "scalar":
        return features.new_ones(()).expand(features.shape)
    if layout == "channels-first":
        return features.movedim(4, 1).contiguous().movedim(1, 4)
    if layout == "strided":
        wide = features.new_full((*features.shape[:4], 2 * features.shape[4]), torch.nan)
        wide[..., ::2] = features
        return wide[..., ::2]
    return features


def run(convolve: Convolve, inputs: ConvInputs) -> dict[str, Tensor]:
    """Return y and the gradients of the features, the weight and the bias."""
    names = ("features", "weight", "bias")
    tensors = {n: t for n in names if (t := getattr(inputs, n)) is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = convolve(
        inputs.place(leaves["features"]), leaves["weight"], leaves.get("bias"), **inputs.options
    ).features
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def judge_all(convolve: Convolve, reference: Convolve, inputs: ConvInputs) -> list[Judgement]:
    """Hold every result of `convolve` against `reference`, in float64 and in the inputs' dtype.

    All results are sums of products, so the squared sizes of their terms are what the reference
    makes of squared inputs, and the numbers of their terms what it makes of ones.
    """
    wide = inputs.to(torch.float64)
    truth, naive, result = run(reference, wide), run(reference, inputs), run(convolve, inputs)
    sizes = {name: s.sqrt() for name, s in run(reference, wide.map(torch.square)).items()}
    terms = run(reference, wide.map(torch.ones_like))
    return [judge(n, result[n], naive[n], truth[n], sizes[n], terms[n]) for n in truth]


def check(convolve: Convolve, reference: Convolve, inputs: ConvInputs) -> None:
    """Raise AssertionError with all errors if one result breaks the rule or has another dtype."""
    require(*judge_all(convolve, reference, inputs))
    kinds = {result.dtype for result in run(convolve, inputs).values()}
    if kinds != {inputs.features.dtype}:
        raise AssertionError(f"results are {kinds}; expected {inputs.features.dtype}")
