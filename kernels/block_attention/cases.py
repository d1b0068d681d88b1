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
SPLIT_DIMS = (40, 72, 96, 160, 192)  # head dims that are held in two chunks
BLOCKS = ((128, 128), (128, 64), (64, 64))  # of the mask; a row is compiled for the first it serves


class Form(NamedTuple):
    """What the inputs are."""

    head_dim: int
    dtype: torch.dtype
    block_size: tuple[int, int] = (128, 128)
    loaded: bool = False  # grouped heads, partial blocks, a bias, a gate, all gradients
    partial: bool = False  # grouped heads, partial blocks
    splits: int = 1
    tf32: bool = False  # torch's own switch


def cases(capability: int) -> Iterator[Case]:
    """Every row that such a GPU uses: plain, with everything switched on, in two chunks."""
    for kernel, table in TABLES.items():
        for row in table:
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            plain = Form(row.head_dim, dtype)
            forms = {
                f"D {row.head_dim}": plain,
                f"D {row.head_dim}, loaded": plain._replace(loaded=True),
                f"D {row.head_dim}, partial blocks": plain._replace(partial=True),
            }
            for head_dim in SPLIT_DIMS:
                forms[f"D {head_dim}"] = plain._replace(head_dim=head_dim)
            if row.itemsize == 4:
                forms[f"D {row.head_dim}, TF32"] = plain._replace(tf32=True)
            if table is tuning.FORWARD:
                forms[f"D {row.head_dim}, split"] = plain._replace(splits=2)
            for inputs, form in forms.items():
                block_size = _served(table, row, capability, form)
                if block_size is not None:
                    name = f"{'bf16' if row.itemsize == 2 else 'fp32'} {inputs}"
                    form = form._replace(block_size=block_size)
                    yield Case(kernel, row, name, partial(_launch, form))
    for head_dim in (64, 256):
        form = Form(head_dim, torch.bfloat16, splits=2)
        for kernel in ("block_attention_fwd_combine_kernel", "block_attention_bwd_delta_kernel"):
            yield Case(kernel, None, f"bf16 D {head_dim}", partial(_launch, form))


def _served(
    table: tuple[tuning.Row, ...], row: tuning.Row, capability: int, form: Form
) -> tuple[int, int] | None:
    """Return the first blocks with which such inputs get the row; None if there are none."""
    kind = (capability, form.dtype.itemsize, form.head_dim)
    features = {"loaded": form.loaded, "partial": form.loaded or form.partial}
    for block_size in BLOCKS:
        if tuning.pick(table, *kind, block_size, **features) == row:
            return block_size
    return None


def _launch(form: Form) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = form.tf32
    try:
        _forward_and_backward(form)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _forward_and_backward(form: Form) -> None:
    """Of 1024 tokens."""
    block_size, scale = form.block_size, form.head_dim**-0.5
    rows, columns = 1024 // block_size[0], 1024 // block_size[1]
    q = torch.empty((2, 4, 1024, form.head_dim), dtype=form.dtype, device="cuda")
    k = q[:, :2] if form.loaded or form.partial else q
    bias = _floats(2, 4, 1024) if form.loaded else None
    gate = _floats(2, 4, rows, columns) if form.loaded else None
    bits = None
    row_lists, column_lists = _lists(rows), _lists(columns)
    if form.loaded or form.partial:
        bits = _integers(1, 1, 8, block_size[0], block_size[1] // 32)
        row_lists = row_lists._replace(**_partial(rows))
        column_lists = column_lists._replace(**_partial(columns))
    out, lse = forward.forward(
        q, k, k, bias, gate, row_lists, bits, block_size, scale, num_splits=form.splits
    )
    backward.backward(
        out, None, out, lse, q, k, k, bias, gate, row_lists, column_lists, bits, block_size,
        scale, (form.loaded, form.loaded),
    )  # fmt: skip


def _lists(lines: int) -> IndexLists:
    return IndexLists(_integers(1, 1, lines + 1), _integers(1, 1, 64), None, None, None)


def _partial(lines: int) -> dict[str, Tensor]:
    return {
        "partial_offsets": _integers(1, 1, lines + 1),
        "partial_indices": _integers(1, 1, 8),
        "partial_slots": _integers(1, 1, 8),
    }


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cuda")


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="cuda")
