"""Tensors of a slab as tables of blocks: views where they lie in whole blocks, else copies."""

from __future__ import annotations

from torch import Tensor

from sparseattn.ops.blocked.plan import Problem, Scratch, Slab, accumulate_dtype


def keys(tensor: Tensor, slab: Slab, problem: Problem, scratch: Scratch, name: str) -> Tensor:
    """Return a slab's keys or values as [blocks, block_k, D], 0 past the last key."""
    part = tensor[slab.b0 : slab.b1, slab.g0 : slab.g1]
    return _blocks(part, problem.block_size[1], scratch, name, 0.0)


def queries(
    tensor: Tensor,
    slab: Slab,
    problem: Problem,
    scratch: Scratch,
    name: str,
    fill: float = 0.0,
) -> Tensor:
    """Return a slab's queries, or values per query, as [query blocks, block_q, ...].

    Places past the last query hold `fill`.
    """
    return _blocks(_of_queries(tensor, slab, problem), problem.block_size[0], scratch, name, fill)


def sums(gradient: Tensor, slab: Slab, problem: Problem, scratch: Scratch, name: str) -> Tensor:
    """Return zeros [blocks, block_k * D] to sum dk or dv in: `gradient` itself if it can be."""
    part = gradient[slab.b0 : slab.b1, slab.g0 : slab.g1]
    block, wide = problem.block_size[1], accumulate_dtype(gradient.dtype)
    if gradient.dtype == wide and part.shape[2] % block == 0 and part.is_contiguous():
        return part.view(-1, block * part.shape[3])
    blocks = part.shape[0] * part.shape[1] * -(-part.shape[2] // block)
    return scratch.take(name, (blocks, block * part.shape[3]), wide).zero_()


def store_sum(gradient: Tensor, total: Tensor, slab: Slab) -> None:
    """Write a slab's sums to their place, unless they were made there."""
    _store(gradient[slab.b0 : slab.b1, slab.g0 : slab.g1], total)


def store(target: Tensor, table: Tensor, slab: Slab, problem: Problem) -> None:
    """Write a table of values per query to its place, unless it is a view of that place."""
    _store(_of_queries(target, slab, problem), table)


def _of_queries(tensor: Tensor, slab: Slab, problem: Problem) -> Tensor:
    heads = slice(slab.g0 * problem.group, slab.g1 * problem.group)
    return tensor[slab.b0 : slab.b1, heads]


def _store(part: Tensor, table: Tensor) -> None:
    if table.data_ptr() != part.data_ptr():
        part.copy_(table.view(*part.shape[:2], -1, *part.shape[3:])[:, :, : part.shape[2]])


def _blocks(part: Tensor, block: int, scratch: Scratch, name: str, fill: float) -> Tensor:
    """Return part [b, h, N, ...] as [b * h * blocks, block, ...]."""
    length, rest = part.shape[2], part.shape[3:]
    if length % block == 0 and part.is_contiguous():
        return part.view(-1, block, *rest)
    padded = -(-length // block) * block
    copy = scratch.take(name, (*part.shape[:2], padded, *rest), part.dtype)
    copy[:, :, :length].copy_(part)
    copy[:, :, length:].fill_(fill)
    return copy.view(-1, block, *rest)
