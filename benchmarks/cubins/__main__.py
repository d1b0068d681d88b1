"""`make cubins`: compile, judge, print, and store what was found.

    python -m cubins [--all] [--capability 90] [--only TEXT] [--processes N] [--json FILE]

Run it with benchmarks/ on the path, and with the Triton that is to compile in front of it. The exit
code is 1 if a row is not fit to ship, or a kernel or a row is reached by no case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

from cubins import families, gate, table
from sparseattn.testing import sources


def line(record: dict[str, Any]) -> str:
    """Return one record as a line."""
    name = f"sm_{record['capability']} {record['kernel']} {record['inputs']}"
    name += f" ({record['row']})" if record["row"] else ""
    if "registers" not in record:
        return f"FAIL {name}: {'; '.join(record['faults'])}"
    text = f"{record['registers']} registers, {record['shared']} shared, {record['blocks']} a SM"
    counts = " ".join(f"{kind} {n}" for kind, n in record["counts"].items() if n)
    text += f", {counts}; limit {record['limit']}, {record['share']:.0%} of peak"
    faults = "".join(f"\n     {fault}" for fault in record["faults"])
    return f"{'FAIL' if faults else 'ok  '} {name}: {text}{faults}"


def main() -> int:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(prog="cubins", description=__doc__.split("\n")[0])
    scopes = parser.add_mutually_exclusive_group()
    scopes.add_argument("--all", action="store_true", help="every case, not each row's first")
    scopes.add_argument("--kernels", action="store_true", help="the first case of each kernel")
    parser.add_argument("--capability", type=int, action="append", choices=families.CAPABILITIES)
    parser.add_argument("--only", default="", help="kernels and inputs that contain this text")
    parser.add_argument("--package", default="sparseattn.kernels", help="where families are")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="store the records here")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    start = time.monotonic()
    missing = families.omissions(args.package)
    for omission in missing:
        print(f"FAIL {omission}")
    scope = "cases" if args.all else "kernels" if args.kernels else "rows"
    jobs = families.jobs(args.package, args.capability or families.CAPABILITIES, scope)
    jobs = [job for job in jobs if args.only in _label(job)]
    processes = multiprocessing.get_context("spawn")  # a fork after torch has threads may hang
    records = []
    workers = max(1, min(args.processes, len(jobs)))
    with ProcessPoolExecutor(workers, mp_context=processes) as pool:
        for record in pool.map(gate.run, jobs):
            records.append(record)
            print(line(record), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {"triton": triton.__version__, "kernels": sources.kernel_hashes()}
        args.json.write_text(json.dumps(stored | {"all": args.all, "records": records}, indent=1))
    bad = sum(bool(record["faults"]) for record in records)
    seconds = time.monotonic() - start
    print(f"Triton {triton.__version__}: {len(records) - bad} launches fit, {bad} do not; "
          f"{len(missing)} missing; {seconds:.0f} s")  # fmt: skip
    shown = table.PAGE.read_text(encoding="utf-8") if table.PAGE.exists() else ""
    if changed := table.stale(shown, sources.kernel_hashes()):
        print(f"docs/cubins.md shows no or another source of {', '.join(changed)}: make cubins-all")
    return 1 if bad or missing else 0


def _label(job: families.Job) -> str:
    case = families.cases(job)[job.index]
    return f"{case.kernel} {case.inputs}"


if __name__ == "__main__":
    sys.exit(main())
