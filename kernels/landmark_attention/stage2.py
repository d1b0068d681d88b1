"""Stage 2 of landmark attention: N queries attend to m landmarks.

    z_ir = log weight(scale * q_i.w_r) + b_r,   o_i = sum_r softmax_r(z_ir) s_r

With a floor there is one more column of logit max_r(scale * q_i.w_r) + square * |q_i|^2 + b_m and
value s_m: what a constant added to every feature comes to. The backward recomputes from q, w, s.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import tuning
from .backward_dkv import landmark_attention_bwd_dkv_kernel
from .backward_dq import landmark_attention_bwd_dq_kernel
from .call import Call, raised
from .forward import landmark_attention_fwd_kernel


def forward(
    q: Tensor,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    square: float,
    is_relu: bool,
    has_floor: bool,
) -> Tensor:
    """Return o like q. values [B, G, m, D] are rounded to the dtype of q; bias is float32."""
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    if landmarks.shape[2] == 0:
        return out.zero_()
    call = Call.prepare(
        q, landmarks, values.to(q.dtype), bias, scale,
        stage=2, square=square, is_relu=is_relu, has_floor=has_floor,
    )  # fmt: skip
    options = call.options(tuning.FORWARD)
    num_tiles = triton.cdiv(q.shape[2], options["BLOCK_Q"])
    step, strides = call.in_steps(out)
    with call.device:
        landmark_attention_fwd_kernel[(q.shape[0] * q.shape[1] * num_tiles, 1)](
            *call.tensors, out, out, out, out, out, *strides, call.bias_strides, 0,
            call.heads, q.shape[2], call.landmarks, num_tiles, call.landmarks, scale, square,
            STEP=step, NEEDS_PEAK=has_floor, HAS_SEGMENTS=False, **options,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    landmarks: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    square: float,
    is_relu: bool,
    has_floor: bool,
    needs_landmarks: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return dq like q; dlandmarks [B, G, m, D] or None, dvalues and dbias [B, G, m], float32."""
    dq = torch.empty_like(q)
    if dq.numel() == 0 or landmarks.shape[2] == 0:
        dvalues = torch.zeros_like(values, dtype=torch.float32)
        dlandmarks = dvalues[:, :, : landmarks.shape[2]].clone() if needs_landmarks else None
        return dq.zero_(), dlandmarks, dvalues, dvalues.sum(-1)
    call = Call.prepare(
        q, landmarks, values.to(q.dtype), bias, scale,
        stage=2, square=square, is_relu=is_relu, has_floor=has_floor,
    )  # fmt: skip
    sent = raised(dout)
    with call.device:
        options = call.options(tuning.BACKWARD_DQ)
        num_tiles = triton.cdiv(q.shape[2], options["BLOCK_Q"])
        lse, delta = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
        step, strides = call.in_steps(sent, dq)
        landmark_attention_bwd_dq_kernel[(q.shape[0] * q.shape[1] * num_tiles, 1)](
            *call.tensors, sent, lse, delta, dq,
            *strides, call.bias_strides, 0,
            call.heads, q.shape[2], call.landmarks, num_tiles, call.landmarks, scale, square,
            STEP=step, IS_ONE_TILE=call.landmarks <= options["BLOCK_K"], **options,
        )  # fmt: skip
        gradients = _column_gradients(call, sent, lse, delta, needs_landmarks)
    if has_floor:
        gradients = _with_floor(*gradients, dout)
    return dq, *gradients


def _column_gradients(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs_landmarks: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Walk the queries in parts, and sum what the parts give to the landmarks in order."""
    options = call.options(tuning.BACKWARD_DKV)
    del options["HAS_FLOOR"]
    shape = (call.batch, call.key_heads, call.landmarks, call.q.shape[3])
    num_tiles = triton.cdiv(shape[2], options["BLOCK_K"])
    chunk, parts = call.part(call.q.shape[2], call.key_heads * num_tiles)
    dvalues = lse.new_empty((parts, *shape))
    dlandmarks = torch.empty_like(dvalues) if needs_landmarks else dvalues
    dbias = lse.new_empty((parts, *shape[:3]))
    step, strides = call.in_steps(dout, dlandmarks[0], dvalues[0])
    landmark_attention_bwd_dkv_kernel[(shape[0] * shape[1] * num_tiles, parts)](
        *call.tensors, lse, dout, lse, delta, lse, lse, dlandmarks, dvalues, dbias,
        *strides, call.bias_strides, 0, shape[0] * shape[1] * shape[2],
        call.heads, call.q.shape[2], shape[2], num_tiles, chunk, call.scale, call.square,
        STEP=step, NEEDS_DK=needs_landmarks, NEEDS_BIAS=True, HAS_SEGMENTS=False, **options,
    )  # fmt: skip
    return dlandmarks.sum(0) if needs_landmarks else None, dvalues.sum(0), dbias.sum(0)


def _with_floor(
    dlandmarks: Tensor | None, dvalues: Tensor, dbias: Tensor, dout: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Append the floor's gradients: weights sum to 1 over a row, gradients of logits to 0."""
    sent = dout.float().unflatten(1, (dvalues.shape[1], -1)).sum((2, 3))
    floor = sent[:, :, None] - dvalues.sum(2, keepdim=True)
    dvalues = torch.cat((dvalues, floor), 2)
    return dlandmarks, dvalues, torch.cat((dbias, -dbias.sum(2, keepdim=True)), 2)
