"""Stage 1 of landmark attention: m landmarks attend to N keys.

    a_rj = log weight(scale * w_r.k_j) + b_j - square * |k_j|^2
    lse_r = log sum_j exp(a_rj),   s_r = sum_j exp(a_rj - lse_r) v_j

    sums_r = sum_{j in segment r} k_j

Keys are cut into parts that are combined in order; the backward recomputes a from w, k and lse.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .. import launch as launching
from . import tuning
from .backward_dkv import landmark_attention_bwd_dkv_kernel
from .backward_dq import landmark_attention_bwd_dq_kernel
from .call import Call, raised
from .forward import landmark_attention_fwd_combine_kernel, landmark_attention_fwd_kernel


def forward(
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor | None,
    scale: float,
    square: float,
    is_relu: bool,
    needs_peak: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return s [B, G, m, D], lse [B, G, m], peak [B, G] and sums [B, G, m, D], all float32.

    peak is the largest scale * w_r.k_j that is not hidden; it is left unset without needs_peak.
    sums is None without segments.
    """
    shape = (v.shape[0], v.shape[1], landmarks.shape[2])
    values = k.new_empty((*shape, k.shape[3]), dtype=torch.float32)
    lse = k.new_empty(shape, dtype=torch.float32)
    peak = k.new_empty(shape[:2], dtype=torch.float32)
    if v.numel() == 0 or landmarks.shape[2] == 0:
        sums = None if segments is None else torch.zeros_like(values)
        return values.zero_(), lse.fill_(-math.inf), peak.fill_(-math.inf), sums
    call = Call.prepare(
        landmarks, k, v, key_bias, scale, stage=1, square=square, is_relu=is_relu
    )  # fmt: skip
    options = call.options(tuning.FORWARD)
    num_tiles = triton.cdiv(shape[2], options["BLOCK_Q"])
    chunk, parts = call.part(k.shape[2], call.heads * num_tiles)
    part_values = values.new_empty((parts, *values.shape))
    part_lse = lse.new_empty((parts, *shape))
    part_peak = torch.empty_like(part_lse) if needs_peak else part_lse
    part_sums = part_values if segments is None else torch.empty_like(part_values)
    step, strides = call.in_steps(part_values[0])
    with call.device:
        landmark_attention_fwd_kernel[(shape[0] * shape[1] * num_tiles, parts)](
            *call.tensors, *_ids(segments, lse), part_values, part_lse, part_peak, part_sums,
            *strides, call.bias_strides, _batch_stride(segments),
            call.heads, shape[2], k.shape[2], num_tiles, chunk,
            scale, square, STEP=step, NEEDS_PEAK=needs_peak, HAS_SEGMENTS=segments is not None,
            **options,
        )  # fmt: skip
        num_rows = lse.numel()
        landmark_attention_fwd_combine_kernel[(triton.cdiv(num_rows, tuning.COMBINE_ROWS),)](
            part_values, part_lse, values, lse, num_rows, parts,
            D=k.shape[3], BLOCK_D=triton.next_power_of_2(k.shape[3]), BLOCK_Q=tuning.COMBINE_ROWS,
        )  # fmt: skip
    if needs_peak:
        peak = part_peak.amax((0, 3)) / launching.LOG2_E
    return values, lse, peak, None if segments is None else part_sums.sum(0)


def backward(
    dvalues: Tensor,
    dlse: Tensor | None,
    dsums: Tensor | None,
    values: Tensor,
    lse: Tensor,
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor | None,
    scale: float,
    square: float,
    is_relu: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return dlandmarks [B, G, m, D] or None, dk, dv like k, v, and dkey_bias [B, G, N] or None."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dbias = k.new_empty(k.shape[:3], dtype=torch.float32) if needs[1] else None
    if v.numel() == 0 or landmarks.shape[2] == 0:
        dlandmarks = torch.zeros_like(values) if needs[0] else None
        return dlandmarks, dk.zero_(), dv.zero_(), None if dbias is None else dbias.zero_()
    call = Call.prepare(
        landmarks, k, v, key_bias, scale, stage=1, square=square, is_relu=is_relu
    )  # fmt: skip
    with call.device:
        dvalues, delta, unit = _in_units(dvalues, dlse, values, call.k.dtype)
        peak = torch.where(lse == -math.inf, math.inf, lse * launching.LOG2_E).contiguous()
        options = call.options(tuning.BACKWARD_DKV)
        del options["HAS_FLOOR"]
        num_tiles = triton.cdiv(k.shape[2], options["BLOCK_K"])
        step, strides = call.in_steps(dvalues, dk, dv)
        has_segments = segments is not None and dsums is not None
        landmark_attention_bwd_dkv_kernel[(k.shape[0] * k.shape[1] * num_tiles, 1)](
            *call.tensors, *_ids(segments, peak), dvalues, peak, delta, unit,
            peak if dsums is None else dsums.contiguous(), dk, dv,
            peak if dbias is None else dbias,
            *strides, call.bias_strides, _batch_stride(segments), 0,
            call.heads, landmarks.shape[2], k.shape[2], num_tiles, landmarks.shape[2],
            scale, square, STEP=step, NEEDS_DK=True, NEEDS_BIAS=needs[1], HAS_SEGMENTS=has_segments,
            **options,
        )  # fmt: skip
        dlandmarks = _landmark_gradient(call, dvalues, peak, delta, unit) if needs[0] else None
    return dlandmarks, dk, dv, dbias


def _ids(segments: Tensor | None, blank: Tensor) -> tuple[Tensor]:
    """Return the segment of every key [B, N], int32; a stand-in without."""
    return (blank if segments is None else launching.unit_stride(segments),)


def _batch_stride(segments: Tensor | None) -> int:
    """Return the batch stride of the segments as `_ids` returns them."""
    return 0 if segments is None else launching.unit_stride(segments).stride(0)


def _in_units(
    dvalues: Tensor, dlse: Tensor | None, values: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dvalues in the dtype of k, delta, and the power of two of a head both are divided by.

    dvalues is summed over all queries: what fits float16 for one of them may not for all.
    """
    largest = dvalues.abs().amax((2, 3))
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    delta = (dvalues * values).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dvalues = dvalues / unit[..., None, None]
    return raised(dvalues.to(dtype)), (delta / unit[..., None]).contiguous(), unit


def _landmark_gradient(
    call: Call, dvalues: Tensor, peak: Tensor, delta: Tensor, unit: Tensor
) -> Tensor:
    """Walk the keys once more, for the gradient of the landmarks."""
    options = call.options(tuning.BACKWARD_DQ)
    shape = (call.batch, call.heads, call.landmarks, call.q.shape[3])
    num_tiles = triton.cdiv(shape[2], options["BLOCK_Q"])
    chunk, parts = call.part(call.k.shape[2], call.heads * num_tiles)
    part = unit.new_empty((parts, *shape))
    step, strides = call.in_steps(dvalues, part[0])
    landmark_attention_bwd_dq_kernel[(shape[0] * shape[1] * num_tiles, parts)](
        *call.tensors, dvalues, peak, delta, part,
        *strides, call.bias_strides, shape[0] * shape[1] * shape[2],
        call.heads, shape[2], call.k.shape[2], num_tiles, chunk, call.scale, call.square,
        STEP=step, IS_ONE_TILE=False, **options,
    )  # fmt: skip
    return part.sum(0) * unit[..., None, None]
