"""One call of the proof: what is left to do, who does it, and what is said at the end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from proof import discover, jobs, sanitizer
from proof.case import Case
from proof.jobs import Job
from proof.processes import Lost, Surroundings, Worker
from proof.results import BAD, FILE, Results, about, slug
from sparseattn.testing import sources

PROVEN, WRONG, UNPROVEN = 0, 1, 3
GRACE = 60.0  # a check that has begun in time may end so many seconds later


def prove(args: argparse.Namespace) -> int:
    """Do what is left, say what was found, return the exit status."""
    files = discover.case_files(args.cases)
    if unknown := set(args.ops or ()) - set(files):
        raise SystemExit(f"no cases for {', '.join(sorted(unknown))}; there are {sorted(files)}")
    if unknown := set(args.checks or ()) - set(jobs.CHECK_NAMES):
        raise SystemExit(f"no check {sorted(unknown)}; there are {jobs.CHECK_NAMES}")
    files = {op: path for op, path in files.items() if not args.ops or op in args.ops}
    cases, broken = _loaded(files)
    results = _results(args, {op: files[op] for op in cases})
    todo = [j for j in jobs.plan(cases, args.device == "cpu", args.brief) if _asked(j, args)]
    if args.list:
        for job in todo:
            print(f"{results.status(job):8} {job}")
        return PROVEN
    session = Session(args, cases, results)
    session.do(todo)
    return report(args, results, todo, files, broken)


def _asked(job: Job, args: argparse.Namespace) -> bool:
    return not args.checks or job.check in args.checks


def _loaded(files: dict[str, Path]) -> tuple[dict[str, tuple[Case, ...]], dict[str, str]]:
    """Return the cases of every op, and why some could not be loaded."""
    cases, broken = {}, {}
    for op, path in files.items():
        try:
            cases[op] = discover.load(path)
        except Exception as error:
            broken[op] = f"{path.name} cannot be loaded: {type(error).__name__}: {error}"
    return cases, broken


def _results(args: argparse.Namespace, files: dict[str, Path]) -> Results:
    run = about(args.device, args.commit)
    committed = discover.BENCHMARKS / "results"
    rehearsed = discover.ROOT / "build" / "proof"
    place = args.out or (rehearsed if args.device == "cpu" else committed)
    hashes = {op: sources.source_hash(path) for op, path in files.items()}
    path = place / slug(run["gpu"]) / FILE
    results = Results(path, run, hashes, sources.kernel_hashes())
    if not args.fresh:
        for earlier in dict.fromkeys((committed / slug(run["gpu"]) / FILE, path)):
            results.read(earlier)
    print(f"{run['gpu']}, torch {run['torch']}, Triton {run['triton']}; results in {path}")
    return results


class Session:
    """Hands jobs to worker processes until all are done or the time is over."""

    def __init__(
        self, args: argparse.Namespace, cases: dict[str, tuple[Case, ...]], results: Results
    ) -> None:
        self.args = args
        self.cases = cases
        self.results = results
        self.surroundings = Surroundings(args.device, args.launches, args.cases)
        self.sanitizer = args.sanitizer or sanitizer.find()
        self.runner = [str(args.runner)] if args.runner else ["-m", "sparseattn"]
        self.until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self._lock = threading.Lock()

    def do(self, todo: list[Job]) -> None:
        """Do what has no result yet; what failed before comes last. Some need the GPU alone."""
        left = [job for job in todo if self.results.status(job) != "passed"]
        left.sort(key=lambda job: self.results.status(job) in BAD)
        print(f"{len(left)} of {len(todo)} checks to do", flush=True)
        together = deque(job for job in left if job.check not in jobs.ALONE)
        alone = deque(job for job in left if job.check in jobs.ALONE)
        workers = self.args.workers or (4 if self.args.device == "cuda" else 1)
        threads = [
            threading.Thread(target=self._drain, args=(together, alone)) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._drain(alone, None)

    def _drain(self, waiting: deque[Job], spare: deque[Job] | None) -> None:
        """Do jobs until none waits. One that runs out of memory goes to `spare` if there is one."""
        worker = Worker(self.surroundings)
        try:
            while time.monotonic() < self.until:
                with self._lock:
                    if not waiting:
                        return
                    job = waiting.popleft()
                reply = self._answer(worker, job)
                with self._lock:
                    if reply["status"] == "memory" and spare is not None:
                        spare.append(job)
                    else:
                        self._keep(job, reply)
        finally:
            worker.close()

    def _keep(self, job: Job, reply: dict[str, Any]) -> None:
        self.results.add(job, reply)
        head = f"{reply['status']:7} {reply['seconds']:6.1f} s  {job}"
        print(f"{head}: {_short(reply['detail'])}", flush=True)

    def _answer(self, worker: Worker, job: Job) -> dict[str, Any]:
        seconds = min(self.args.job_seconds, self.until - time.monotonic() + GRACE)
        if job.check in sanitizer.TOOLS:
            return self._sanitize(job, seconds)
        if job.check == "bench":
            return self._bench(job, seconds)
        try:
            return worker.ask(job, seconds)
        except Lost as lost:
            return {"status": "failed", "detail": str(lost), "seconds": 0.0, "kernels": []}

    def _sanitize(self, job: Job, seconds: float) -> dict[str, Any]:
        small = [case.name for case in self.cases[job.op] if case.size == "small"]
        if self.sanitizer is None:
            return _skipped("compute-sanitizer is not installed")
        return sanitizer.sanitize(
            job.check, self.sanitizer, job.op, small, job.dtype, self.surroundings, seconds
        )

    def _bench(self, job: Job, seconds: float) -> dict[str, Any]:
        if not self.args.runner and not (discover.BENCHMARKS / f"bench_{job.op}.py").is_file():
            return _skipped(f"there is no bench_{job.op}.py")
        result = self.results.path.with_name(f"{job.op}.json")
        command = jobs.bench_command(job.op, self.args.device, result, seconds / 120)
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *self.runner, *command],
                capture_output=True,
                text=True,
                timeout=seconds,
                env={**os.environ, "PYTHONPATH": str(discover.ROOT), "PYTHONSAFEPATH": "1"},
            )
        except subprocess.TimeoutExpired:
            status, detail = "failed", f"the benchmark took more than {seconds:.0f} s"
        else:
            status = "failed" if done.returncode else "passed"
            detail = f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
            detail = detail if done.returncode else f"written to {result.name}"
        taken = round(time.monotonic() - started, 2)
        return {"status": status, "detail": detail, "seconds": taken, "kernels": []}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]}..."


def _skipped(reason: str) -> dict[str, Any]:
    return {"status": "skipped", "detail": reason, "seconds": 0.0, "kernels": []}


def report(
    args: argparse.Namespace,
    results: Results,
    todo: list[Job],
    files: dict[str, Path],
    broken: dict[str, str],
) -> int:
    """Print what is wrong and what is not proven; return the exit status."""
    statuses = {job: results.status(job) for job in todo}
    wrong = [f"{op}: {reason}" for op, reason in broken.items()]
    open_ = []
    for job, status in statuses.items():
        detail = _short((results.present(job) or {}).get("detail", "not done yet"))
        if status in BAD:
            wrong.append(f"{job}: {detail}")
        elif status == "skipped":
            print(f"SKIPPED  {job}: {detail}")
        elif status != "passed":
            open_.append(f"{job}: {detail}")
    if not (args.ops or args.checks or args.brief or args.only_cases):
        open_ += [f"{op}: it has no cases" for op in discover.ops() if op not in files]
        unlaunched = sorted(set(results.kernels) - results.launched(todo))
        if args.device == "cuda":
            open_ += [f"{name}: no case that passes launches it" for name in unlaunched]
        elif unlaunched:
            print(f"NOT REHEARSED  {', '.join(unlaunched)}")
    for line in open_:
        print(f"NOT PROVEN  {line}")
    for line in wrong:
        print(f"WRONG  {line}")
    counts = Counter(statuses.values())
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if wrong:
        return WRONG
    return UNPROVEN if open_ else PROVEN
