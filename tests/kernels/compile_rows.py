"""Compiles every launch row of one GPU generation and prints a line for each; 1 if one fails.

A process of its own, without Triton's interpreter:  python compile_rows.py CAPABILITY [FILTER]
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor

from cubins import KERNELS, LOADED, PLAIN, SHARED, build, rows

# beside the power of two of each row, a head dim that is held in two chunks
SPLIT_DIMS = {64: 40, 128: 72, 256: 160}


def check(job: tuple) -> tuple[str, bool]:
    """Compile one row in one form; return its line and whether it is fit to ship."""
    kernel, row, capability, head_dim, form = job
    name = f"{kernel} sm_{capability} {row.itemsize} bytes D {head_dim} {form} {tuple(row.launch)}"
    try:
        made = build(kernel, row, capability, head_dim, LOADED if form == "loaded" else PLAIN)
    except Exception as error:
        return f"FAIL {name}: {type(error).__name__}: {str(error)[:200]}", False
    rows_in_a = row.launch.tile_k if kernel == "dkv" else row.launch.tile_q
    wants_hgmma = capability == 90 and row.itemsize == 2 and rows_in_a >= 64
    fits = made.shared <= SHARED[capability] and made.spills <= row.spills
    fit = fits and (made.hgmma > 0 or not wants_hgmma)
    return f"{'ok  ' if fit else 'FAIL'} {name}: {made}", fit


def main(capability: int, wanted: str) -> int:
    """Compile all rows in two processes."""
    jobs = []
    for kernel in KERNELS:
        for row in rows(kernel, capability):
            jobs.append((kernel, row, capability, row.head_dim, "plain"))
            jobs.append((kernel, row, capability, row.head_dim, "loaded"))
            jobs.append((kernel, row, capability, SPLIT_DIMS[row.head_dim], "plain"))
    jobs = [job for job in jobs if wanted in f"{job[0]}-{job[1].itemsize}-{job[1].head_dim}"]
    failed = 0
    with ProcessPoolExecutor(2) as pool:
        for line, fit in pool.map(check, jobs):
            print(line, flush=True)
            failed += not fit
    print(f"{len(jobs) - failed} rows fit, {failed} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
