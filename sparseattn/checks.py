"""One voice for every error that a wrong argument causes.

    <op>: <argument> <what it is>; expected <rule>, <name>=<value> (from <argument>)

Wrong shape or value: ValueError. Wrong type or dtype: TypeError.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

_LONGEST = 80  # characters of a value that an error repeats


def describe(value: Any) -> str:
    """Say what a value is, in one short line: a tensor's shape, else itself and its type."""
    if isinstance(value, Tensor):
        return f"has shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"is {text} ({type(value).__name__})"


class Shapes:
    """Binds dimension names to sizes as tensors are checked one after the other.

    A pattern is a list of names: "B H Nq D". A name met before must have the same size; a new one
    is bound. "1|H" allows 1 or the bound size; a number stands for itself.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._sizes: dict[str, tuple[int, str]] = {}

    def set(self, name: str, size: int, source: str) -> None:
        """Bind a name that comes from something other than a tensor's shape."""
        self._sizes[name] = (size, source)

    def bind(self, argument: str, tensor: Any, pattern: str) -> None:
        """Check one tensor against a pattern, binding the names it is the first to use."""
        require_tensor(self.op, argument, tensor)
        names = pattern.split()
        if tensor.dim() != len(names):
            raise self._mismatch(argument, tensor, names)
        for name, size in zip(names, tensor.shape, strict=True):
            if name.isdigit():
                fits = size == int(name)
            elif "|" in name:
                fits = any(size == self._known(option) for option in name.split("|"))
            elif name in self._sizes:
                fits = size == self._sizes[name][0]
            else:
                self._sizes[name] = (size, argument)
                fits = True
            if not fits:
                raise self._mismatch(argument, tensor, names)

    def _known(self, name: str) -> int:
        return int(name) if name.isdigit() else self._sizes[name][0]

    def _mismatch(self, argument: str, tensor: Tensor, names: list[str]) -> ValueError:
        mentioned = [part for name in names for part in name.split("|")]
        known = [
            f"{name}={self._sizes[name][0]} (from {self._sizes[name][1]})"
            for name in dict.fromkeys(mentioned)
            if name in self._sizes and self._sizes[name][1] != argument
        ]
        rule = ", ".join([f"[{', '.join(n.replace('|', ' or ') for n in names)}]", *known])
        return ValueError(f"{self.op}: {argument} {describe(tensor)}; expected {rule}")


def require_tensor(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} {describe(value)}; expected a torch.Tensor")


def require_dtype(op: str, argument: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the tensor's dtype is one of those allowed."""
    if tensor.dtype not in allowed:
        rule = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {argument} has dtype {tensor.dtype}; expected {rule}")


def require_floating(op: str, argument: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{op}: {argument} has dtype {tensor.dtype}; expected a floating point dtype"
        )


def require_device(
    op: str, argument: str, tensor: Tensor, device: torch.device, source: str
) -> None:
    """Raise ValueError unless the tensor lies on the device."""
    if tensor.device != device:
        raise ValueError(
            f"{op}: {argument} is on {tensor.device}; "
            f"expected the device of {source}, device={device} (from {source})"
        )


def require_int(op: str, argument: str, value: Any, *, low: int) -> None:
    """Raise unless the value is an integer of at least `low` (a bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {argument} {describe(value)}; expected an int >= {low}")
    if value < low:
        raise ValueError(f"{op}: {argument} is {value}; expected an int >= {low}")


def three(op: str, argument: str, value: Any, low: int = 1) -> tuple[int, int, int]:
    """Check a number, or one for each axis; return one for each axis."""
    values = (value,) * 3 if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        raise TypeError(
            f"{op}: {argument} {describe(value)}; expected an int >= {low} or three of them"
        )
    for number in values:
        require_int(op, argument, number, low=low)
    return values[0], values[1], values[2]


def require_bool(op: str, argument: str, value: Any) -> None:
    """Raise TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {argument} {describe(value)}; expected a bool")


def keep_share(op: str, keep: Any) -> int | tuple[int, int]:
    """Check how much to keep: return a count, or a fraction as numerator and denominator.

    As a ratio of whole numbers 0.28 of 25 is 7, although 0.28 * 25 comes to a little more.
    """
    rule = "an int >= 0 or a float in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(f"{op}: keep {describe(keep)}; expected {rule}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{op}: keep is {keep}; expected {rule}")
        share = Fraction(keep).limit_denominator(10**6)
        # smaller than a millionth: the least there is
        return (share.numerator, share.denominator) if share.numerator else (1, 10**6)
    if keep < 0:
        raise ValueError(f"{op}: keep is {keep}; expected {rule}")
    return keep  # type: ignore[return-value]
