"""How many operations the linear attentions take, for torch.utils.flop_counter."""

from __future__ import annotations

import math
from typing import Any

import torch

from sparseattn.ops import flops
from sparseattn.ops.work import linear_work, newton_schulz_flops


def register() -> None:
    """Register the formulas once the counter is loaded; not while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    ops = torch.ops.sparseattn
    flops.register(
        {
            ops.landmark_stage1: _stage1,
            ops.landmark_stage1_backward: _stage1_backward,
            ops.landmark_stage2: _stage2,
            ops.landmark_stage2_backward: _stage2_backward,
            ops.newton_schulz: _newton_schulz,
            ops.newton_schulz_backward: _newton_schulz_backward,
            ops.linear_attention: _linear,
            ops.linear_attention_backward: _linear_backward,
        }
    )


def _products(tokens: Any, landmarks: Any, count: int) -> int:
    """Return `count` products of tokens [B, H, N, D] with landmarks [.., .., m, D]."""
    return int(2 * count * math.prod(tokens) * landmarks[2])


def _stage1(landmarks: Any, k: Any, *_: Any, **__: Any) -> int:
    return _products(k, landmarks, 2)


def _stage1_backward(*shapes: Any, **_: Any) -> int:
    # dvalues, dlse, dsums, values, lse, then as the forward; needs_landmarks is the third last
    return _products(shapes[6], shapes[5], 4 + bool(shapes[-3]))


def _stage2(q: Any, landmarks: Any, *_: Any, **__: Any) -> int:
    return _products(q, landmarks, 2)


def _stage2_backward(_: Any, q: Any, landmarks: Any, *shapes: Any, **__: Any) -> int:
    return _products(q, landmarks, 4 + bool(shapes[-2]))  # needs_landmarks


def _newton_schulz(queries: Any, *shapes: Any, **_: Any) -> int:
    # keys, values, landmark_mask, iterations
    batch, heads, landmarks, head_dim = queries
    return int(newton_schulz_flops(batch * heads, landmarks, head_dim, shapes[3])[0])


def _newton_schulz_backward(_: Any, queries: Any, *shapes: Any, **__: Any) -> int:
    batch, heads, landmarks, head_dim = queries
    return int(newton_schulz_flops(batch * heads, landmarks, head_dim, shapes[3])[1])


def _linear(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return int(linear_work(q, k, 0).flops)


def _linear_backward(_: Any, q: Any, k: Any, *__: Any, **___: Any) -> int:
    return int(linear_work(q, k, 0).backward_flops)
