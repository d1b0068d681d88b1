"""The page of resources shows what the records say, and when it is out of date."""

import json
import sys
from pathlib import Path

import pytest
from cubins import table
from cubins.account import UNITS


def record(inputs: str = "bf16 D 64", row: str = "128 x 64", **changed: object) -> dict:
    made = {
        "kernel": "sum_kernel", "capability": 90, "row": row, "row_id": row, "inputs": inputs,
        "registers": 200, "shared": 4096, "blocks": 2, "spills": 0,
        "counts": dict.fromkeys(table.COUNTED, 7), "cycles": dict.fromkeys(UNITS, 3.2),
        "limit": "exp", "share": 0.5, "alone": 0.25, "faults": [],
    }  # fmt: skip
    return made | changed


def stored(*records: dict, triton: str = "3.7.1", every: bool = True) -> dict:
    kernels = {"sum_kernel": "0123456789abcdef"}
    return {"triton": triton, "kernels": kernels, "all": every, "records": list(records)}


def lines(text: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_a_line_is_a_row_with_its_first_inputs() -> None:
    loaded = record("bf16 D 64, bias", spills=5)
    pinned = stored(record(), loaded, record(row="64 x 64"))
    old = stored(record(registers=190), loaded, triton="3.6.0")
    first, second = lines(table.page(pinned, old))
    assert first[:6] == ["90", "bf16 D 64", "128 x 64", "200", "4096", "2"]
    assert first[6:14] == ["7"] * 7 + ["5"]
    assert first[14:] == ["3"] * 6 + ["exp", "50% to 25%", "190 registers"]
    assert second[2] == "64 x 64"
    assert second[-1] == "not compiled"


def test_the_page_knows_when_it_is_old() -> None:
    text = table.page(stored(record()), stored(record(), triton="3.6.0"))
    assert "Triton 3.7.1" in text and "Triton 3.6.0" in text
    assert lines(text)[0][-1] == "same"
    assert table.stale(text, {"sum_kernel": "0123456789abcdef"}) == []
    assert table.stale(text, {"sum_kernel": "f" * 16, "new_kernel": "0" * 16}) == [
        "sum_kernel",
        "new_kernel",
    ]


@pytest.mark.parametrize(
    ("changes", "every", "code"), [({}, True, 0), ({}, False, 0), ({"faults": ["x"]}, True, 1)]
)
def test_only_sound_records_make_a_page(
    changes: dict, every: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "PAGE", tmp_path / "cubins.md")
    files = [tmp_path / "pinned.json", tmp_path / "old.json"]
    for file in files:
        file.write_text(json.dumps(stored(record(**changes), every=every)))
    monkeypatch.setattr(sys, "argv", ["table", *map(str, files)])
    assert table.main() == code
    assert table.PAGE.exists() == (code == 0)
    if code == 0:
        assert ("were not compiled" in table.PAGE.read_text()) == (not every)
