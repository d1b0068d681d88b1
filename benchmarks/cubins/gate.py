"""Compiles one case and judges it: what its machine code needs, and whether a chip can run it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from cubins import capture, families, sass, spills
from cubins.account import CHIPS, Tile, account, blocks_per_sm
from cubins.families import Job
from sparseattn.kernels.cases import Case

COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "MUFU", "STL")
DOT = re.compile(r"\btt\.dot\b.*: tensor<(?:\d+x)*?(\d+)x\d+x(bf16|f16)\b")
MMA = re.compile(r"ttng\.tc_gen5_mma\b.*?: (.*)")
COPY = re.compile(r"ttng\.async_tma_copy_global_to_local\b.*: .*!ttg\.memdesc<([\dx]+)x(\w+),")
MEMORY = re.compile(r"!ttg\.memdesc<(\d+)x(\d+)x(\w+), #(\w+)")
ITEMSIZE = {"f32": 4, "bf16": 2, "f16": 2}


def run(job: Job) -> dict[str, Any]:
    """Compile the job's case; return what it needs and `faults`, empty if it is fit to ship."""
    case = families.cases(job)[job.index]
    record: dict[str, Any] = {
        "family": job.family,
        "kernel": case.kernel,
        "capability": job.capability,
        "row": _row_text(case.row),
        "row_id": repr(case.row),
        "inputs": case.inputs,
    }
    try:
        launches = _launches(case, job.capability)
        allowed = spills.ALLOWED.get((case.kernel, job.capability, case.inputs), 0)
        made = [
            measure(capture.compiled(x, job.capability), job.capability, allowed) for x in launches
        ]
        record |= max(made, key=lambda one: one["spills"])
        faults = [fault for one in made for fault in one["faults"]]
        record["faults"] = [*dict.fromkeys(faults), *_row_faults(case, launches[0])]
    except Exception as error:  # a compiler's error, of whatever type, is the answer
        text = " ".join(str(error).split())[:300]
        record["faults"] = [f"{type(error).__name__}: {text}"]
    return record


def measure(compiled: Any, capability: int, allowed: int = 0) -> dict[str, Any]:
    """Return the resources of a compiled kernel, its account, and the faults of its own.

    allowed: how many registers may be spilled outside inner loops.
    """
    text = dump(compiled.asm["cubin"])
    program = sass.parse(text)
    counts = Counter(instruction.kind for instruction in program)
    middle = compiled.asm["ttgir"]
    found = re.search(r'"ttg.total-num-warps" = (\d+)', middle)
    warps = int(found[1]) if found else compiled.metadata.num_warps
    registers, shared = int(re.search(r"REG:(\d+)", text)[1]), compiled.metadata.shared
    made = account(program, capability, compiled.metadata.num_warps, tile(middle, counts))
    faults = []
    limit = CHIPS[capability].shared_block
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, {limit} at most")
    blocks = blocks_per_sm(CHIPS[capability], registers, shared, warps)
    if blocks < 1:
        faults.append(f"{registers} registers x {warps} warps do not fit a multiprocessor")
    looped = sass.spills_in_loops(program)
    if looped:
        faults.append(f"{looped} spills and reloads in inner loops")
    if counts["STL"] > allowed:
        faults.append(f"{counts['STL']} spills, {allowed} at most")
    if capability == 90:
        faults += missing_hgmma(compiled.asm["ttir"], middle, counts["HGMMA"])
    return {
        "registers": registers,
        "shared": shared,
        "warps": warps,
        "blocks": blocks,
        "spills": counts["STL"],
        "counts": {kind: counts[kind] for kind in COUNTED},
        "cycles": {unit: round(cycles, 1) for unit, cycles in made.cycles.items()},
        "limit": made.limit,
        "share": round(made.share, 3),
        "alone": round(made.alone, 3),
        "faults": faults,
    }


def missing_hgmma(source: str, middle: str, hgmma: int) -> list[str]:
    """Say which 16-bit products of 64 rows or more are not made by Hopper's own instruction.

    A product that Triton's source form has as tt.dot, its GPU form should have as warp_group_dot.
    """
    wanted = [m for m in DOT.findall(source) if int(m[0]) >= 64]
    left = [m for m in DOT.findall(middle) if int(m[0]) >= 64]
    if wanted and not hgmma:
        return [f"no HGMMA for {len(wanted)} products of {wanted[0][0]} rows in {wanted[0][1]}"]
    return [f"no HGMMA for a product of {left[0][0]} rows in {left[0][1]}"] if left else []


def tile(middle: str, counts: Counter) -> Tile:
    """Return the mean work of instructions whose names do not tell it, from Triton's GPU form."""
    flops = operands = instructions = 0.0
    for types in MMA.findall(middle):
        (m, k, dtype, space), (_, n, _, _) = MEMORY.findall(types)[:2]
        size = ITEMSIZE[dtype]
        products = int(m) * int(n) * int(k)
        flops += 2 * products * (2 if size == 4 else 1)
        in_shared = int(n) + int(m) * (space != "tmem")
        operands += in_shared * int(k) * size
        instructions += int(k) * size / 32  # one takes 32 bytes of each row
    copied = 0.0
    for shape, dtype in COPY.findall(middle):
        elements = 1
        for size in shape.split("x"):
            elements *= int(size)
        copied += elements * ITEMSIZE.get(dtype, 4)
    each = instructions or 1.0
    return Tile(flops / each, operands / each, copied / (counts["UTMALDG"] or 1))


def dump(cubin: bytes) -> str:
    """Return the machine code and the resources of a cubin as text."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _launches(case: Case, capability: int) -> list[capture.Launch]:
    """Return the case's launches of its kernel that differ; with the case's row, if any are."""
    kept = capture.launches(case.launch, capability)
    found = [launch for launch in kept if launch.kernel.__name__ == case.kernel]
    if not found:
        names = [launch.kernel.__name__ for launch in kept]
        raise LookupError(f"{case.inputs} does not launch {case.kernel}, but {names}")
    with_row = [launch for launch in found if not _row_faults(case, launch)]
    return list({repr(launch.choices()): launch for launch in with_row or found}.values())


def _row_faults(case: Case, launch: capture.Launch) -> list[str]:
    """Say in what the launch is not that of its row: then another row was compiled."""
    row = getattr(case.row, "launch", case.row)
    faults = []
    for name in ("num_warps", "num_stages"):
        wanted = getattr(row, name, None)
        if wanted is not None and launch.keywords.get(name) != wanted:
            faults.append(f"launched with {name}={launch.keywords.get(name)}, row has {wanted}")
    constants = launch.constants().values()
    for name in (name for name in getattr(row, "_fields", ()) if name.startswith("tile")):
        if getattr(row, name) not in constants:
            faults.append(f"no compile-time value is the row's {name}={getattr(row, name)}")
    return faults


def _row_text(row: Any) -> str:
    """Return `128 x 64, 8 warps, 3 stages`, and the names of what is True in the row."""
    launch = getattr(row, "launch", row)
    sizes = [f for f in getattr(launch, "_fields", ()) if f.startswith("tile")]
    parts = [" x ".join(str(getattr(launch, size)) for size in sizes)] if sizes else []
    for name, word in (("num_warps", "warps"), ("num_stages", "stages")):
        if hasattr(launch, name):
            parts.append(f"{getattr(launch, name)} {word}")
    fields = getattr(row, "_fields", ())
    return ", ".join([*parts, *(name for name in fields if getattr(row, name) is True)])
