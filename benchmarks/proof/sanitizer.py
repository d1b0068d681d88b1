"""An op's small cases under compute-sanitizer: memcheck, and racecheck of shared memory."""

from __future__ import annotations

import re
import shutil
import site
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from proof.jobs import Job
from proof.processes import Lost, Surroundings, Worker

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
FAULT = re.compile(r"^=+ ((?:Invalid|Error|Warning|Race|Potential|Program hit).*)", re.M)


def find() -> str | None:
    """Return the path of compute-sanitizer: on PATH, of a CUDA toolkit, or of a pip package."""
    packages = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    wheels = [str(p) for root in packages for p in Path(root, "nvidia").glob("**/bin")]
    folders = [None, *PLACES, *wheels]
    found = (shutil.which("compute-sanitizer", path=folder) for folder in folders)
    return next((path for path in found if path), None)


def sanitize(
    tool: str, program: str, op: str, names: Iterable[str], dtype: str,
    surroundings: Surroundings, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Launch the cases once each under a tool, in one process; return the answer to the job."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        prefix = [program, "--tool", tool, "--log-file", str(log), "--error-exitcode", "86"]
        prefix += ["--target-processes", "application-only"]
        # memory out of torch's cache would hide a step past the end of a tensor
        worker = Worker(surroundings, prefix, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        kernels: set[str] = set()
        troubles = []
        started = time.monotonic()
        try:
            for name in names:
                left = seconds + started - time.monotonic()
                reply = worker.ask(Job(op, name, "launch", dtype), left)
                kernels |= set(reply["kernels"])
                if reply["status"] != "passed":
                    troubles.append(f"{name}: {reply['detail']}")
            code = worker.close(seconds)
        except Lost as lost:
            troubles.append(str(lost))
            code = -1
        finally:
            worker.end()
        text = log.read_text(errors="replace") if log.is_file() else ""
    status, detail = verdict(code, text)
    if troubles:
        status = "wrong" if status == "wrong" else "failed"
        detail = "; ".join([detail, *troubles])
    taken = round(time.monotonic() - started, 2)
    return {"status": status, "detail": detail, "seconds": taken, "kernels": sorted(kernels)}


def verdict(code: int, log: str) -> tuple[str, str]:
    """Read the exit status and the report of compute-sanitizer."""
    counts = [int(count) for count in SUMMARY.findall(log)]
    if not counts:
        return "failed", f"compute-sanitizer gave no summary (exit status {code}): {log[-500:]}"
    if code == 0 and not any(counts):
        return "passed", "no fault"
    faults = list(dict.fromkeys(FAULT.findall(log)))[:5]
    return "wrong", f"{sum(counts)} faults (exit status {code}): {'; '.join(faults)}"
