"""Inputs with which the kernels of block selection are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..cases import Case
from . import lists


def cases(capability: int) -> Iterator[Case]:
    """The two list kernels, whose tile is the same everywhere."""
    for kernel in ("block_lists_count_kernel", "block_lists_write_kernel"):
        yield Case(kernel, None, "bool", _build)


def _build() -> None:
    lists.build(torch.empty((2, 4, 64, 64), dtype=torch.bool, device="cuda"), capacity=1024)
