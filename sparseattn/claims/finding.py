"""What a check of a claim is given, and what it returns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from sparseattn.models.encoders import import_timm

Verdict = Literal["holds", "does not hold", "cannot be shown here"]


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    seeds    trainings of each kind
    epochs   of a training on digits; others take a fixed part of them
    seconds  that one timed call may take for all its rounds
    """

    seeds: int = 5
    epochs: int = 40
    seconds: float = 10.0


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and what follows."""

    claim: str
    measured: str
    verdict: Verdict


Check = Callable[[Effort], Finding]


def missing(*packages: str) -> str | None:
    """Say which of the packages cannot be imported, if one cannot."""
    for package in packages:
        try:
            import_timm() if package == "timm" else importlib.import_module(package)
        except (ImportError, RuntimeError) as error:
            return f"needs {package}, which cannot be imported: {error}"
    return None


def found(claim: str, measured: str, holds: bool) -> Finding:
    """Return a finding of something that could be measured."""
    return Finding(claim, measured, "holds" if holds else "does not hold")


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation of shares."""
    return f"{mean(values):.1%} ± {stdev(values) if len(values) > 1 else 0:.1%}"
