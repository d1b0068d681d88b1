"""Launch tables: how those of a tuning.py are found, and which rows were measured.

A table is a tuple of rows under a name in capitals. `MEASURED` beside it says on which GPU, with
which versions and when: table -> capability of the rows -> text, with 0 for rows that serve every
GPU. What it does not name was not measured. This file imports no Triton.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


def tables(module: ModuleType) -> dict[str, tuple[Any, ...]]:
    """Return the launch tables of a tuning.py by name."""
    found = {}
    for name, value in vars(module).items():
        is_table = name.isupper() and isinstance(value, tuple) and not hasattr(value, "_fields")
        if is_table and value and all(hasattr(row, "_fields") for row in value):
            found[name] = value
    return found


def unmeasured(module: ModuleType) -> dict[str, list[int]]:
    """Return the tables with rows that were never measured, and those rows' capabilities."""
    measured: dict[str, dict[int, str]] = getattr(module, "MEASURED", {})
    left = {
        name: sorted(
            {getattr(row, "capability", 0) for row in rows} - measured.get(name, {}).keys()
        )
        for name, rows in tables(module).items()
    }
    return {name: capabilities for name, capabilities in left.items() if capabilities}
