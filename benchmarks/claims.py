"""What the papers claim and `sparseattn validate` found: the file of findings, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = "sparseattn-claims-1"
HEAD = ["", "claim of the paper", "measured here", "verdict"]
Findings = dict[str, dict[str, Any]]  # by name: claim, measured, verdict, and on what


def read(path: Path) -> Findings:
    """Return the findings of a file; ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of sparseattn validate")
    findings: Findings = content["findings"]
    return findings


def write(path: Path, findings: Findings) -> None:
    """Add findings to a file, or make it; those of the same name are replaced."""
    earlier = read(path) if path.is_file() else {}
    merged = dict(sorted({**earlier, **findings}.items(), key=lambda item: _order(item[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps({"format": FORMAT, "findings": merged}, indent=1, ensure_ascii=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def rows(findings: Findings) -> list[list[str]]:
    """Return the table of findings."""
    keys = ("claim", "measured", "verdict")
    return [HEAD, *([name, *(f[key] for key in keys)] for name, f in findings.items())]


def measured_on(findings: Findings) -> str:
    """Name the machines and commits of some findings."""
    machines = dict.fromkeys(
        f"{f['machine']}, {f['threads']} thread(s), torch {f['torch']}" for f in findings.values()
    )
    commits = dict.fromkeys(f["commit"] for f in findings.values())
    minutes = sum(f["seconds"] for f in findings.values()) / 60
    return f"{'; '.join(machines)}; commit {', '.join(commits)}; {minutes:.0f} minutes in all"


def _order(name: str) -> tuple[int, str]:
    """Sort V2b behind V2 and in front of V3."""
    digits = "".join(letter for letter in name if letter.isdigit())
    return int(digits or 0), name
