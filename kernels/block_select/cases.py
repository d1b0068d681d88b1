"""Inputs that between them reach every launch row of block selection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from . import lists, pool, select, tuning


def cases(capability: int) -> Iterator[Case]:
    """Every row, plain and with everything switched on, and the list kernels, which have none."""
    for kernel in ("block_lists_count_kernel", "block_lists_write_kernel"):
        yield Case(kernel, None, "bool", _build)
    for row in tuning.SELECT:
        num_ids = row.num_ids or 4096
        for loaded in (False, True):
            name = f"{num_ids} blocks{', loaded' if loaded else ''}"
            yield Case("block_select_kernel", row, name, partial(_select, num_ids, loaded))
    for pool_row in tuning.POOL:
        for dtype, kind, weighted in (
            (torch.bfloat16, "mean", False),
            (torch.bfloat16, "max", True),
            (torch.float32, "mean", True),
        ):
            name = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} D {pool_row.head_dim}, {kind}"
            launch = partial(_pool, pool_row.head_dim, dtype, kind, weighted)
            for kernel in ("block_pool_fwd_kernel", "block_pool_bwd_kernel"):
                yield Case(kernel, pool_row, name + (", weights" if weighted else ""), launch)


def _build() -> None:
    lists.build(torch.empty((2, 4, 64, 64), dtype=torch.bool, device="cuda"), capacity=1024)


def _select(num_ids: int, loaded: bool) -> None:
    """The scores of 16 query blocks; loaded: with a budget a row, weights and forced blocks."""
    scores = torch.empty((2, 4, 16, num_ids), dtype=torch.float32, device="cuda")
    extras: tuple[Tensor, ...] = ()
    if loaded:
        budgets = torch.empty((2, 4, 16), dtype=torch.int32, device="cuda")
        always = torch.empty((1, 1, 1, num_ids), dtype=torch.bool, device="cuda")
        extras = (budgets, torch.empty_like(scores, dtype=torch.int32), always)
    select.select(scores, 8, *extras)


def _pool(head_dim: int, dtype: torch.dtype, kind: str, weighted: bool) -> None:
    """Forward and backward of 1024 tokens in blocks of 64."""
    x = torch.empty((2, 4, 1024, head_dim), dtype=dtype, device="cuda")
    weights = torch.empty((2, 1024), device="cuda") if weighted else None
    pooled = pool.pool(x, weights, 64, kind)
    pool.pool_backward(pooled, x, weights, pooled, 64, kind)
