"""Ops on DTensors: every rank attends for the batch entries and heads it holds.

No rank needs another's queries, so sharding over batch and heads moves nothing. A tensor that is
sharded otherwise, over tokens say, is gathered first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.structures.block_mask import BlockMask

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BATCH, _HEADS = 0, 1


def is_sharded(*tensors: Any) -> bool:
    """Say whether one of these is a DTensor, without importing torch.distributed."""
    return any(type(tensor).__name__ == "DTensor" for tensor in tensors)


def attend(
    op: str,
    function: Callable[..., Any],
    qkv: tuple[Any, Any, Any],
    extras: Mapping[str, Any],
) -> tuple[Tensor, ...]:
    """Return as DTensors what `function(q, k, v, **extras)` returns for local shards.

    That is a tuple of o [B, H, Nq, D] and perhaps others [B, H, Nq]. Masks and plain extras are
    taken as the whole, equal on every rank. Extras [B, ...] are cut along the batch, those of more
    than two dimensions [B, 1 or H, ...] also along the heads; a size of 1 is not cut. What is
    neither mask nor tensor is handed on.
    """
    from torch.distributed.tensor import DTensor

    for name, tensor in zip("qkv", qkv, strict=True):
        checks.require_tensor(op, name, tensor)
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{op}: {name} is a plain tensor; expected a DTensor as q, k and v are")
        if tensor.device_mesh != qkv[0].device_mesh:
            raise ValueError(f"{op}: {name} is on {tensor.device_mesh}; expected the mesh of q")
    q, k, _ = qkv
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{op}: q {checks.describe(q)} and k {checks.describe(k)}; expected 4 dimensions"
        )
    mesh, cuts = q.device_mesh, _cuts(q, k)
    parts = [_part(tensor, mesh, cuts) for tensor in qkv]
    local: dict[str, Any] = {}
    for name, extra in extras.items():
        if isinstance(extra, BlockMask):
            local[name] = extra.map(lambda tensor: _part(tensor, mesh, cuts))
        else:
            local[name] = _part(extra, mesh, cuts) if isinstance(extra, Tensor) else extra
    out, *others = function(*parts, **local)
    q = q.redistribute(placements=_placements(q, cuts))
    return _whole(out, q, tuple(q.stride())), *(_whole(other, q, None) for other in others)


def attend_without_pairs(
    op: str,
    function: Callable[..., Tensor],
    qkv: tuple[Any, Any, Any],
    key_mask: Any,
    beside: Mapping[str, tuple[Any, int]] | None = None,
) -> Tensor:
    """Return as a DTensor what `function(q, k, v, key_mask=..., **beside)` returns for shards.

    For ops whose other tensors serve the whole batch. beside: name -> one of them, or None, and
    how many of the dimensions batch and heads it lacks: 2 if it serves all heads, 1 if it has key
    heads in front.
    """
    lacks = {name: n for name, (t, n) in (beside or {}).items() if isinstance(t, Tensor)}
    extras = {name: t for name, (t, _) in (beside or {}).items()}
    extras |= {name: extras[name][(None,) * n] for name, n in lacks.items()}

    def run(q: Tensor, k: Tensor, v: Tensor, **local: Any) -> tuple[Tensor]:
        local |= {name: local[name][(0,) * n] for name, n in lacks.items()}
        return (function(q, k, v, **local),)

    return attend(op, run, qkv, {"key_mask": key_mask, **extras})[0]


def refuse(op: str, **wanted: bool) -> None:
    """Raise for options that return what has no shards of its own."""
    for name, value in wanted.items():
        if value:
            raise NotImplementedError(f"{op}: {name} is True; expected False with DTensors")


def _cuts(q: DTensor, k: DTensor) -> tuple[int | None, ...]:
    """Return, for every dimension of the mesh, which dimension of q it cuts: batch, heads, none.

    Heads stay whole where a rank would get query heads without their key heads.
    """
    from torch.distributed.tensor import Shard

    cuts = [p.dim if type(p) is Shard and _can_cut(q, p.dim) else None for p in q.placements]
    ranks = 1
    for size, cut in zip(q.device_mesh.shape, cuts, strict=True):
        ranks *= size if cut == _HEADS else 1
    if q.shape[1] != k.shape[1] and k.shape[1] % ranks:
        cuts = [None if cut == _HEADS else cut for cut in cuts]
    return tuple(cuts)


def _placements(tensor: Tensor, cuts: tuple[int | None, ...]) -> list[Any]:
    """Return where a tensor's parts belong; a size of 1 serves all and is not cut."""
    from torch.distributed.tensor import Replicate, Shard

    return [
        Shard(cut) if cut is not None and _can_cut(tensor, cut) else Replicate() for cut in cuts
    ]


def _can_cut(tensor: Tensor, dim: int) -> bool:
    """Say whether this is a batch or heads to cut; [B, Nk] has no heads."""
    known = dim == _BATCH or (dim == _HEADS and tensor.dim() > 2)
    return known and tensor.shape[dim] != 1


def _part(tensor: Tensor, mesh: Any, cuts: tuple[int | None, ...]) -> Tensor:
    """Return this rank's part; where it serves several ranks, its gradient is summed over them."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole: Any = tensor
    if not isinstance(tensor, DTensor):
        whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = _placements(whole, cuts)
    gradients = [
        Partial() if cut is not None and placement.is_replicate() else placement
        for cut, placement in zip(cuts, placements, strict=True)
    ]
    part: Tensor = whole.redistribute(placements=placements).to_local(grad_placements=gradients)
    return part


def _whole(part: Tensor, like: DTensor, strides: tuple[int, ...] | None) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*like.shape[:3], *part.shape[3:]))
    if strides is None:
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=strides
    )
