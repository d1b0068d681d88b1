"""Making a dense encoder of volumes work on active patches alone, in place, and back.

The modules stay the same objects with the same parameters; their class changes. The model then
takes a ``PatchGrid`` and gives one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sparseattn import checks
from sparseattn.layers.sparse_conv3d import SparseConv3d, strided_obstacle
from sparseattn.layers.sparse_downsample import SparseDownConv3d, down_obstacle
from sparseattn.layers.sparse_norm import (
    SparseBatchNorm,
    SparseGroupNorm,
    SparseInstanceNorm,
    SparseLayerNorm,
    SparseSyncBatchNorm,
)
from sparseattn.layers.sparse_pointwise import POINTWISE, SparseChannelNorm
from sparseattn.layers.sparse_pool import SparseAvgPool3d, SparseMaxPool3d
from sparseattn.layers.submanifold_conv3d import SubmanifoldConv3d, dense_obstacle

_OP = "convert_masked"
_DENSE_CLASS, _ADDED = "_sparseattn_dense_class", "_sparseattn_added"
SIMPLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm3d: SparseBatchNorm,
    nn.SyncBatchNorm: SparseSyncBatchNorm,
    nn.GroupNorm: SparseGroupNorm,
    **POINTWISE,
}
PASSING = (nn.Identity,)  # hands on whatever it gets


@dataclass(frozen=True)
class MaskedEntry:
    """One module without children: its class, what it became, or why it was left alone."""

    name: str
    dense: str
    twin: str
    reason: str = ""


@dataclass(frozen=True)
class MaskedReport:
    """What ``convert_masked`` did, or with dry_run would do. ``print(report)`` shows it."""

    dry_run: bool
    entries: list[MaskedEntry] = field(default_factory=list)

    @property
    def swapped(self) -> list[str]:
        """Names of the modules that work on active patches."""
        return [entry.name for entry in self.entries if entry.twin]

    @property
    def refused(self) -> dict[str, str]:
        """Names of the modules left alone, and why."""
        return {entry.name: entry.reason for entry in self.entries if not entry.twin}

    def __str__(self) -> str:
        """Format a table."""
        verb = "would swap" if self.dry_run else "swapped"
        lines = [f"{_OP}: {verb} {len(self.swapped)} of {len(self.entries)} modules"]
        width = max((len(entry.name) for entry in self.entries), default=0)
        for entry in self.entries:
            mark, what = ("swapped", entry.twin) if entry.twin else ("refused", entry.reason)
            lines.append(f"  {mark}  {entry.name or '(model)':{width}}  {entry.dense}: {what}")
        return "\n".join(lines)


def convert_masked(
    model: nn.Module,
    *,
    skip: Iterable[str] = (),
    twins: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    dry_run: bool = False,
) -> MaskedReport:
    """Make a dense encoder of volumes compute on active patches alone, in place.

        report = convert_masked(encoder)
        y = encoder(PatchGrid.from_dense(volume, mask))   # a PatchGrid

    The result is that of the dense model with its features multiplied by the mask after every
    module, as SparK and HySparK do, with batch, layer, group and instance norms over active sites
    alone, and pools of the masked volume. What lies under the mask is never read, so NaN there does
    not leak. The mask comes with every call, inside its input: nothing global. Parameters, names,
    hooks and state_dict stay; ``revert_masked`` undoes it.

    Between its modules the model's forward may add, subtract and multiply: PatchGrids of one mask,
    numbers, and tensors [1, C, 1, 1, 1].

    Args:
        model: changed in place.
        skip: patterns of names, as of files (``"decoder.*"``), of modules to leave alone.
        twins: for classes of your own, the class that takes their place; it finds their parameters
            under the same names, and its forward takes and gives a PatchGrid.
        dry_run: change nothing, only report.

    Returns:
        What was swapped, what was refused, and why; print it.

    Raises:
        TypeError: the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model {checks.describe(model)}; expected an nn.Module")
    own, patterns = dict(twins or {}), (skip,) if isinstance(skip, str) else tuple(skip)
    report, chosen = MaskedReport(dry_run), []
    for name, module in model.named_modules():
        known = type(module) in own
        if _DENSE_CLASS in module.__dict__ or isinstance(module, PASSING):
            continue
        if not known and any(True for _ in module.children()):
            continue
        twin, reason = (own[type(module)], "") if known else _twin(module)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            twin, reason = None, "named by skip"
        shown = "" if twin is None else twin.__name__
        report.entries.append(MaskedEntry(name, type(module).__name__, shown, reason))
        if twin is not None:
            chosen.append((module, twin))
    if not dry_run:
        for module, twin in chosen:
            _swap(module, twin)
    return report


def revert_masked(model: nn.Module) -> None:
    """Undo ``convert_masked``: every module becomes what it was, with the parameters it has now."""
    for module in model.modules():
        if _DENSE_CLASS in module.__dict__:
            module.__class__ = module.__dict__.pop(_DENSE_CLASS)
            for name in module.__dict__.pop(_ADDED):
                delattr(module, name)


def _twin(module: Any) -> tuple[type[nn.Module] | None, str]:
    """Return the class that takes a module's place, or None and why there is none."""
    kind = type(module)
    if kind in SIMPLE:
        return SIMPLE[kind], ""
    if kind is nn.Conv3d:
        return _convolution(module)
    if kind in (nn.MaxPool3d, nn.AvgPool3d):
        return _pool(module)
    if kind is nn.InstanceNorm3d:
        if module.track_running_stats:
            return None, "track_running_stats=True; expected statistics of each sample"
        return SparseInstanceNorm, ""
    if kind is nn.LayerNorm:
        if len(module.normalized_shape) != 1:
            return None, f"normalized_shape={module.normalized_shape}; expected channels alone"
        return SparseLayerNorm, ""
    if getattr(module, "data_format", None) == "channels_first" and hasattr(module, "eps"):
        return SparseChannelNorm, ""
    return None, "no twin for this class; twins= takes your own"


def _convolution(conv: nn.Conv3d) -> tuple[type[nn.Module] | None, str]:
    if set(conv.stride) == {1}:
        obstacle = dense_obstacle(conv)
        return (None, obstacle) if obstacle else (SubmanifoldConv3d, "")
    if down_obstacle(conv) is None:
        return SparseDownConv3d, ""
    obstacle = strided_obstacle(conv)
    return (None, f"conv has {obstacle}") if obstacle else (SparseConv3d, "")


def _pool(pool: Any) -> tuple[type[nn.Module] | None, str]:
    if pool.ceil_mode:
        return None, "ceil_mode=True; expected False"
    if isinstance(pool, nn.AvgPool3d):
        return SparseAvgPool3d, ""
    if pool.return_indices or pool.dilation not in (1, (1, 1, 1)):
        return None, f"dilation={pool.dilation}, return_indices={pool.return_indices}"
    return SparseMaxPool3d, ""


def _swap(module: Any, twin: type[nn.Module]) -> None:
    module.__dict__[_DENSE_CLASS] = type(module)
    added: tuple[str, ...] = ()
    if twin is SparseInstanceNorm:  # a group norm of one channel a group
        added = ("num_groups", "num_channels")
        module.num_groups = module.num_channels = module.num_features
    module.__dict__[_ADDED] = added
    module.__class__ = twin
