"""Inputs that between them reach every launch row of landmark attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from ..cases import Case
from . import newton_schulz, segments, stage1, stage2, tuning

TABLES = {
    "landmark_attention_fwd_kernel": tuning.FORWARD,
    "landmark_attention_bwd_dq_kernel": tuning.BACKWARD_DQ,
    "landmark_attention_bwd_dkv_kernel": tuning.BACKWARD_DKV,
}
MATRIX_TABLES = {
    "newton_schulz_fwd_kernel": tuning.NEWTON_SCHULZ_FORWARD,
    "newton_schulz_bwd_kernel": tuning.NEWTON_SCHULZ_BACKWARD,
}
SPLIT_DIMS = (40, 72)  # head dims that two chunks may hold


class Form(NamedTuple):
    """What the inputs are."""

    head_dim: int
    dtype: torch.dtype
    stage: int
    landmarks: int = 256
    loaded: bool = False  # grouped heads, a key bias, eps, gradients of landmarks and bias
    is_relu: bool = False
    projected: bool = False  # keys and values of Linformer: no bias, gradients of landmarks


def cases(capability: int) -> Iterator[Case]:
    """Every row of such a GPU in both stages, and the features of the kernels."""
    for kernel, table in TABLES.items():
        for row in table:
            if tuning.pick(table, capability, row.itemsize, row.head_dim) != row:
                continue
            dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
            # stage 1 needs a gradient of its rows, the landmarks, only where they are learned
            first = 2 if kernel == "landmark_attention_bwd_dq_kernel" else 1
            plain = Form(row.head_dim, dtype, first)
            forms = {
                "": plain,
                ", other stage": plain._replace(stage=3 - first, loaded=first == 2),
                ", loaded": plain._replace(loaded=True),
                ", relu": plain._replace(stage=2, is_relu=True),
                ", one tile": plain._replace(stage=2, landmarks=row.launch.tile_k),
                ", projected keys": plain._replace(stage=2, projected=True),
            }
            for inputs, form in forms.items():
                yield _case(kernel, row, inputs, form)
            for head_dim in SPLIT_DIMS:
                if tuning.pick(table, capability, row.itemsize, head_dim) == row:
                    yield _case(kernel, row, "", plain._replace(head_dim=head_dim))
    for kernel, rows in MATRIX_TABLES.items():
        yield from _matrix_cases(kernel, tuning.pick_matrix(rows, capability))
    for kernel in ("segment_means_fwd_kernel", "segment_means_bwd_kernel"):
        for inputs, form in {
            "bf16 D 64": Form(64, torch.bfloat16, 0),
            "fp32 D 72, grid": Form(72, torch.float32, 0, loaded=True),
        }.items():
            yield Case(kernel, None, inputs, partial(_launch_segments, form))
    for head_dim in (64, 128):
        form = Form(head_dim, torch.bfloat16, 1)
        yield _case("landmark_attention_fwd_combine_kernel", None, "", form)


def _matrix_cases(kernel: str, row: tuning.MatrixRow) -> Iterator[Case]:
    for landmarks, head_dim, dtype in ((64, 64, "bf16"), (128, 128, "fp32"), (100, 72, "bf16")):
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        form = Form(head_dim, kind, 0, landmarks, loaded=landmarks == 100)
        masked = ", mask" if form.loaded else ""
        inputs = f"{dtype} D {head_dim}, {landmarks} landmarks{masked}"
        yield Case(kernel, row, inputs, partial(_launch_matrices, form))


def _launch_matrices(form: Form) -> None:
    """Forward and backward of newton_schulz."""
    shape = (2, 4, form.landmarks, form.head_dim)
    landmarks = torch.empty(shape, dtype=form.dtype, device="cuda")
    values = torch.empty(shape, device="cuda")
    mask = torch.ones(shape[::2], dtype=torch.bool, device="cuda") if form.loaded else None
    arguments = (landmarks, landmarks, values, mask, 6, form.head_dim**-0.5)
    newton_schulz.backward(newton_schulz.forward(*arguments), *arguments)


def _launch_segments(form: Form) -> None:
    """Means of segments of 1024 tokens, and their gradient."""
    q = torch.empty((2, 4, 1024, form.head_dim), dtype=form.dtype, device="cuda")
    ids, starts, counts = (
        torch.zeros((1, size), dtype=torch.int32, device="cuda") for size in (1024, 65, 64)
    )
    means = segments.forward(q, ids, starts, ids[0] if form.loaded else None)
    segments.backward(q, means, ids, counts)


def _case(kernel: str, row: tuning.Row | None, inputs: str, form: Form) -> Case:
    dtype = "bf16" if form.dtype == torch.bfloat16 else "fp32"
    return Case(kernel, row, f"{dtype} D {form.head_dim}{inputs}", partial(_launch, form))


def _launch(form: Form) -> None:
    """Forward and backward of one stage for 1024 tokens."""
    q = torch.empty((2, 4, 1024, form.head_dim), dtype=form.dtype, device="cuda")
    landmarks = q[:1, :1, : form.landmarks]
    scale, square = form.head_dim**-0.25, 0.0 if form.is_relu else form.head_dim**-0.5 / 2
    if form.stage == 1:
        bias = torch.empty((2, 1, 1024), device="cuda") if form.loaded else None
        ids = torch.zeros((2, 1024), dtype=torch.int32, device="cuda") if form.loaded else None
        options = (scale, square, form.is_relu)
        values, lse, _, sums = stage1.forward(landmarks, q, q, bias, ids, *options, form.loaded)
        stage1.backward(
            values, lse, sums, values, lse, landmarks, q, q, bias, ids, *options,
            (form.loaded, form.loaded),
        )  # fmt: skip
        return
    if form.projected:
        keys = q[:, :, : form.landmarks]
        flags = (form.head_dim**-0.5, 0.0, False, False)
        out = stage2.forward(q, keys, keys, None, *flags)
        stage2.backward(out, q, keys, keys, None, *flags, True)
        return
    heads, columns = (2 if form.loaded else 4), form.landmarks + form.loaded
    values = torch.empty((2, heads, columns, form.head_dim), device="cuda")
    lse = torch.empty((2, heads, columns), device="cuda")
    flags = (scale, square, form.is_relu, form.loaded)
    out = stage2.forward(q, landmarks, values, lse, *flags)
    stage2.backward(out, q, landmarks, values, lse, *flags, form.loaded)
