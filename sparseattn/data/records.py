"""One example of a folder: where its files are, and what is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One picture.

    path    the picture
    labels  finding -> 1 or 0; NaN where the table is uncertain and the policy is "ignore"
    group   patient: examples of one group never lie on both sides of a split
    boxes   (x, y, width, height) in pixels
    runs    run-length encoded masks, as `decode_runs` takes them
    text    of its report
    """

    path: Path
    labels: Mapping[str, float] = field(default_factory=dict)
    group: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    runs: tuple[str, ...] = ()
    text: str = ""
