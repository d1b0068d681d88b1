"""Inputs that between them reach every launch row of convolution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ..cases import Case
from . import backward, backward_dx, forward, map_backward, map_forward, map_rows, tuning
from .call import Table, Window

TABLES: dict[str, tuple[Any, ...]] = {
    "sparse_conv3d_fwd_kernel": tuning.FORWARD,
    "sparse_conv3d_bwd_dw_kernel": tuning.BACKWARD_DW,
    "sparse_conv3d_depthwise_fwd_kernel": tuning.DEPTHWISE,
    "sparse_conv3d_depthwise_bwd_dw_kernel": tuning.DEPTHWISE_DW,
    "sparse_conv3d_strided_bwd_dx_kernel": tuning.STRIDED_DX,
    "sparse_conv3d_strided_depthwise_bwd_dx_kernel": tuning.DEPTHWISE,
    "sparse_conv3d_map_fwd_kernel": tuning.FORWARD,
    "sparse_conv3d_map_bwd_dw_kernel": tuning.MAP_BACKWARD_DW,
    "sparse_conv3d_map_depthwise_fwd_kernel": tuning.DEPTHWISE,
    "sparse_conv3d_map_depthwise_bwd_dw_kernel": tuning.DEPTHWISE_DW,
}


class Form(NamedTuple):
    """What the inputs are."""

    channels: tuple[int, int]
    dtype: torch.dtype
    groups: int = 1
    patch: int = 8
    kernel: int = 3
    patches: int = 64
    stride: int = 1


def cases(capability: int) -> Iterator[Case]:
    """Every row that such a GPU uses: plain; odd channels, wide windows; strides; small patches."""
    for hashed in (True, False):
        row, inputs = tuning.MAP_ROWS[0], "hash" if hashed else "table"
        for kernel in ("sparse_conv3d_map_insert_kernel", "sparse_conv3d_map_rows_kernel"):
            for symmetric in (True, False):
                name = inputs + (", symmetric" if symmetric else "")
                yield Case(kernel, row, name, partial(_make_map, hashed, symmetric))
    for kernel, table in TABLES.items():
        depthwise = "depthwise" in kernel
        for row in table:
            if row.capability != tuning.generation(capability):
                continue
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            wide = 256 if row.columns == tuning.ANY else row.columns
            plain = Form((max(wide, 64), wide), dtype)
            if depthwise:
                plain = Form((wide, wide), dtype, groups=wide)
            odd = plain._replace(channels=(plain.channels[0] - 15, wide - 15), kernel=5, patch=3)
            if depthwise:
                odd = odd._replace(groups=wide - 15)
            forms = {"plain": plain, "odd": odd}
            if not depthwise:
                forms["two groups"] = plain._replace(channels=(128, 2 * wide), groups=2)
            if kernel == "sparse_conv3d_fwd_kernel":
                forms["by place"] = plain._replace(patch=2, patches=1024)
            if "_map_" not in kernel:
                forms["stride 2"] = plain._replace(stride=2)
            if "_strided_" in kernel:  # a patch of 9 for odd channels, since 3 has one place left
                forms = {"stride 2": forms.pop("stride 2")} | {
                    name: form._replace(stride=3, patch=9) for name, form in forms.items()
                }
            for inputs, form in forms.items():
                name = f"{'bf16' if row.itemsize == 2 else 'fp32'} C {wide}, {inputs}"
                launch = _launch_map if "_map_" in kernel else _launch
                yield Case(kernel, row, name, partial(launch, kernel, form))


def _launch(kernel: str, form: Form) -> None:
    """Run one convolution of patches, or its weight gradient."""
    inner, outer = form.channels
    window = Window(
        (form.patch,) * 3, (form.kernel,) * 3, (form.stride,) * 3, (form.kernel // 2,) * 3,
        (1, 1, 1), form.groups,
    )  # fmt: skip
    x = torch.empty((form.patches, *window.patch, inner), dtype=form.dtype, device="cuda")
    neighbours = torch.empty((form.patches, 27), dtype=torch.int32, device="cuda")
    shape = (form.patches, *window.pooled)
    if kernel.endswith("bwd_dw_kernel"):
        dy = torch.empty((*shape, outer), dtype=form.dtype, device="cuda")
        backward.weight_gradient(x, dy, neighbours, window)
        return
    order = torch.empty((64, form.patches), dtype=torch.int32, device="cuda")
    weight = torch.empty(
        (outer, inner // form.groups, *window.kernel), dtype=form.dtype, device="cuda"
    )
    if kernel.endswith("bwd_dx_kernel"):  # from as many channels to as many as the row says
        dy = torch.empty((*shape, inner), dtype=form.dtype, device="cuda")
        shape = (inner, outer // form.groups, *window.kernel)
        weight = torch.empty(shape, dtype=form.dtype, device="cuda")
        backward_dx.input_gradient(dy, neighbours, order, weight, window)
        return
    bias = torch.empty((outer,), dtype=form.dtype, device="cuda")
    forward.forward(x, neighbours, order, weight, bias, window)


def _launch_map(kernel: str, form: Form) -> None:
    """Run one convolution through a kernel map, or its weight gradient."""
    inner, outer = form.channels
    taps, sites, per_list = form.kernel**3, 512 * form.patches, 128

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    x = torch.empty((sites, inner), dtype=form.dtype, device="cuda")
    shape = (outer, inner // form.groups, *(form.kernel,) * 3)
    if kernel.endswith("bwd_dw_kernel"):
        dy = torch.empty((sites, outer), dtype=form.dtype, device="cuda")
        lists = (integers(taps * sites), integers(taps * sites))
        pairs = (*lists, integers(taps + 1, dtype=torch.int64))
        map_backward.weight_gradient(x, dy, pairs, shape, form.groups)
        return
    rows, lines = integers(taps, sites), integers(sites // per_list, 1 + taps)
    table = Table(rows, integers(sites), lines, per_list)
    weight, bias = (
        torch.empty(size, dtype=form.dtype, device="cuda") for size in (shape, (outer,))
    )
    map_forward.forward(x, table, weight, bias, form.groups)


def _make_map(hashed: bool, symmetric: bool) -> None:
    """Build one kernel map of 2048 voxels."""
    places = torch.empty((2048, 4), dtype=torch.int32, device="cuda")
    sizes = ((64, 64, 64), (64, 64, 64), (66, 66, 66), 1)
    window = ((3, 3, 3), (1, 1, 1), (1, 1, 1))
    geometry = map_rows.Geometry(2, *sizes, *window)
    map_rows.neighbour_rows(
        places, places, geometry, hashed=hashed, same=symmetric, symmetric=symmetric
    )
