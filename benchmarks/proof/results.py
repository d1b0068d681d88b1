"""The results file: what was proven, of which source, where, and what is left."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from proof.discover import ROOT
from proof.jobs import Job

FILE = "proof.json"
BAD = ("wrong", "failed")


def about(device: str, commit: str | None) -> dict[str, Any]:
    """Return what a result depends on besides the source."""
    gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "cpu-interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit or _said("git", "rev-parse", "HEAD"),
        "dirty": None if commit else bool(_said("git", "status", "--porcelain", "-uno")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": sys.argv[1:],
    }


def slug(name: str) -> str:
    """Return a device's name as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


@dataclass
class Results:
    """Records by job; each holds the run that it comes from."""

    path: Path
    run: dict[str, Any]
    hashes: dict[str, str]
    kernels: dict[str, str]
    records: dict[Job, dict[str, Any]] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        """Take the records of a file; a later file wins."""
        if not path.is_file():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for record in found["records"]:
            job = Job(*(record[name] for name in Job._fields))
            self.records[job] = {**record, "run": found["runs"][record["run"]]}

    def add(self, job: Job, reply: dict[str, Any]) -> dict[str, Any]:
        """Keep the answer to a job, and write the file."""
        record = {
            **job._asdict(),
            **reply,
            "kernels": {name: self.kernels[name] for name in reply["kernels"]},
            "source": self.hashes[job.op],
            "run": self.run,
        }
        self.records[job] = record
        self.write()
        return record

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ordered = [self.records[job] for job in sorted(self.records)]
        runs: list[dict[str, Any]] = []
        for record in ordered:
            if record["run"] not in runs:
                runs.append(record["run"])
        records = [{**record, "run": runs.index(record["run"])} for record in ordered]
        text = json.dumps({"runs": runs, "records": records}, indent=1) + "\n"
        draft = self.path.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path)

    def present(self, job: Job) -> dict[str, Any] | None:
        """Return the record of a job if it is of this source and these versions."""
        record = self.records.get(job)
        if record is None or record["source"] != self.hashes[job.op]:
            return None
        run = record["run"]
        same = all(run[name] == self.run[name] for name in ("gpu", "torch", "triton"))
        return record if same else None

    def status(self, job: Job) -> str:
        """Return what is known of a job: its status, or "open"."""
        record = self.present(job)
        return "open" if record is None else str(record["status"])

    def launched(self, jobs: list[Job]) -> set[str]:
        """Return the kernels, as they are now, that passed in numbers in one of these jobs."""
        found: set[str] = set()
        for job in jobs:
            record = self.present(job)
            if record and job.check == "numbers" and record["status"] == "passed":
                found |= {n for n, h in record["kernels"].items() if self.kernels.get(n) == h}
        return found
