"""What a linear attention attends to, as two thin factors of its weights; nothing of Nq x Nk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops import attention_checks, linear_attention, linformer_attention
from sparseattn.ops import nystrom_attention as nystrom_op
from sparseattn.ops import performer_attention as performer_op
from sparseattn.ops.blocked.plan import accumulate_dtype as wide_dtype
from sparseattn.reference.linear_attention import MAPS
from sparseattn.reference.newton_schulz import newton_schulz
from sparseattn.reference.nystrom_attention import softmaxes
from sparseattn.reference.performer_attention import RELU_EPS, eps_features

_OP = "AttentionFactors"


@dataclass(frozen=True)
class AttentionFactors:
    """The weights of a linear attention, as the product of two thin matrices: o = left right v.

        weights_ij = sum_r left_ir right_rj

    For looking at attention: the map of a class token is one row of the product, a landmark's map
    one row of ``right``. With performer and linear attention rows of weights sum to 1; those of the
    others need not, and like those of "identity" may be negative.

    ::

        factors = AttentionFactors.performer(q, k, projection)
        of_class_token = factors.rows(slice(0, 1))  # [B, H, 1, Nk]
        of_features = factors.right  # [B, H, m, Nk]

    left: [B, H, Nq, m], right: [B, H, m, Nk]; float32, or float64 for float64. They are made by
    plain torch operations, differentiable, in B * H * m * (Nq + Nk) numbers; give the queries of
    interest alone where that is too much. The arguments are those of the ops. A query that sees
    nothing has weights of 0, and so has a masked key.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def performer(
        cls,
        q: Tensor,
        k: Tensor,
        projection: Tensor,
        *,
        kernel: str = "softmax",
        key_mask: Tensor | None = None,
        scale: float | None = None,
        eps: float = 0.0,
    ) -> AttentionFactors:
        """Return the factors of performer_attention; for "softmax" and "cosh" two softmaxes."""
        q, k, shown = _prepared(q, k, key_mask)
        projection = performer_op.check_projection(projection, q)
        scale = performer_op.check_scale(scale, q)
        performer_op.check_kernel(kernel, eps)
        if kernel == "cosh":
            projection = torch.cat((projection, -projection))
        of_q, of_k = (math.sqrt(scale) * t @ projection.mT for t in (q, k))
        if kernel == "relu":
            return cls._of_features(of_q.relu() + RELU_EPS, of_k.relu() + RELU_EPS, shown)
        if eps:
            return cls._of_features(*eps_features(of_q, of_k, q, k, shown, scale, eps), shown)
        logits = of_k - scale / 2 * k.square().sum(-1, keepdim=True)
        logits = logits.masked_fill(~shown, -math.inf).mT  # [B, H, m, Nk]
        lse = logits.logsumexp(-1)
        has_keys = shown.any(2, keepdim=True)
        right = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
        left = (of_q + lse.masked_fill(lse == -math.inf, 0)[:, :, None]).softmax(-1)
        return cls(left.where(has_keys, 0), right)

    @classmethod
    def linformer(
        cls,
        q: Tensor,
        k: Tensor,
        key_projection: Tensor,
        value_projection: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> AttentionFactors:
        """Return the factors of linformer_attention; ``right`` is the projection of the values."""
        scale = attention_checks.check_scale(_OP, scale, q)
        projections = linformer_attention.check_projections(key_projection, value_projection, k)
        group = q.shape[1] // max(1, k.shape[1])
        q, k, shown = _prepared(q, k, key_mask)
        keys, values = (_per_head(p.to(k.dtype), group) for p in projections)
        left = (q @ (keys @ k).mT * scale).softmax(-1)
        right = values.expand(*left.shape[:2], *values.shape[2:])
        return cls(left, right.masked_fill(~shown.mT, 0))

    @classmethod
    def linear(
        cls, q: Tensor, k: Tensor, feature_map: str = "elu", *, key_mask: Tensor | None = None
    ) -> AttentionFactors:
        """Return the factors of linear_attention; they have D columns."""
        linear_attention.check_feature_map(feature_map)
        q, k, shown = _prepared(q, k, key_mask)
        return cls._of_features(MAPS[feature_map](q), MAPS[feature_map](k), shown)

    @classmethod
    def nystrom(
        cls,
        q: Tensor,
        k: Tensor,
        num_landmarks: int | Sequence[int],
        *,
        iterations: int = 6,
        key_mask: Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
        legacy_start: bool = False,
    ) -> AttentionFactors:
        """Return the factors of nystrom_attention, F1 Z_t and F3; q has the tokens of k."""
        scale = attention_checks.check_scale(_OP, scale, q)
        cells, prefix = nystrom_op.check_landmarks(num_landmarks, grid, q.shape[2], _OP)
        q, k, _ = _prepared(q, k, key_mask)
        segments = nystrom_op.segments_of(q, grid, cells, prefix, key_mask)
        ids, count = segments.ids.expand(q.shape[0], -1), segments.counts.shape[1]
        first, third, queries, keys, exists = softmaxes(q, k, ids, count, scale)
        one = torch.eye(count, dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        inverse = newton_schulz(queries, keys, one, exists, iterations, scale, legacy_start)
        return cls(first @ inverse, third)

    @classmethod
    def _of_features(cls, phi_q: Tensor, phi_k: Tensor, shown: Tensor) -> AttentionFactors:
        """Return the factors of weights phi(q_i) . phi(k_j), rows divided by their sums."""
        phi_k = phi_k.masked_fill(~shown, 0)
        below = phi_q @ phi_k.sum(2)[..., None]
        is_zero = below == 0
        left = (phi_q / below.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
        return cls(left, phi_k.mT)

    def rows(self, queries: Any) -> Tensor:
        """Return the weights of some queries, [B, H, how many, Nk]: a slice, or a 1-D index."""
        return self.left[:, :, queries] @ self.right

    def dense(self) -> Tensor:
        """Return all weights, [B, H, Nq, Nk]."""
        return self.left @ self.right

    def attend(self, v: Tensor) -> Tensor:
        """Return o [B, H, Nq, D] of v [B, G, Nk, D], in the type of the factors."""
        v = v.repeat_interleave(self.left.shape[1] // max(1, v.shape[1]), 1).to(self.left.dtype)
        return self.left @ (self.right @ v)


def _prepared(q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check; return q, k for every query head, in a wide type, and shown [B or 1, 1, Nk, 1]."""
    q, k, _ = attention_checks.check_qkv(_OP, q, k, k)
    attention_checks.check_key_mask(_OP, key_mask, k)
    shown = torch.ones((1, k.shape[2]), dtype=torch.bool, device=k.device)
    shown = (shown if key_mask is None else key_mask)[:, None, :, None]
    k = k.repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1).masked_fill(~shown, 0)
    wide = wide_dtype(q.dtype)
    return q.to(wide), k.to(wide), shown


def _per_head(projection: Tensor, group: int) -> Tensor:
    """Return [1, 1 or H, m, Nk]."""
    if projection.dim() == 2:
        return projection[None, None]
    return projection.repeat_interleave(group, 0)[None]
