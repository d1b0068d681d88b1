"""Launchers of linear_attention: sums over the keys, the output, and the three gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch as launching
from . import tuning
from .backward import linear_attention_bwd_dkv_kernel, linear_attention_bwd_dq_kernel
from .forward import linear_attention_fwd_kernel, linear_attention_sums_kernel


def sums(k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str) -> Tensor:
    """Return S and z as float32 [B, G, D, D + 1]."""
    return _sums(k, v, key_mask, None, feature_map, 1)


def forward(q: Tensor, total: Tensor, feature_map: str) -> Tensor:
    """Return o like q."""
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    q = _raised(q)
    options = _row_options(q, feature_map)
    num_tiles = triton.cdiv(q.shape[2], options["BLOCK_N"])
    step, strides = launching.in_steps(q, out)
    with _device(q):
        linear_attention_fwd_kernel[(q.shape[0] * q.shape[1] * num_tiles,)](
            q, total, out, *strides, q.shape[1], q.shape[2], num_tiles,
            STEP=step, GROUP=q.shape[1] // total.shape[1], **options,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    total: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, like q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout = (_raised(t) for t in (q, k, v, dout))
    options = _row_options(q, feature_map)
    group = q.shape[1] // k.shape[1]
    inverse, weight = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    with _device(q):
        num_tiles = triton.cdiv(q.shape[2], options["BLOCK_N"])
        step, strides = launching.in_steps(q, dout, dq)
        linear_attention_bwd_dq_kernel[(q.shape[0] * q.shape[1] * num_tiles,)](
            q, total, dout, dq, inverse, weight, *strides,
            q.shape[1], q.shape[2], num_tiles, STEP=step, GROUP=group, **options,
        )  # fmt: skip
        dtotal = _sums(q, dout, None, (inverse, weight), feature_map, group)
        num_tiles = triton.cdiv(k.shape[2], options["BLOCK_N"])
        mask, mask_stride = _mask(key_mask, dtotal)
        step, strides = launching.in_steps(k, v, dk, dv)
        linear_attention_bwd_dkv_kernel[(k.shape[0] * k.shape[1] * num_tiles,)](
            k, v, mask, dtotal, dk, dv, *strides, mask_stride,
            k.shape[1], k.shape[2], num_tiles, STEP=step,
            HAS_MASK=key_mask is not None, **options,
        )  # fmt: skip
    return dq, dk, dv


def _sums(
    x: Tensor,
    y: Tensor,
    key_mask: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    feature_map: str,
    group: int,
) -> Tensor:
    """Sum over parts of the tokens, and over the parts in order."""
    batch, heads, length, head_dim = x.shape
    shape = (batch, heads // group, head_dim, head_dim + 1)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    x, y = _raised(x), _raised(y)
    options = _options(_pick(tuning.SUMS, x), x, feature_map)
    chunk = tuning.part_length(length, shape[0] * shape[1], head_dim)
    parts = triton.cdiv(length, chunk)
    part = x.new_empty((parts, *shape), dtype=torch.float32)
    inverse, weight = (part, part) if rows is None else rows
    mask, mask_stride = _mask(key_mask, part)
    step, strides = launching.in_steps(x, y)
    with _device(x):
        linear_attention_sums_kernel[(shape[0] * shape[1], parts)](
            x, y, mask, inverse, weight, part, *strides, mask_stride,
            heads, length, chunk,
            STEP=step, HAS_MASK=key_mask is not None, IS_BACKWARD=rows is not None,
            GROUP=group, **options,
        )  # fmt: skip
    return part.sum(0)


def _mask(key_mask: Tensor | None, blank: Tensor) -> tuple[Tensor, int]:
    """Return the mask as bytes and its batch stride; a stand-in without one."""
    if key_mask is None:
        return blank, 0
    key_mask = launching.unit_stride(key_mask)
    return key_mask.view(torch.uint8), key_mask.stride(0)


def _raised(tensor: Tensor) -> Tensor:
    interpreting = bool(triton.knobs.runtime.interpret)
    return launching.unit_stride(launching.raise_bfloat16(tensor, interpreting))


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def _pick(table: tuple[tuning.Row, ...], x: Tensor) -> tuning.Row:
    capability = 90
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    return tuning.pick(table, capability, x.element_size(), x.shape[3])


def _row_options(x: Tensor, feature_map: str) -> dict[str, Any]:
    """Return the keywords of the kernels that read S or its gradient."""
    row = _pick(tuning.ROWS, x)
    options = _options(row, x, feature_map)
    return options | {"COLUMNS": min(row.launch.columns, options["BLOCK_D"])}


def _options(row: tuning.Row, x: Tensor, feature_map: str) -> dict[str, Any]:
    """Return flags, tiles and launch parameters as keywords of a kernel."""
    # 16-bit numbers fit TF32 exactly; the sums they meet lose no range there, as they would in half
    precision = "tf32" if x.element_size() == 2 else launching.dot_precision(x.dtype, row.float32)
    return {
        "MAP": feature_map,
        "D": x.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(x.shape[3])),
        "BLOCK_N": row.launch.tile,
        "PRECISION": precision,
        "num_warps": row.launch.num_warps,
        "num_stages": row.launch.num_stages,
    }
