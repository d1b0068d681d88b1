"""Inputs that between them reach every launch row of block attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import Case
from ..launch import IndexLists
from . import backward, forward, tuning

TABLES = {
    "block_attention_fwd_kernel": tuning.FORWARD,
    "block_attention_bwd_dkv_kernel": tuning.BACKWARD_DKV,
    "block_attention_bwd_dq_kernel": tuning.BACKWARD_DQ,
}
# beside the power of two of each row, a head dim that is held in two chunks
SPLIT_DIMS = {64: 40, 128: 72, 256: 160}


class Form(NamedTuple):
    """What the inputs are."""

    head_dim: int
    dtype: torch.dtype
    loaded: bool = False  # grouped heads, a bias, a gate, partial blocks, all gradients
    splits: int = 1
    tf32: bool = False  # torch's own switch


def cases(capability: int) -> Iterator[Case]:
    """Every row that such a GPU uses: plain, with everything switched on, in two chunks."""
    for kernel, table in TABLES.items():
        for row in table:
            if tuning.pick(table, capability, row.itemsize, row.head_dim) != row:
                continue
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            forms = {
                f"D {row.head_dim}": Form(row.head_dim, dtype),
                f"D {row.head_dim}, loaded": Form(row.head_dim, dtype, loaded=True),
                f"D {SPLIT_DIMS[row.head_dim]}": Form(SPLIT_DIMS[row.head_dim], dtype),
            }
            if row.itemsize == 4:
                forms[f"D {row.head_dim}, TF32"] = Form(row.head_dim, dtype, tf32=True)
            if table is tuning.FORWARD:
                forms[f"D {row.head_dim}, split"] = Form(row.head_dim, dtype, splits=2)
            for inputs, form in forms.items():
                name = f"{'bf16' if row.itemsize == 2 else 'fp32'} {inputs}"
                yield Case(kernel, row, name, partial(_launch, form))
    for head_dim in (64, 256):
        form = Form(head_dim, torch.bfloat16, splits=2)
        for kernel in ("block_attention_fwd_combine_kernel", "block_attention_bwd_delta_kernel"):
            yield Case(kernel, None, f"bf16 D {head_dim}", partial(_launch, form))


def _launch(form: Form) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = form.tf32
    try:
        _forward_and_backward(form)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _forward_and_backward(form: Form) -> None:
    """1024 tokens in blocks of 128."""
    q = torch.empty((2, 4, 1024, form.head_dim), dtype=form.dtype, device="cuda")
    k = q[:, :2] if form.loaded else q
    bias = _floats(2, 4, 1024) if form.loaded else None
    gate = _floats(2, 4, 8, 8) if form.loaded else None
    bits = _integers(1, 1, 8, 128, 4) if form.loaded else None
    partials = (_integers(1, 1, 9), _integers(1, 1, 8), _integers(1, 1, 8))
    absent = (None, None, None)
    lists = IndexLists(
        _integers(1, 1, 9), _integers(1, 1, 64), *(partials if form.loaded else absent)
    )
    block_size, scale = (128, 128), form.head_dim**-0.5
    out, lse = forward.forward(
        q, k, k, bias, gate, lists, bits, block_size, scale, num_splits=form.splits
    )
    backward.backward(
        out, None, out, lse, q, k, k, bias, gate, lists, lists, bits, block_size, scale,
        (form.loaded, form.loaded),
    )  # fmt: skip


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cuda")


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="cuda")
