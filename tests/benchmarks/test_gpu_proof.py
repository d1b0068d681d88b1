"""The GPU proof, rehearsed: through Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("proof_cases")
SCRIPT = ROOT / "benchmarks" / "gpu_proof.py"
OPS = sorted(path.stem for path in (SCRIPT.parent / "proof" / "cases").glob("[a-z]*.py"))

SANITIZER = """#!/bin/sh
while [ "$1" != "--log-file" ]; do shift; done
echo "========= ERROR SUMMARY: 0 errors" > "$2"
while [ "$1" != "application-only" ]; do shift; done
shift
exec "$@"
"""
RUNNER = "import sys\nopen(sys.argv[sys.argv.index('--json') + 1], 'w').write('{}')\n"


class Proof:
    """What a call of the script came to."""

    def __init__(self, out: Path, *arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
        command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        self.code, self.said = done.returncode, done.stdout + done.stderr
        file = out / "cpu-interpreter" / "proof.json"
        self.found = json.loads(file.read_text()) if file.is_file() else {"records": []}

    def statuses(self, op: str) -> dict[tuple[str, str], str]:
        own = [record for record in self.found["records"] if record["op"] == op]
        return {(r["case"], r["check"]): r["status"] for r in own if r["dtype"] == "float32"}


@pytest.fixture
def tools(tmp_path):
    sanitizer, runner = tmp_path / "compute-sanitizer", tmp_path / "run.py"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    runner.write_text(RUNNER)
    return ["--sanitizer", str(sanitizer), "--runner", str(runner)]


def only(name: str, folder: Path) -> list[str]:
    """Arguments for the case file of this name alone."""
    return ["--only-cases", "--cases", str(folder), "--ops", name]


def test_cases_are_of_ops():
    ops = {path.stem for path in (ROOT / "sparseattn" / "reference").glob("[a-z]*.py")}
    assert OPS and ops >= set(OPS)


@pytest.mark.slow
def test_every_op_passes_its_rehearsal(tmp_path):
    checks = ("numbers", "repeat", "mates", "sync", "graph", "compile", "huge")
    proof = Proof(tmp_path, "--brief", "--checks", *checks)
    assert proof.code == 0, proof.said
    for op in OPS:
        passed = {check for (_, check), s in proof.statuses(op).items() if s == "passed"}
        assert {"numbers", "repeat", "sync", "huge"} <= passed <= set(checks)
    records = [record for record in proof.found["records"] if record["check"] == "numbers"]
    assert all(record["kernels"] for record in records)


@pytest.mark.slow
def test_every_fault_is_caught_and_named(tmp_path):
    proof = Proof(tmp_path, "--only-cases", "--cases", str(CASES), "--job-seconds", "15")
    assert proof.code == 1
    bad = {key: s for key, s in proof.statuses("faulty").items() if s in ("wrong", "failed")}
    died = {"ends_its_process-repeat", "never_answers-mates", "raises-sync"}
    died.add("breaks_the_graph-compile")
    assert len({case for case, _ in bad}) == 11, proof.said
    for (case, check), status in bad.items():
        assert case.endswith(check)
        assert status == ("failed" if case in died else "wrong")
        assert f"WRONG  {check} of faulty, case {case}" in proof.said
    assert "WRONG  broken: broken.py cannot be loaded: ModuleNotFoundError" in proof.said
    sound = proof.statuses("sound")
    tools = {"memcheck", "racecheck", "bench"}
    assert {check for (_, check), s in sound.items() if s == "passed"} >= {"mates", "huge"}
    assert all(s == "passed" for (_, check), s in sound.items() if check not in tools)


@pytest.mark.slow
def test_resuming_skips_what_is_proven_of_this_source(tmp_path, tools):
    folder = tmp_path / "cases"
    folder.mkdir()
    source = (CASES / "sound.py").read_text()
    (folder / "sound.py").write_text(source)
    call = [*only("sound", folder), *tools, "--checks", "numbers", "memcheck", "bench"]
    first = Proof(tmp_path, *call)
    assert first.code == 0, first.said
    assert "4 of 4 checks to do" in first.said and "4 passed" in first.said
    second = Proof(tmp_path, *call)
    assert second.code == 0
    assert "0 of 4 checks to do" in second.said and "4 passed" in second.said
    (folder / "sound.py").write_text(source + "\n# changed\n")
    third = Proof(tmp_path, *call, "--minutes", "0.00001")
    assert third.code == 3
    assert "4 of 4 checks to do" in third.said
    assert "NOT PROVEN  numbers of sound" in third.said


@pytest.fixture
def sanitizer(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from proof import sanitizer

    return sanitizer


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at block_attention_fwd_kernel+0x9d0
========= ERROR SUMMARY: 12 errors
"""


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (86, MEMCHECK, "wrong"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "wrong"),
        (1, "", "failed"),
        (0, "", "failed"),
    ],
)
def test_verdict_of_compute_sanitizer(sanitizer, code, log, status):
    assert sanitizer.verdict(code, log)[0] == status


def test_verdict_names_the_fault(sanitizer):
    assert "Invalid __global__ read of size 4 bytes" in sanitizer.verdict(86, MEMCHECK)[1]
