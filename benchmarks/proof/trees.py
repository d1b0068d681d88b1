"""Arguments of a case as trees: dicts, tuples and frozen dataclasses with tensors at the ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def map_tensors(change: Callable[..., Tensor], *trees: Any) -> Any:
    """Return a tree like the first, each tensor replaced by `change` of those in its place."""
    first = trees[0]
    if isinstance(first, Tensor):
        return change(*trees)
    if isinstance(first, dict):
        return {name: map_tensors(change, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, (tuple, list)):
        items = [map_tensors(change, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        parts = {n: map_tensors(change, *(getattr(tree, n) for tree in trees)) for n in names}
        return dataclasses.replace(first, **parts)
    return first


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a tree, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return iter(found)


def to_float(tree: Any, dtype: torch.dtype) -> Any:
    """Return the tree with every floating tensor in one dtype."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def copy_into(tree: Any, values: Any) -> None:
    """Overwrite the tensors of a tree; ValueError if a shape differs."""
    for target, source in zip(tensors(tree), tensors(values), strict=True):
        if target.shape != source.shape:
            raise ValueError(
                f"another seed gives shape {list(source.shape)} for {list(target.shape)}; "
                "expected the same shapes from every seed"
            )
        target.copy_(source)


def sample(tree: Any, index: int) -> Any:
    """Return one sample of everything, as a batch of one."""
    return map_tensors(lambda t: t[index : index + 1] if t.shape[0] > 1 else t, tree)


def with_mates(tree: Any, others: Any) -> Any:
    """Return the first sample of `tree` among the other samples of `others`, laid out as `tree`."""

    def mix(own: Tensor, other: Tensor) -> Tensor:
        mixed = own.clone()
        mixed[1:] = other[1:]
        return mixed

    return map_tensors(mix, tree, others)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Say whether two tensors agree in shape, dtype and every bit, also those of NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.view(whole), right.view(whole))
