"""Checkpoints: safetensors and JSON, written so that a killed run never leaves half of one.

A checkpoint is a folder `step-000001200` with model.safetensors, optimizer.safetensors and
state.json. It is written under another name and then renamed, which is one step for the file
system. Weights are whole tensors by name, also from DDP and FSDP2, so that any number of
processes can load them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sparseattn.training.options import read_json, write_json

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_PREFIX = "step-"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state_dict on the CPU; every process must call it."""
    whole: dict[str, Any] = dict(get_model_state_dict(model, options=_WHOLE))
    return {name: _own(value) for name, value in whole.items()}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    write: bool,
    keep: int = 2,
) -> Path:
    """Save one checkpoint, and remove all but the latest `keep`.

    Every process must call it; the one with `write` writes.
    """
    target = folder / f"{_PREFIX}{step:09}"
    saved = weights(model)
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_WHOLE))
    if not write:
        return target
    part = folder / f".part-{target.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(saved, part / MODEL)
    save_file(
        {
            f"{key}:{name}": _own(value)
            for name, values in moments["state"].items()
            for key, value in values.items()
        },
        part / OPTIMIZER,
    )
    write_json(part / STATE, {"optimizer": moments["param_groups"], **state})
    for path in (*part.iterdir(), part):
        _to_disk(path)
    if target.exists():  # of a run that was resumed from before it
        _remove(target)
    part.rename(target)
    _to_disk(folder)
    for old in all_of(folder)[:-keep]:
        _remove(old)
    return target


def all_of(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a model, whatever it is wrapped in."""
    saved: dict[str, Any] = dict(_tensors(path / MODEL))
    set_model_state_dict(model, saved, options=_WHOLE)


def load_optimizer(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the optimizer of a checkpoint, and return its state.json."""
    state: dict[str, Any] = read_json(path / STATE)
    moments: dict[str, dict[str, Tensor]] = {}
    for word, value in _tensors(path / OPTIMIZER).items():
        key, _, name = word.partition(":")
        moments.setdefault(name, {})[key] = value
    groups = state.pop("optimizer")
    for group in groups:
        group["betas"] = tuple(group["betas"])
    found = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, found, options=_WHOLE)  # type: ignore[arg-type]
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return found


def _own(value: Tensor) -> Tensor:
    """A copy with memory of its own: safetensors refuses tensors that share it."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint; half of one is never seen under its name."""
    gone = path.with_name(f".part-old-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)
