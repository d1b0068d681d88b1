"""Launch tables say in data where they were measured."""

import importlib
from pathlib import Path

import pytest

from sparseattn.kernels.tables import tables

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
FAMILIES = sorted(path.parent.name for path in FOLDER.glob("*/tuning.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_measured_is_there(family: str) -> None:
    tuning = importlib.import_module(f"sparseattn.kernels.{family}.tuning")
    rows = tables(tuning)
    assert tuning.MEASURED.keys() <= rows.keys()
    for name, measured in tuning.MEASURED.items():
        assert measured.keys() <= {getattr(row, "capability", 0) for row in rows[name]}
        assert all(isinstance(text, str) and text for text in measured.values())


def test_there_are_tables() -> None:
    found = tables(importlib.import_module("sparseattn.kernels.block_attention.tuning"))
    assert {"FORWARD", "BACKWARD_DKV", "BACKWARD_DQ"} <= found.keys()
