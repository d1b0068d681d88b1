"""Inputs that between them reach every launch row of pooling and densify."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..cases import Case
from . import densify, pool, tuning

TABLES: dict[str, tuple[Any, ...]] = {
    "sparse_pool3d_fwd_kernel": tuning.POOL,
    "sparse_pool3d_bwd_kernel": tuning.POOL,
    "densify_fwd_kernel": tuning.DENSIFY,
    "densify_bwd_kernel": tuning.DENSIFY,
}
WINDOWS = {  # patch, kernel, stride, padding, maximum
    "max": (8, 2, 2, 0, True),
    "max, overlapping": (6, 3, 2, 1, True),
    "mean": (8, 2, 2, 0, False),
    "mean, overlapping": (6, 3, 1, 1, False),
}


def cases(capability: int) -> Iterator[Case]:
    """Every row: both kinds of pool, windows inside a patch and across; odd channels."""
    for kernel, table in TABLES.items():
        for row in table:
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            name = "bf16" if row.itemsize == 2 else "fp32"
            if "pool" in kernel:
                for inputs, form in WINDOWS.items():
                    channels = 64 if form[0] == 8 else 33
                    launch = partial(_pool, kernel, dtype, channels, *form)
                    yield Case(kernel, row, f"{name} C {channels}, {inputs}", launch)
            else:
                for channels in (64, 33):
                    launch = partial(_densify, kernel, dtype, channels)
                    yield Case(kernel, row, f"{name} C {channels}", launch)


def _pool(
    kernel: str, dtype: torch.dtype, channels: int, patch: int, size: int, stride: int,
    padding: int, is_max: bool,
) -> None:  # fmt: skip
    """Run one pool, or its gradient."""
    window = pool.Window((patch,) * 3, (size,) * 3, (stride,) * 3, (padding,) * 3)
    x = torch.empty((64, *window.patch, channels), dtype=dtype, device="cuda")
    y = torch.empty((64, *window.pooled, channels), dtype=dtype, device="cuda")
    cells = 27 if padding else 1
    neighbours = torch.empty((64, cells), dtype=torch.int32, device="cuda")
    shares = None
    if padding and not is_max:
        shares = torch.empty((64, *window.pooled), device="cuda")
    if kernel.endswith("fwd_kernel"):
        pool.forward(x, neighbours, shares, 0.125, window, is_max)
        return
    taps = torch.empty_like(y, dtype=torch.int16)
    pool.backward(y, taps, neighbours, shares, 0.125, window, is_max)


def _densify(kernel: str, dtype: torch.dtype, channels: int) -> None:
    """Write patches into a volume, or read its gradient."""
    table = torch.empty((2, 6, 6, 6), dtype=torch.int32, device="cuda")
    shape = (64, 8, 8, 8, channels)
    if kernel.endswith("fwd_kernel"):
        x = torch.empty(shape, dtype=dtype, device="cuda")
        densify.forward(x, torch.empty(channels, dtype=dtype, device="cuda"), table)
        return
    dy = torch.empty((2, 48, 48, 48, channels), dtype=dtype, device="cuda")
    densify.backward(dy, table, shape)
