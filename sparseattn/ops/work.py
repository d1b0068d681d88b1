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


def performer_work(
    q_shape: Sequence[int], k_shape: Sequence[int], features: int, item_bytes: int
) -> Work:
    """Two softmaxes through m features: two products of 2 * m * D a token, four in the backward.

    Forward: reads q, k, v, writes o. Backward: reads q, k, v, do, writes dq, dk, dv.
    """
    queries, keys = math.prod(q_shape), math.prod(k_shape)
    flops = 4.0 * features * (queries + keys)
    return Work(
        flops=flops,
        bytes=2.0 * (queries + keys) * item_bytes,
        backward_flops=2 * flops,
        backward_bytes=(3.0 * queries + 4.0 * keys) * item_bytes,
        dense_flops=4.0 * queries * k_shape[2],
    )


def nystrom_work(
    q_shape: Sequence[int], k_shape: Sequence[int], landmarks: int, iterations: int, item_bytes: int
) -> Work:
    """Means, two softmaxes through m landmarks, whose gradients are a product more, and the steps.

    Forward: reads q twice, k, v, writes o. Backward: reads q, k, v, do, writes dk, dv and dq, which
    it reads and writes once more.
    """
    queries, keys = math.prod(q_shape), math.prod(k_shape)
    batch, heads, _, head_dim = q_shape
    forward, backward = newton_schulz_flops(batch * heads, landmarks, head_dim, iterations)
    return Work(
        flops=8.0 * queries * landmarks + forward,
        bytes=(3.0 * queries + 2.0 * keys) * item_bytes,
        backward_flops=20.0 * queries * landmarks + backward,
        backward_bytes=(5.0 * queries + 4.0 * keys) * item_bytes,
        dense_flops=4.0 * queries * k_shape[2],
    )


def newton_schulz_flops(
    matrices: int, landmarks: int, head_dim: int, iterations: int
) -> tuple[float, float]:
    """Return the operations of both directions: 4 products m^3 a step, 15 with the iterates anew.

    Beside them 2 products m^2 D for the matrix and the result, and 5 for their gradients.
    """
    square = 2.0 * matrices * landmarks**3
    thin = 2.0 * matrices * landmarks**2 * head_dim
    return 4 * iterations * square + 2 * thin, 15 * iterations * square + 5 * thin


def linformer_work(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    landmarks: int,
    item_bytes: int,
    is_trained: bool = True,
) -> Work:
    """Two projections [m, Nk] shared by the heads, and a softmax over what they make.

    Forward: reads q, k, v and the projections, writes o. Backward: reads q, do and the projections,
    writes dq, dk, dv; where the projections are trained, reads k, v and writes their gradients.
    """
    queries, keys = math.prod(q_shape), math.prod(k_shape)
    projections = 2.0 * landmarks * k_shape[2]
    return Work(
        flops=4.0 * landmarks * (queries + keys),
        bytes=(2.0 * (queries + keys) + projections) * item_bytes,
        backward_flops=landmarks * (10.0 * queries + (8.0 if is_trained else 4.0) * keys),
        backward_bytes=item_bytes
        * (3.0 * queries + 2.0 * keys + projections + is_trained * (2.0 * keys + projections)),
        dense_flops=4.0 * queries * k_shape[2],
    )


def linear_work(q_shape: Sequence[int], k_shape: Sequence[int], item_bytes: int) -> Work:
    """A product of 2 * D^2 a query and a key, two in the backward.

    Forward: reads q, k, v, writes o. Backward: reads q, k, v, do, writes dq, dk, dv.
    """
    queries, keys = math.prod(q_shape), math.prod(k_shape)
    flops = 2.0 * (queries + keys) * q_shape[3]
    return Work(
        flops=flops,
        bytes=2.0 * (queries + keys) * item_bytes,
        backward_flops=2 * flops,
        backward_bytes=(3.0 * queries + 4.0 * keys) * item_bytes,
        dense_flops=4.0 * queries * k_shape[2],
    )
