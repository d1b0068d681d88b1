"""Options of a training, and model configs changed by name."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparseattn import checks

UNCERTAIN = ("usual", "zero", "one", "ignore")


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Saved as config.json in the run's folder.

    data              a sample of `sparseattn.data.samples`, or a folder
    out               folder of the run; nothing is written outside it
    epochs            passes over the data
    batch_size        of each process
    lr, weight_decay  of AdamW; biases, norms and single tokens do not decay
    warmup            share of the steps in which the rate climbs; afterwards it falls as a cosine
    clip              largest norm of the gradient
    seed              of the weights, of the order of the data, and of every step
    precision         "no" is float32; "fp16" and "bf16" are automatic mixed precision
    checkpoint_every  steps between two checkpoints; there is one after every epoch too
    log_every         steps between two rows of steps.csv
    workers           processes that load data
    layout, table     of a folder: see `sparseattn.data.sources`; the table is a CSV file
    target            finding of the table that is to be told, for tables with several
    uncertain         what an uncertain finding becomes: usual, zero, one or ignore
    image_size        side that pictures of a folder are resized to, or that volumes are cut to
    spacing, window, cache  of volumes: see `sparseattn.data.volumes`
    on_error          "raise" ends at the first bad file, "skip" leaves it out and lists it
    check             whether every file is read once before the training begins
    device            "auto" is the GPU where there is one
    begin             folder of a run whose weights and config a training begins with, for
                      recipes that take over from another model
    """

    data: str
    out: str
    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_every: int = 200
    log_every: int = 10
    workers: int = 0
    device: Literal["auto", "cpu"] = "auto"
    begin: str | None = None
    layout: str = "folders"
    table: str | None = None
    target: str | None = None
    uncertain: Literal["usual", "zero", "one", "ignore"] = "usual"
    image_size: int = 64
    spacing: float = 0.0
    window: str | None = None
    cache: float = 2.0
    on_error: Literal["raise", "skip"] = "raise"
    check: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every", "log_every", "image_size"):
            checks.require_int("train", name, getattr(self, name), low=1)
        for name in ("seed", "workers"):
            checks.require_int("train", name, getattr(self, name), low=0)
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train: warmup is {self.warmup}; expected a share in [0, 1)")
        if self.precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"train: precision is {self.precision!r}; expected no, fp16 or bf16")
        for name, known in (("on_error", ("raise", "skip")), ("uncertain", UNCERTAIN)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"train: {name} is {getattr(self, name)!r}; expected {' or '.join(known)}"
                )
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"train: device is {self.device!r}; expected auto or cpu")


def parse_changes(config_type: type, words: Sequence[str]) -> dict[str, Any]:
    """Turn words like "dim=32" into values of the types that the fields of a config have.

    Raises:
        ValueError: a word has no "=", names no field, or its value does not fit.
    """
    kinds = typing.get_type_hints(config_type)
    changes = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in kinds:
            known = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(config_type))
            raise ValueError(f"train: --set is {word!r}; expected NAME=VALUE of {known}")
        try:
            changes[name] = _value(kinds[name], text)
        except ValueError as error:
            raise ValueError(f"train: {name} is {text!r}; expected {error}") from None
    return changes


def _value(kind: Any, text: str) -> Any:
    """Read a value of that type; the message of a ValueError is what would fit."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if text not in options:
            raise ValueError(" or ".join(options))
        return text
    if isinstance(kind, types.UnionType):
        if text == "none" and type(None) in options:
            return None
        return _value(next(option for option in options if option is not type(None)), text)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError({int: "an int", float: "a number"}.get(kind, str(kind))) from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees all of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
