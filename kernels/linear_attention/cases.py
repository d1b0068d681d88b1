"""Inputs that between them reach every launch row of linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from ..cases import Case
from . import launchers, tuning

TABLES = {
    "linear_attention_sums_kernel": tuning.SUMS,
    "linear_attention_fwd_kernel": tuning.ROWS,
    "linear_attention_bwd_dq_kernel": tuning.ROWS,
    "linear_attention_bwd_dkv_kernel": tuning.ROWS,
}


class Form(NamedTuple):
    """What the inputs are."""

    head_dim: int
    dtype: torch.dtype
    feature_map: str = "elu"
    loaded: bool = False  # grouped heads and a key mask


def cases(capability: int) -> Iterator[Case]:
    """Every row that such a GPU uses: plain, loaded, with another map, an odd head dim."""
    for kernel, table in TABLES.items():
        for row in table:
            if tuning.pick(table, capability, row.itemsize, row.head_dim) != row:
                continue
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            plain = Form(row.head_dim, dtype)
            forms = {
                f"D {row.head_dim}": plain,
                f"D {row.head_dim}, loaded": plain._replace(loaded=True),
                f"D {row.head_dim}, relu": plain._replace(feature_map="relu"),
                f"D {row.head_dim - 24}": plain._replace(head_dim=row.head_dim - 24),
            }
            for inputs, form in forms.items():
                name = f"{'bf16' if row.itemsize == 2 else 'fp32'} {inputs}"
                yield Case(kernel, row, name, partial(_launch, form))


def _launch(form: Form) -> None:
    """Forward and backward of 1024 tokens."""
    q = torch.empty((2, 4, 1024, form.head_dim), dtype=form.dtype, device="cuda")
    k = q[:, :2] if form.loaded else q
    mask = torch.empty((2, 1024), dtype=torch.bool, device="cuda") if form.loaded else None
    sums = launchers.sums(k, k, mask, form.feature_map)
    out = launchers.forward(q, sums, form.feature_map)
    launchers.backward(out, q, k, k, mask, sums, form.feature_map)
