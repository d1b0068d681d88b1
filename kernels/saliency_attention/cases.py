"""Inputs that between them reach every launch row of the token gather."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..cases import Case
from . import gather, tuning

WIDTHS = {128: (64, 40), 512: (256, 72), 4096: (2048, 768)}  # row_bytes: columns in bfloat16


def cases(capability: int) -> Iterator[Case]:
    """Every row: keys, values and their bias; the way back; odd widths; float32."""
    for row in tuning.GATHER:
        columns, odd = WIDTHS[row.row_bytes]
        forms = {
            f"bf16 D {columns}, keys": partial(_launch, columns, torch.bfloat16, keys=True),
            f"bf16 D {columns}, filled": partial(_launch, columns, torch.bfloat16, keys=False),
            f"bf16 D {odd}, keys": partial(_launch, odd, torch.bfloat16, keys=True),
            f"fp32 D {columns // 2}, keys": partial(
                _launch, columns // 2, torch.float32, keys=True
            ),
        }
        for inputs, launch in forms.items():
            yield Case("token_gather_kernel", row, inputs, launch)


def _launch(columns: int, dtype: torch.dtype, keys: bool) -> None:
    """Gather 256 of 1024 tokens, or put them back."""
    kept = torch.empty((2, 4, 256, columns), dtype=dtype, device="cuda")
    every = torch.empty((2, 4, 1024, columns), dtype=dtype, device="cuda")
    rows, out = (every, kept) if keys else (kept, every)
    index = torch.empty((2, 1, out.shape[2]), dtype=torch.int32, device="cuda")
    bias = torch.empty((2, 1, rows.shape[2]), dtype=torch.float32, device="cuda")
    bias_out = torch.empty((2, 1, out.shape[2]), dtype=torch.float32, device="cuda")
    more, fill = (rows, None) if keys else (None, torch.empty_like(out))
    gather.gather(
        rows, more, bias if keys else None, fill, index, 0.0, out, torch.empty_like(out), bias_out
    )
