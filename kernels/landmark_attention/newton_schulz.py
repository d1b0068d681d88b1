"""Launchers of newton_schulz: pseudo-inverses of softmax matrices of landmarks, times values.

    out = Z_t s with Z_t -> pinv(softmax(scale * q k^T)), t steps of the cubic recurrence

Products are float32 whatever the inputs: rounded to TF32 or 16 bits they break the recurrence.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .call import capability_of, raised
from .newton_schulz_backward import newton_schulz_bwd_kernel
from .newton_schulz_forward import newton_schulz_fwd_kernel


def forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    iterations: int,
    scale: float,
) -> Tensor:
    """Return Z_t values [B, H, m, D], float32; mask bool [B, m], False = no landmark."""
    out = torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    tensors, options = _prepared((queries, keys, values), mask, tuning.NEWTON_SCHULZ_FORWARD)
    work = _work(values, 6, options["M"])
    with torch.cuda.device_of(values) if values.is_cuda else nullcontext():
        newton_schulz_fwd_kernel[(values.shape[0] * values.shape[1],)](
            *tensors, out, work, values.shape[1], values.shape[2], iterations, scale, **options
        )
    return out


def backward(
    dout: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    iterations: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dqueries, dkeys and dvalues [B, H, m, D], float32; iterates are made anew."""
    dout = dout.float().contiguous()
    found = torch.empty_like(dout), torch.empty_like(dout), torch.empty_like(dout)
    if dout.numel() == 0:
        return found
    tensors, options = _prepared((queries, keys, values), mask, tuning.NEWTON_SCHULZ_BACKWARD)
    work = _work(values, iterations + 11, options["M"])
    with torch.cuda.device_of(values) if values.is_cuda else nullcontext():
        newton_schulz_bwd_kernel[(values.shape[0] * values.shape[1],)](
            dout, *tensors, *found, work, values.shape[1], values.shape[2], iterations, scale,
            **options,
        )  # fmt: skip
    return found


def _prepared(
    inputs: tuple[Tensor, ...], mask: Tensor | None, table: tuple[tuning.MatrixRow, ...]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return contiguous inputs with the mask, and flags, tiles and launch parameters."""
    tensors = tuple(raised(tensor).contiguous() for tensor in inputs)
    length, head_dim = inputs[0].shape[2:]
    row = tuning.pick_matrix(table, capability_of(inputs[0]))
    size = max(16, 1 << (length - 1).bit_length())
    options = {
        "HAS_MASK": mask is not None,
        "D": head_dim,
        "M": size,
        "TILE": min(row.launch.tile_q, size),
        "PRECISION": row.float32,
        "num_warps": row.launch.num_warps,
        "num_stages": row.launch.num_stages,
    }
    return (*tensors, tensors[2] if mask is None else mask.contiguous().view(torch.uint8)), options


def _work(values: Tensor, matrices: int, size: int) -> Tensor:
    """Return memory for that many matrices of every head."""
    heads = values.shape[0] * values.shape[1]
    return values.new_empty((heads, matrices, size, size), dtype=torch.float32)
