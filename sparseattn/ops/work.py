"""How many operations an op takes and how many bytes it moves, whoever computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What any implementation has to do: operations that count, and bytes moved at least once.

    dense_flops is what the dense op of the same sizes takes in its forward.
    """

    flops: float
    bytes: float
    backward_flops: float
    backward_bytes: float
    dense_flops: float

    def of(self, mode: str) -> tuple[float, float, float]:
        """Return (flops, dense flops, bytes) of a mode; an index is not counted as work."""
        forward = (self.flops, self.dense_flops, self.bytes)
        factor = self.backward_flops / self.flops if self.flops else 0.0
        backward = (self.backward_flops, self.dense_flops * factor, self.backward_bytes)
        if mode == "forward":
            return forward
        if mode == "backward":
            return backward
        flops, dense, moved = (a + b for a, b in zip(forward, backward, strict=True))
        return flops, dense, moved


def floor_seconds(flops: float, moved: float, rate: float, bandwidth: float) -> float:
    """Return the least time: operations at `rate` a second, or bytes at `bandwidth` a second."""
    return max(flops / rate, moved / bandwidth)


def attention_work(
    q_shape: Sequence[int], k_shape: Sequence[int], pairs: float, item_bytes: int
) -> Work:
    """Softmax attention over `pairs` of all B * H * Nq * Nk pairs, lists read and written apart.

    Forward: two products of 2 * D operations a pair; reads q, k, v, writes o and lse (float32).
    Backward: five products; reads q, k, v, o, do, lse, writes dq, dk, dv.
    """
    batch, heads, q_len, head_dim = q_shape
    queries, keys = math.prod(q_shape) * item_bytes, math.prod(k_shape) * item_bytes
    lse = 4 * batch * heads * q_len
    return Work(
        flops=4 * head_dim * pairs,
        bytes=2 * queries + 2 * keys + lse,
        backward_flops=10 * head_dim * pairs,
        backward_bytes=4 * queries + 4 * keys + lse,
        dense_flops=4 * head_dim * batch * heads * q_len * k_shape[2],
    )
