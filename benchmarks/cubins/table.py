"""Writes docs/cubins.md from the records of `python -m cubins --all --json FILE`.

python -m cubins.table PINNED.json OLD.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from cubins.account import UNITS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cubins.md"
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "MUFU", "STL")
HEAD = """# What the compiler makes of every launch row

`make cubins-all` writes this page; do not edit it. One line is one row of a `tuning.py` on one GPU
generation, compiled with Triton {pinned} for the inputs named; all of it is read off the binary.

- **a SM**: blocks of threads that a multiprocessor holds at once.
- **HGMMA** to **STL**: instructions in the whole binary. STL is a register spilled, outside the
  inner loops ([which may](decisions/0010-spills.md)). *other inputs*: the most spills among the
  row's other inputs (biases, gates, odd head dims).
- **tensor** to **issue**: cycles that one turn of the main loop keeps each unit busy, for a block.
- **limit**: the unit that is busy longest. **share**: the share of the peak of its arithmetic that
  the row can reach if all units work at once, and if no two ever do. This is a [model](account.md),
  not a measurement.
- **Triton {old}**: "same", or what differs in registers, shared memory and spills.
"""


def page(pinned: dict[str, Any], old: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    before = {_key(record): record for record in old["records"]}
    lines = [HEAD.format(pinned=pinned["triton"], old=old["triton"])]
    if not pinned["all"]:
        lines.append("Other inputs of a row were not compiled for this state of the page.\n")
    for kernel in dict.fromkeys(record["kernel"] for record in pinned["records"]):
        records = [record for record in pinned["records"] if record["kernel"] == kernel]
        titles = ["sm", "inputs", "row", "registers", "shared", "a SM", *COUNTED, "other inputs"]
        titles += [*UNITS, "limit", "share", f"Triton {old['triton']}"]
        lines += [f"## {kernel}", "", f"Source `{pinned['kernels'][kernel]}`.", ""]
        lines += [_row(titles), _row(["---"] * len(titles))]
        rows: dict[tuple, list[dict[str, Any]]] = {}
        for record in records:
            rows.setdefault(_row_key(record), []).append(record)
        lines += [_row(_cells(first, others, before)) for first, *others in rows.values()]
        lines.append("")
    return "\n".join(lines)


def stale(text: str, hashes: dict[str, str]) -> list[str]:
    """Return the kernels that a page shows in another source, or not at all."""
    shown = dict(re.findall(r"^## (\w+)\n\nSource `(\w+)`", text, re.MULTILINE))
    return [name for name, present in hashes.items() if shown.get(name) != present]


def _cells(first: dict[str, Any], others: list[dict[str, Any]], before: dict) -> list[str]:
    cells = [str(first["capability"]), first["inputs"], first["row"], str(first["registers"])]
    cells += [str(first["shared"]), str(first["blocks"])]
    cells += [str(first["counts"][kind]) for kind in COUNTED]
    most = max((record["spills"] for record in others), default=0)
    cells.append(str(most) if others else "")
    cells += [f"{first['cycles'][unit]:.0f}" for unit in UNITS]
    cells += [first["limit"], f"{first['share']:.0%} to {first['alone']:.0%}"]
    cells.append(_difference(first, before.get(_key(first))))
    return cells


def _difference(record: dict[str, Any], other: dict[str, Any] | None) -> str:
    if other is None:
        return "not compiled"
    parts = [
        f"{other[what]} {word}"
        for what, word in (("registers", "registers"), ("shared", "shared"), ("spills", "STL"))
        if other[what] != record[what]
    ]
    return ", ".join(parts) or "same"


def _key(record: dict[str, Any]) -> tuple:
    return record["kernel"], record["capability"], record["row"], record["inputs"]


def _row_key(record: dict[str, Any]) -> tuple:
    return record["capability"], record["row_id"]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the page; refuse records with faults."""
    pinned, old = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
    if any(record["faults"] for record in pinned["records"] + old["records"]):
        print("the page wants sound rows; these have faults")
        return 1
    PAGE.write_text(page(pinned, old), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
