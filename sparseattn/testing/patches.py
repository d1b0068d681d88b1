"""Ops on a PatchGrid without weights, held against the tolerance rule on two implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.testing.convolution import ConvSpec, lay_out, make
from sparseattn.testing.tolerance import judge, require


@dataclass(frozen=True)
class PoolSpec:
    """A window, the patches it pools, and their values."""

    patch: int | tuple[int, int, int]
    kernel: int | tuple[int, int, int] = 2
    stride: int | tuple[int, int, int] | None = None
    padding: int | tuple[int, int, int] = 0
    channels: int = 3
    batch: int = 2
    grid: tuple[int, int, int] = (2, 3, 2)
    keep: int | Literal["ragged"] = 5
    layout: Literal["contiguous", "channels-first", "strided"] = "contiguous"

    @property
    def window(self) -> dict[str, Any]:
        """The arguments of a pool that say which window."""
        return {"kernel_size": self.kernel, "stride": self.stride, "padding": self.padding}

    def grid_of(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PatchGrid:
        """Make features, of which many are equal: halves between -3 and 3."""
        spec = ConvSpec(
            self.patch, 1, channels=(self.channels, 1), batch=self.batch, grid=self.grid,
            keep=self.keep,
        )  # fmt: skip
        inputs = make(spec, torch.float64, device)
        features = (inputs.features * 2).round().div(2).to(dtype)
        return inputs.place(lay_out(features, self.layout))


POOLS = {
    "aligned": PoolSpec(4),
    "aligned-to-one-voxel": PoolSpec(2),
    "three-sizes": PoolSpec((2, 6, 4), (2, 3, 1), (2, 3, 2)),
    "gaps": PoolSpec(4, 1, 2),
    "overlapping": PoolSpec(4, 3, 2, 1),
    "overlapping-one-axis": PoolSpec((1, 2, 3), (1, 3, 3), (1, 1, 3), (0, 1, 0)),
    "stride-1": PoolSpec(2, 3, 1, 1, batch=1),
    "patches-of-one-voxel": PoolSpec(1, 3, 1, 1, grid=(3, 3, 3)),
    "two-patches-away": PoolSpec(1, (1, 5, 1), 1, (0, 2, 0), grid=(2, 5, 2)),
    "wide-stride": PoolSpec(4, 4, 2, 1, batch=1),
    "channels-67": PoolSpec(2, channels=67, batch=1, keep=2),
    "empty-sample": PoolSpec(2, batch=3, keep="ragged"),
    "no-patches": PoolSpec(2, keep=0),
    "no-samples": PoolSpec(2, batch=0),
    "full": PoolSpec(2, 3, 2, 1, keep=12),
    "strided": PoolSpec(4, 3, 2, 1, layout="strided"),
    "channels-first": PoolSpec(2, layout="channels-first"),
}
FEW = ("aligned", "overlapping-one-axis", "patches-of-one-voxel", "channels-67", "empty-sample")


def run_pool(
    op: Callable[..., PatchGrid], x: PatchGrid, *, ones: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Return y and the gradient of the features for the same one sent in every dtype, or ones."""
    leaf = x.features.detach().requires_grad_()
    y = op(x.with_features(leaf), **options).features
    random = torch.Generator().manual_seed(1)
    sent = torch.randn(y.shape, generator=random).mul(8).round().div(8).to(y)
    sent = torch.ones_like(y) if ones else sent
    return {"y": y.detach(), "dfeatures": torch.autograd.grad(y, leaf, sent)[0]}


def check_pool(op: Callable[..., PatchGrid], spec: PoolSpec, x: PatchGrid, **options: Any) -> None:
    """Raise AssertionError if a result of `op(impl=...)` breaks the rule."""
    found = run_pool(op, x, **spec.window, **options)
    options |= {"impl": "reference", **spec.window}
    truth = run_pool(op, x.to(torch.float64), **options)
    naive = run_pool(op, x.to(torch.float32), **options)
    # what is sent has the size of 1, so the size of the terms is what ones give; 0: nobody reads
    size = run_pool(op, x.to(torch.float64), ones=True, **options)["dfeatures"]
    require(
        judge("y", found["y"], naive["y"].to(x.dtype), truth["y"]),
        judge("dx", found["dfeatures"], naive["dfeatures"].to(x.dtype), truth["dfeatures"], size),
    )
    kinds = {result.dtype for result in found.values()}
    if kinds != {x.dtype}:
        raise AssertionError(f"results are {kinds}; expected {x.dtype}")
