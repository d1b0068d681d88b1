"""How many operations block-sparse attention takes, for torch.utils.flop_counter."""

from __future__ import annotations

from typing import Any

import torch

from sparseattn.ops import flops


def register() -> None:
    """Register the formulas once the counter is loaded."""
    ops = torch.ops.sparseattn
    flops.register(
        {
            ops.block_sparse_attention: _forward,
            ops.block_sparse_attention_backward: _backward,
        }
    )


def _count(q_shape: Any, k_len: int, lists: tuple[Any, Any], block_q: int, block_k: int) -> int:
    """2 products of 2 * D operations per pair, over all the blocks that the lists can hold."""
    batch, heads, q_len, head_dim = q_shape
    held = sum(shape[2] for shape in lists if shape is not None)
    blocks = min(held, -(-q_len // block_q) * -(-k_len // block_k))
    return int(4 * head_dim * batch * heads * blocks * block_q * block_k)


def _forward(*shapes: Any, **_: Any) -> int:
    # q, k, v, bias, gate, then five row lists, token bits, block_q, block_k
    return _count(shapes[0], shapes[1][2], (shapes[6], shapes[8]), shapes[11], shapes[12])


def _backward(*shapes: Any, **_: Any) -> int:
    # dout, dlse, out, lse, then as the forward, with five column lists before the token bits
    return (
        _count(shapes[4], shapes[5][2], (shapes[10], shapes[12]), shapes[20], shapes[21]) * 5 // 2
    )
