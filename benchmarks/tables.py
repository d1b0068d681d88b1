"""Writes what the README and the pages of results/ say of speed and of the papers' claims.

`make tables` runs it, on the committed results. What is between two marks of the README, and every
`results/<machine>/README.md`, is made here; a test holds them against the JSON beside them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sparseattn.benchmarks import claims, registry, results
from sparseattn.benchmarks.machine import ROOT
from sparseattn.benchmarks.runner import Record
from sparseattn.benchmarks.table import HEAD, break_even, by_case, cells, sweeps

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: made by `make tables` -->", "<!-- end of speed -->"
CLAIMS = RESULTS / "claims.json"
CLAIMS_MARKS = "<!-- claims: made by `make tables` -->", "<!-- end of claims -->"
Rows = list[list[str]]


def main() -> None:
    """Write the README and the pages, and draw the plots."""
    from sparseattn.benchmarks.plots import draw

    readme = ROOT / "README.md"
    text = with_claims(with_speed(readme.read_text(encoding="utf-8")))
    readme.write_text(text, encoding="utf-8")
    for folder in machines():
        draw(records_of(folder), folder)
        (folder / "README.md").write_text(page(folder), encoding="utf-8")


def machines() -> list[Path]:
    """Return the folders that hold results of the runner."""
    return sorted(folder for folder in RESULTS.glob("*") if files_of(folder))


def files_of(folder: Path) -> list[Path]:
    """Return the result files of a machine; other JSON beside them is not the runner's."""
    ops = registry.ops()
    return [path for path in sorted(folder.glob("*.json")) if path.stem in ops]


def records_of(folder: Path) -> list[Record]:
    """Return all records of a machine."""
    return results.read(files_of(folder))


def with_speed(readme: str) -> str:
    """Return the README with the part about speed made anew."""
    return _with_part(readme, (BEGIN, END), speed())


def with_claims(readme: str) -> str:
    """Return the README with the part about the papers' claims made anew."""
    return _with_part(readme, CLAIMS_MARKS, papers_claims())


def _with_part(readme: str, marks: tuple[str, str], part: str) -> str:
    before, _, rest = readme.partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if not found:
        raise ValueError(f"README.md lacks the marks {marks[0]} and {marks[1]}")
    return f"{before}{marks[0]}\n{part}\n{marks[1]}{after}"


def papers_claims() -> str:
    """Return the README's table of claims, and what it was measured on."""
    if not CLAIMS.is_file():
        return "No committed findings yet."
    findings = claims.read(CLAIMS)
    return f"Measured on {claims.measured_on(findings)}.\n\n{markdown(claims.rows(findings))}"


def speed() -> str:
    """Return the README's part: a table of gains for every machine and op, and what is missing."""
    parts, measured = [], set()
    gpu = False
    for folder in machines():
        records = records_of(folder)
        measured |= {record["op"] for record in records}
        gpu |= any(record["machine"]["device"] == "cuda" for record in records)
        for op in dict.fromkeys(record["op"] for record in records):
            parts += summary([r for r in records if r["op"] == op], folder)
    missing = [f"`{op}`" for op in registry.ops() if op not in measured]
    if missing:
        parts.append(f"No committed result yet: {', '.join(missing)}.")
    if not gpu:
        parts.append("Nothing has been measured on a GPU yet.")
    return "\n\n".join(parts)


def summary(records: Sequence[Record], folder: Path) -> list[str]:
    """Return the paragraphs of one op on one machine."""
    link = (folder / "README.md").relative_to(ROOT).as_posix()
    parts = [
        f"`{records[0]['op']}` on {where(records)}: how many times as fast as the fastest dense "
        "baseline, forward / forward plus backward, the second with mask or lists built each time; "
        f"bold where it loses. Every provider, and plots: [all figures]({link}).",
        markdown(grid(records, gains)),
    ]
    found = sweeps((r for r in records if r["ours"] and r.get("mode") == "full"), "density")
    ends = [f"{break_even(group)} ({_column(group[0], records)})" for group in found.values()]
    if ends:
        parts.append(f"Density at which the second breaks even: {'; '.join(ends)}.")
    parts += _memory(records)
    peer = strongest_peer(records)
    if peer:
        parts.append(f"The same against `{peer}`, which solves the same problem:")
        parts.append(markdown(grid(records, partial(against, peer=peer))))
    return parts


def strongest_peer(records: Sequence[Record]) -> str:
    """Return the peer with the best forward, as a geometric mean; "" where there is none."""
    logs: dict[str, list[float]] = {}
    for record in records:
        if record.get("mode") == "forward" and not record["ours"] and not record["dense"]:
            logs.setdefault(record["provider"], []).append(math.log(record.get("speedup", 1.0)))
    return max(logs, key=lambda name: statistics.mean(logs[name]), default="")


def _memory(records: Sequence[Record]) -> list[str]:
    """Say what share of the fastest dense baseline's peak memory ours has."""
    shares = []
    for case in by_case(record for record in records if record.get("mode") == "both"):
        dense = [record for record in case if record["dense"]]
        best = min(dense, key=lambda record: float(record["p50"]), default=None)
        ours = next((record for record in case if record["ours"]), None)
        if ours and best:
            shares.append(ours["peak_bytes"] / best["peak_bytes"])
    if not shares:
        return []
    span = f"{min(shares):.2g} to {max(shares):.2g}"
    return [f"Peak extra memory of forward plus backward is {span} of that baseline's."]


def grid(records: Sequence[Record], cell: Callable[[dict[str, Record]], str]) -> Rows:
    """Return cells by density (else by the first axis that varies) and by everything else."""
    cases = [case for case in by_case(records) if any(r["ours"] and r.get("mode") for r in case)]
    varied = _varied(records)
    down = "density" if "density" in varied else next(iter(varied), "")
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for case in cases:
        row, column = f"{case[0]['case'].get(down, 0):g}", _column(case[0], records)
        columns[column] = None
        rows.setdefault(row, {})[column] = cell(
            {f"{r['provider']} {r.get('mode')}": r for r in case}
        )
    body = [[row, *(found.get(column, "-") for column in columns)] for row, found in rows.items()]
    return [[down or "case", *columns], *sorted(body, key=lambda line: float(line[0]))]


def gains(modes: dict[str, Record]) -> str:
    """Return what our op gains over the fastest dense baseline: forward / full."""
    forward, full = (_ours(modes, mode).get("speedup") for mode in ("forward", "full"))
    return " / ".join(_bold(value) for value in (forward, full))


def against(modes: dict[str, Record], peer: str) -> str:
    """Return what our op gains over a peer: forward / full, where the peer has them."""
    values = []
    for mode in ("forward", "full"):
        ours, theirs = _ours(modes, mode), modes.get(f"{peer} {mode}")
        if mode == "full" and not theirs:  # it has no index to build
            theirs = modes.get(f"{peer} both")
        if ours and theirs:
            values.append(_bold(theirs["p50"] / ours["p50"]))
    return " / ".join(values) or "-"


def _ours(modes: dict[str, Record], mode: str) -> Record:
    """Return our record of a mode; without an index, full is forward and backward.

    Of several providers of ours the first is the op as it is; others compute something else.
    """
    ours = [record for record in modes.values() if record["ours"] and record.get("mode")]
    found = {r["mode"]: r for r in ours if r["provider"] == ours[0]["provider"]}
    return found.get(mode) or (found.get("both", {}) if mode == "full" else {})


def _bold(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return text if float(text) >= 1 else f"**{text}**"


def _varied(records: Sequence[Record]) -> list[str]:
    """Return the axes that have more than one value, in the order of the op."""
    axes = records[0]["case"]
    return [axis for axis in axes if len({record["case"][axis] for record in records}) > 1]


def _column(record: Record, records: Sequence[Record]) -> str:
    """Name the dtype of a record and the axes that vary, but for the one that goes down."""
    varied = _varied(records)
    down = "density" if "density" in varied else next(iter(varied), "")
    axes = (f"{axis} {record['case'][axis]:g}" for axis in varied if axis != down)
    return ", ".join([record["dtype"], *axes])


def where(records: Sequence[Record]) -> str:
    """Name the machine, the versions and the commits of some records."""
    machine = records[-1]["machine"]
    commits = dict.fromkeys(record["machine"]["commit"] for record in records)
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{machine['name']}{threads}, torch {machine['torch']}, commit {', '.join(commits)}"


def markdown(rows: Rows) -> str:
    """Return a table; the first row is its heading."""
    heading, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *others])


def page(folder: Path) -> str:
    """Return the page of a machine: every provider of every case, and the plots."""
    records = records_of(folder)
    parts = [
        f"# Measured on {where(records)}",
        "Made by `make tables` from the JSON beside it. Medians (20th to 80th percentile) of calls "
        "that took turns; every result was held against float64 first. `gain` is over the fastest "
        "dense baseline, `!` marks a loss; pairs are forward / forward plus backward; `full` "
        "includes the index; `error` is a multiple of what the tolerance rule allows our op.",
    ]
    for op in dict.fromkeys(record["op"] for record in records):
        parts.append(f"## {op}")
        plots = sorted(path.name for path in folder.glob(f"{op}_*.png"))
        parts += [f"![{name}]({name})" for name in plots]
        for case in by_case(record for record in records if record["op"] == op):
            parts += _case(case)
    return "\n\n".join(parts) + "\n"


def _case(case: Sequence[Record]) -> list[str]:
    """Return the heading, the table and the notes of one case."""
    rows: Rows = [list(HEAD)]
    notes = []
    for name in dict.fromkeys(record["provider"] for record in case):
        modes = {r.get("mode"): r for r in case if r["provider"] == name}
        if None in modes:
            notes.append(f"`{name}`: {modes[None]['note']}")
        else:
            rows.append([name, *cells(modes)])
    fixed = ", ".join(f"{axis} {value:g}" for axis, value in case[0]["case"].items())
    heading = f"### {case[0]['dtype']}, {fixed}"
    return [heading, markdown(rows), *([f"Not timed: {'; '.join(notes)}."] if notes else [])]


if __name__ == "__main__":
    main()
