"""What launchers share: launch parameters, index lists, and how values reach a kernel.

This file imports no Triton, so that its types can be named anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """How one kernel is launched: tile sizes, warps, pipeline stages."""

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int


class IndexLists(NamedTuple):
    """Lists of one direction of a block mask, full and partial blocks apart.

    offsets [Bm, Hm, L + 1], indices [Bm, Hm, capacity]: line l keeps the blocks
    indices[offsets[l] : offsets[l + 1]]; int32, contiguous. Bm and Hm are 1 or the full size.
    partial_slots says where the token bits of a partial entry lie.
    """

    offsets: Tensor
    indices: Tensor
    partial_offsets: Tensor | None
    partial_indices: Tensor | None
    partial_slots: Tensor | None


def fit_tile(tile: int, block: int) -> int:
    """Return the largest power of two that divides `block` and is at most `tile`."""
    return min(tile, block & -block)


def split_head_dim(head_dim: int, itemsize: int = 2) -> tuple[int, int]:
    """Split a head dim into two powers of two that waste less than one: 72 -> (64, 16).

    The second is 0 where one power of two is as good, and up to 64 columns of float32, whose three
    TF32 products fill the registers. Both are at least 16, what a dot takes.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    first = whole // 2
    rest = max(16, 1 << (head_dim - first - 1).bit_length()) if head_dim > first else 0
    is_one = whole == 16 or first + rest >= whole or (itemsize == 4 and whole <= 64)
    return (whole, 0) if is_one else (first, rest)


def dot_precision(dtype: torch.dtype, float32: str) -> str:
    """Return how products are made: TF32 only for float32 where torch's own switch allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else float32


def raise_bfloat16(tensor: Tensor, interpreting: bool) -> Tensor:
    """Cast bfloat16 to float32 under Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    if interpreting and tensor.dtype == torch.bfloat16:
        return tensor.float()
    return tensor


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous, copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def in_steps(*tensors: Tensor) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return a step of 8 or 1 elements, and batch, head and row strides of [B, H, N, D] in steps.

    The compiler learns by itself only what 16 divides, see tiles.in_elements. Products of int32
    strides and the step stay int32. Strides are 0 where the size is 1 and serves all.
    """
    strides = [shared_strides(tensor, 3) for tensor in tensors]
    step = 8 if all(s % 8 == 0 and s < 2**31 for of_one in strides for s in of_one) else 1
    return step, tuple(tuple(s // step for s in of_one) for of_one in strides)


def describable(*tensors: Tensor) -> bool:
    """Say whether tensors [B, H, N, D] may be read by tile through descriptors (TMA).

    Addresses and strides must be whole multiples of 16 bytes and no row may stand for many.
    """
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride * tensor.element_size() % 16 == 0)
            for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        )
        for tensor in tensors
    )


def describe(tensor: Tensor, rows: int, columns: int) -> Any:
    """Return a descriptor of a tensor [B, H, N, D] that is read `rows` by `columns` at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [
        tensor.shape[3] if size == 1 else stride
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def shared_strides(tensor: Tensor, dims: int) -> tuple[int, ...]:
    """Return the first `dims` strides, 0 where the size is 1 and serves all."""
    return tuple(0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in range(dims))
