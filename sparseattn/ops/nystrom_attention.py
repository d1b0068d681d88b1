"""Nystrom attention: softmax attention through the means of segments, linear in the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import attention_checks, depthwise_residual, landmark_stages, sharded
from sparseattn.ops import newton_schulz as middle
from sparseattn.ops.segment_means import segment_means
from sparseattn.reference.nystrom_attention import nystrom_attention as reference
from sparseattn.structures.segments import Segments, cells_of

_OP = "nystrom_attention"
Impl = Literal["auto", "triton", "torch", "reference"]


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int | Sequence[int],
    *,
    iterations: int = 6,
    key_mask: Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    legacy_start: bool = False,
    residual: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend to the tokens themselves through m landmarks: linear in N, no N x N, no N x m.

        o = F1 Z_t (F3 v) + c,     F1 = softmax(scale * q k~.T)     [N, m]
                                   F2 = softmax(scale * q~ k~.T)    [m, m]
                                   F3 = softmax(scale * q~ k.T)     [m, N]

    Landmarks q~ and k~ are means of q and k over segments of the tokens; Z_t, t steps of
    newton_schulz from F2, tends to the pseudo-inverse of F2. c, with a residual alone, is its
    convolution with v, c_i = sum_t residual_t v_{i + t - w // 2}.

    Args:
        q: [B, H, N, D], float32, float16, bfloat16 or float64; any strides.
        k: [B, G, N, D], dtype of q, the same tokens; H is a multiple of G (grouped queries).
        v: [B, G, N, D], dtype of q.
        num_landmarks: m, segments of neighbouring tokens whose sizes differ by one at most. With a
            grid: how many boxes along each axis, or their number at most, in near cubes.
        iterations: t, at least 1.
        key_mask: bool [B, N]; True = take part, in keys, values and means. A token that does not
            may hold NaN in k and v, and in q if nothing is made of its o.
        grid: sizes of the image or volume whose tokens stand in raster order, with class tokens in
            front: each landmark is a box of it, and every class token is one of its own besides.
        scale: multiplies q . k; default D ** -0.5.
        legacy_start: as in newton_schulz, for models trained with transformers or
            nystrom-attention: a sample then depends on its batch mates.
        residual: [G, w], one filter a head along the tokens, or with a grid [G, w, ...], one along
            its axes; odd sizes, rounded to the dtype of q. What lies beyond the ends counts as 0,
            and so does a masked token; tokens in front of a grid have c = 0 then.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (naive, O(N * m) memory, differentiable twice), or
            "auto": triton on CUDA where it can run, else torch. With more than 128 landmarks or
            legacy_start, newton_schulz is torch's matrix products everywhere. The residual is
            torch's convolution everywhere.

    Returns:
        o [B, H, N, D], dtype and memory layout of q.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        A sample whose tokens are all masked gets o = 0 and zero gradients. Padded with key_mask
        equals unpadded. Of fewer tokens than landmarks each is its own landmark.
        Deterministic; without legacy_start a sample does not depend on the values of its batch
        mates. (With a residual where torch's convolutions are and do so.) Exact gradients of the t
        steps for q, k and v, and for the residual.
        Landmarks are rounded to the dtype of q; newton_schulz works in float32. Tokens that
        resemble nothing near them (random ones) make F2 hard to invert: o is then far from softmax
        attention, whatever t.
        DTensors sharded over batch and heads stay so; nothing is sent between ranks but the
        gradient of residual, which is the whole one on every rank. legacy_start is not for them.
        Saved for the backward: the inputs and about 4 * B * H * m * (4 D + 1) bytes. Differentiable
        once, except with impl="reference".

    Reference:
        Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention (2021),
        arXiv:2102.03902, equations 10, 11 and 13.
    """
    if sharded.is_sharded(q, k, v):
        sharded.refuse(_OP, legacy_start=legacy_start)
        run = partial(
            nystrom_attention, num_landmarks=num_landmarks, iterations=iterations, grid=grid,
            scale=scale, impl=impl,
        )  # fmt: skip
        return sharded.attend_without_pairs(
            _OP, run, (q, k, v), key_mask, {"residual": (residual, 1)}
        )
    q, k, v = attention_checks.check_qkv(_OP, q, k, v)
    scale = attention_checks.check_scale(_OP, scale, q)
    checks.require_int(_OP, "iterations", iterations, low=1)
    checks.require_bool(_OP, "legacy_start", legacy_start)
    attention_checks.check_key_mask(_OP, key_mask, k)
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{_OP}: k {checks.describe(k)}; expected [B, G, N, D] of the tokens of q, "
            f"N={q.shape[2]} (from q)"
        )
    cells, prefix = check_landmarks(num_landmarks, grid, q.shape[2])
    if residual is not None:
        depthwise_residual.check(_OP, residual, v, grid)
    if q.numel() == 0:
        return q.clone()
    segments = segments_of(q, grid, cells, prefix, key_mask)
    chosen = landmark_stages.choose(_OP, impl, q)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            ids, count = segments.ids.expand(q.shape[0], -1), segments.counts.shape[1]
            return reference(
                q, k, v, ids, count, iterations, scale, legacy_start, residual, grid
            )  # fmt: skip
        may_lack = key_mask is not None or q.shape[2] < segments.counts.shape[1]
        shown = segments.counts > 0 if may_lack else None
        out = _attend(q, k, v, segments, key_mask, shown, iterations, scale, legacy_start, chosen)
        if residual is None:
            return out
        beside = depthwise_residual.depthwise_residual(v, residual, key_mask, grid)
        return out + beside.repeat_interleave(q.shape[1] // k.shape[1], 1)


def unsupported(q: Tensor) -> list[str]:
    """Return why the Triton kernels cannot run such queries (empty: they can)."""
    return landmark_stages.unsupported(q)


def segments_of(
    q: Tensor,
    grid: Sequence[int] | None,
    cells: tuple[int, ...],
    prefix: int,
    key_mask: Tensor | None,
) -> Segments:
    """Return which tokens make which landmark; cells and prefix as check_landmarks gives them."""
    if grid is None:
        return Segments.balanced(q.shape[2], cells[0], key_mask, q.device)
    return Segments.of_grid(grid, cells, prefix, key_mask, q.device)


def check_landmarks(
    num_landmarks: Any, grid: Any, length: int, op: str = _OP
) -> tuple[tuple[int, ...], int]:
    """Check both; return (m,), or with a grid the boxes along its axes, and the class tokens."""
    if grid is None:
        checks.require_int(op, "num_landmarks", num_landmarks, low=1)
        return (num_landmarks,), 0
    rule = "two or three sizes >= 1"
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise TypeError(f"{op}: grid {checks.describe(grid)}; expected {rule}")
    for size in grid:
        checks.require_int(op, "grid", size, low=1)
    if len(grid) not in (2, 3):
        raise ValueError(f"{op}: grid {checks.describe(grid)}; expected {rule}")
    prefix = length - math.prod(grid)
    if prefix < 0:
        raise ValueError(
            f"{op}: grid {checks.describe(grid)}; expected at most N tokens, N={length} (from q)"
        )
    if not isinstance(num_landmarks, Sequence):
        checks.require_int(op, "num_landmarks", num_landmarks, low=1)
        return cells_of(grid, num_landmarks), prefix
    for parts in num_landmarks:
        checks.require_int(op, "num_landmarks", parts, low=1)
    if len(num_landmarks) != len(grid) or any(
        parts > size for parts, size in zip(num_landmarks, grid, strict=False)
    ):
        raise ValueError(
            f"{op}: num_landmarks {checks.describe(num_landmarks)}; expected an int, or one an "
            f"axis, at most its size, grid={tuple(grid)} (from grid)"
        )
    return tuple(num_landmarks), prefix


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    key_mask: Tensor | None,
    shown: Tensor | None,
    iterations: int,
    scale: float,
    legacy_start: bool,
    impl: str,
) -> Tensor:
    """Do it by both stages; shown [B or 1, m] are the landmarks that exist, None if all do."""
    (batch, heads, _, head_dim), key_heads = q.shape, k.shape[1]
    count, group = segments.counts.shape[1], heads // max(1, key_heads)
    q, means = segment_means(q, segments, impl)
    queries = means.to(q.dtype)  # [B, H, m, D]
    stacked = queries.reshape(batch, key_heads, group * count, head_dim)
    bias = landmark_stages.hiding_bias(key_mask, k.dtype)
    ids = segments.ids.expand(batch, -1)
    values, _, _, sums = landmark_stages.stage1(stacked, k, v, bias, ids, scale=scale, impl=impl)
    sizes = segments.counts.clamp(min=1)[:, None, :, None]
    keys = (sums[:, :, :count] / sizes).to(k.dtype).repeat_interleave(group, 1)
    values = values.reshape(batch, heads, count, head_dim)
    lacks = middle.unsupported(queries, legacy_start=legacy_start) if impl == "triton" else []
    values = middle.newton_schulz(
        queries, keys, values, iterations=iterations, scale=scale, legacy_start=legacy_start,
        landmark_mask=None if shown is None else shown.expand(batch, -1),
        impl="torch" if impl == "torch" or lacks else "triton",
    )  # fmt: skip
    bias = landmark_stages.hiding_bias(shown, q.dtype)
    return landmark_stages.stage2(q, keys, values, bias, scale=scale, impl=impl)
