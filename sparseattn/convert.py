"""Swapping the attention of an existing model for sparse attention, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sparseattn import checks
from sparseattn.integrations import swap, torch, transformers
from sparseattn.integrations.find import find_attention
from sparseattn.layers.registry import make_method

_OP = "convert"


@dataclass(frozen=True)
class Entry:
    """One attention module: what was done with it and why."""

    name: str
    host: str
    swapped: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What ``convert`` did, or with dry_run would do. ``print(report)`` shows it as a table."""

    method: str
    options: dict[str, Any]
    dry_run: bool
    entries: list[Entry] = field(default_factory=list)

    @property
    def swapped(self) -> list[str]:
        """Names of the modules that attend sparsely."""
        return [entry.name for entry in self.entries if entry.swapped]

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the attention modules left alone, and why."""
        return {entry.name: entry.note for entry in self.entries if not entry.swapped}

    def __str__(self) -> str:
        """Format a table."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        verb = "would swap" if self.dry_run else "swapped"
        total = f"{len(self.swapped)} of {len(self.entries)} attention modules"
        lines = [f"convert({self.method!r}{options}): {verb} {total}"]
        width = max((len(entry.name) for entry in self.entries), default=0)
        for entry in self.entries:
            mark = "swapped" if entry.swapped else "skipped"
            note = f": {entry.note}" if entry.note else ""
            lines.append(f"  {mark}  {entry.name or '(model)':{width}}  {entry.host}{note}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    method: str = "topk",
    *,
    skip: Iterable[str] = (),
    dry_run: bool = False,
    **options: Any,
) -> Report:
    """Make the attention of a timm, Hugging Face, MONAI or plain torch model sparse, in place.

        report = convert(model, "topk", keep=0.25)

    The attention modules keep their parameters, names, hooks and place, so optimizers and
    checkpoints go on as before; ``revert(model)`` undoes it. Convert before you compile the model
    or wrap it for distributed training. Converting again starts from the dense model.

    Args:
        model: changed in place.
        method: "topk", "saliency", "window", "performer", "nystrom", "linformer", "linear" or
            "dense".
        skip: patterns of names, as of files (``"blocks.0.*"``), of modules to leave alone.
        dry_run: change nothing, only report.
        options: of the method, by name; see docs/layers.md. `prefix` defaults to the number of
            class and register tokens where the model tells it.

    Returns:
        What was swapped, what was skipped, and why; print it.

    Raises:
        TypeError: an option that the method does not have.
        ValueError: an unknown method.
        NotImplementedError: a Hugging Face model whose attention implementation cannot be set.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model {checks.describe(model)}; expected an nn.Module")
    probe = make_method(method, options, _OP)
    if not dry_run:
        revert(model)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    report = Report(method, options, dry_run)
    chosen = []
    for found in find_attention(model):
        reason = found.obstacle(probe)
        if any(fnmatchcase(found.name, pattern) for pattern in patterns):
            reason = "named by skip"
        if reason is None:
            chosen.append(found)
        note = found.remark(probe) if reason is None else reason
        report.entries.append(Entry(found.name, found.host_class, reason is None, note))
    if dry_run:
        return report
    try:
        for found in chosen:
            found.swap(method, options)
        for _, hf_model in transformers.models_in(model):
            transformers.select(hf_model)
    except Exception:
        revert(model)
        raise
    torch.set_nested_tensors(model)
    return report


def revert(model: nn.Module) -> None:
    """Undo ``convert``: every module becomes what it was, with the parameters it has now."""
    for module in list(model.modules()):
        if swap.is_adopted(module):
            swap.give_back(module)
    for _, hf_model in transformers.models_in(model):
        transformers.deselect(hf_model)
    torch.set_nested_tensors(model)
