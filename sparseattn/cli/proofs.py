"""Reads the GPU proofs of a checkout, and says which kernels they still hold for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseattn.testing import sources

REHEARSAL = (
    "cpu-interpreter"  # where results of Triton's interpreter are kept; they prove no binary
)


def kernels(folder: Path) -> dict[str, dict[str, Any]]:
    """Return for every kernel its hash, the GPUs it is proven on, and if on none, why.

    folder: holds <gpu>/*.json. A kernel is proven on a GPU if a check of its numbers passed there
    and none went wrong, all with its present source: the hash is that of `kernel_hashes`.
    """
    records = list(_records(folder))
    found = {}
    for name, present in sources.kernel_hashes().items():
        mine = [(gpu, record) for gpu, record in records if name in record.get("kernels", {})]
        holding = [(gpu, record) for gpu, record in mine if record["kernels"][name] == present]
        proven = sorted({gpu for gpu, record in holding if _proves(record)} - _refuted(holding))
        found[name] = {"hash": present, "proven": proven, "why": _why(mine, holding, proven)}
    return found


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every record with its GPU; of records of the same check the last one counts."""
    for path in sorted(folder.glob("*/*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == REHEARSAL or "records" not in stored:
            continue
        last = {}
        for record in stored["records"]:
            key = tuple(record.get(part) for part in ("op", "case", "check", "dtype"))
            last[key] = record
        for record in last.values():
            yield path.parent.name, record


def _proves(record: dict[str, Any]) -> bool:
    return record["check"] == "numbers" and record["status"] == "passed"


def _refuted(records: list[tuple[str, dict[str, Any]]]) -> set[str]:
    return {gpu for gpu, record in records if record["status"] in ("wrong", "failed")}


def _why(mine: list[Any], holding: list[Any], proven: list[str]) -> str:
    """Return why a kernel is proven nowhere; empty if it is proven somewhere."""
    if proven:
        return ""
    for gpu, record in holding:
        if record["status"] in ("wrong", "failed"):
            return f"unproven: {record['check']} of {record['op']} {record['status']} on {gpu}"
    if holding:
        return "unproven: its numbers were never checked"
    if mine:
        return "unproven: changed since it was proven"
    return "unproven: no result of a GPU names it"
