"""Result files: a list of runs, each with its machine and its records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparseattn.benchmarks.runner import Record
from sparseattn.benchmarks.table import break_even_lines, by_case, case_table, mean_lines

FORMAT = "sparseattn-bench-1"


class Writer:
    """Writes one run to a file after every case, so that a run cut short keeps what it has."""

    def __init__(
        self, path: Path | None, append: bool, machine: dict[str, Any], command: list[str]
    ) -> None:
        self.path = path
        self.earlier = load_runs(path) if path and append and path.is_file() else []
        self.run = {"machine": machine, "command": command}

    def write(self, records: list[Record]) -> None:
        """Replace the records of this run."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        runs = [*self.earlier, self.run | {"records": [_rounded(r) for r in records]}]
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(dumps({"format": FORMAT, "runs": runs}), encoding="utf-8")
        beside.replace(self.path)


def dumps(report: dict[str, Any]) -> str:
    """Return JSON with one line a record, so that a diff shows the figure that changed."""
    runs = []
    for run in report["runs"]:
        head = json.dumps({key: value for key, value in run.items() if key != "records"})
        lines = ",\n".join(json.dumps(record) for record in run["records"])
        runs.append(f'{head[:-1]}, "records": [\n{lines}\n]}}')
    return f'{{"format": "{report["format"]}", "runs": [\n{",".join(runs)}\n]}}\n'


def load_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a result file; ValueError if it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result file of sparseattn bench")
    runs: list[dict[str, Any]] = report["runs"]
    return runs


def read(paths: Iterable[Path]) -> list[Record]:
    """Return the records of some files, the latest of each kind, with the machine they are of.

    They come sorted by op, dtype (float32 first) and case, however many runs they were made in.
    """
    found = [
        record | {"machine": run["machine"]}
        for path in paths
        for run in load_runs(path)
        for record in run["records"]
    ]
    return sorted(latest(found), key=_place)


def _place(record: Record) -> tuple[Any, ...]:
    dtype = record["dtype"]
    return record["op"], dtype != "float32", dtype, tuple(record["case"].values())


def latest(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of every case, dtype, provider and mode; of a note and figures, one."""
    kept: dict[tuple, dict[Any, Record]] = {}
    for record in records:
        axes = tuple(record["case"].items())
        modes = kept.setdefault((record["op"], record["dtype"], axes, record["provider"]), {})
        if not record.get("mode"):
            modes.clear()
        modes.pop(None, None)
        modes[record.get("mode")] = record
    return [record for modes in kept.values() for record in modes.values()]


def show(records: list[Record]) -> None:
    """Print the tables of all cases."""
    for case in by_case(records):
        print(case_table(case) + "\n")
    print("\n".join([*mean_lines(records), *break_even_lines(records)]))


def rates_line(machine: dict[str, Any]) -> str:
    """Say what the floors are made of."""
    rates = (f"{rate:.3g} TFLOP/s {name}" for name, rate in machine["matmul_tflops"].items())
    return f"matrix product: {', '.join(rates)}; copy: {machine['copy_gbps']:.0f} GB/s"


def _rounded(record: Record) -> Record:
    """Four significant digits are more than a stopwatch has."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
