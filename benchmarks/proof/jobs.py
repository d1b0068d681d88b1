"""What is to be done, the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from proof.case import FLOAT16, FLOAT32, Case


class Job(NamedTuple):
    """One check of one case in one dtype; case "*" is the op as a whole."""

    op: str
    case: str
    check: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.check} of {self.op}, case {self.case}, {self.dtype}"


class Step(NamedTuple):
    """A check, and the cases it is done with.

    whole: once for an op, not for each case.   alone: with the GPU to itself.
    every_dtype: in all dtypes of a case, else in the first.
    """

    check: str
    sizes: tuple[str, ...] = ()
    every_dtype: bool = False
    whole: bool = False
    alone: bool = False


# Wrong numbers first, then numbers that change, then faults in memory; speed comes last.
STEPS = (
    Step("numbers", ("small",), every_dtype=True),
    Step("numbers", ("full",), every_dtype=True),
    Step("repeat", ("small", "full")),
    Step("mates", ("small", "full")),
    Step("memcheck", whole=True),
    Step("racecheck", whole=True),
    Step("sync", ("small", "full")),
    Step("graph", ("small", "full")),
    Step("compile", ("small",)),
    Step("numbers", ("edge",), every_dtype=True),
    Step("huge", ("huge",), alone=True),
    Step("bench", whole=True, alone=True),
)
CHECK_NAMES = tuple(dict.fromkeys(step.check for step in STEPS))
ALONE = {step.check for step in STEPS if step.alone}
# The interpreter does no bfloat16 arithmetic; float16 comes second, as on a GPU.
REHEARSED_DTYPES = (FLOAT32, FLOAT16)


def plan(cases: dict[str, tuple[Case, ...]], rehearsal: bool, brief: bool = False) -> list[Job]:
    """Return all jobs in order. A rehearsal does every check, with the small cases.

    brief: one case of each size, in its first dtype.
    """
    jobs: list[Job] = []
    if brief:
        cases = {op: _first_of_each_size(own) for op, own in cases.items()}
    for step in STEPS:
        if rehearsal and step.sizes == ("huge",):
            step = step._replace(sizes=("small",))
        elif rehearsal and step.sizes and "small" not in step.sizes:
            continue
        elif rehearsal:
            step = step._replace(sizes=("small",))
        if brief:
            step = step._replace(every_dtype=False)
        found = [job for op, own in cases.items() for job in _jobs(step, op, own, rehearsal)]
        first = {job: position for position, job in enumerate(dict.fromkeys(found))}
        jobs += sorted(first, key=lambda job: (_turn(job, cases, rehearsal), first[job]))
    return list(dict.fromkeys(jobs))


def _first_of_each_size(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    return tuple({case.size: case for case in reversed(cases)}.values())


def _jobs(step: Step, op: str, cases: tuple[Case, ...], rehearsal: bool) -> Iterator[Job]:
    if step.whole:
        yield Job(op, "*", step.check, dtypes(cases[0], rehearsal)[0])
        return
    for case in cases:
        if case.size in step.sizes and not left_out(case, step.check):
            own = dtypes(case, rehearsal)
            for dtype in own if step.every_dtype else own[:1]:
                yield Job(op, case.name, step.check, dtype)


def left_out(case: Case, check: str) -> str | None:
    """Return why a check is not done with a case, or None."""
    if check == "mates" and not case.batched:
        return "it has no samples"
    return case.skip.get(check)


def dtypes(case: Case, rehearsal: bool) -> tuple[str, ...]:
    """Return the dtypes a case is checked in, the first for most checks."""
    return REHEARSED_DTYPES if rehearsal else case.dtypes


def _turn(job: Job, cases: dict[str, tuple[Case, ...]], rehearsal: bool) -> int:
    """Every op in its first dtype, then every op in its second."""
    for case in cases[job.op]:
        if case.name == job.case:
            return dtypes(case, rehearsal).index(job.dtype)
    return 0


def bench_command(op: str, device: str, result: Path, minutes: float) -> list[str]:
    """Return the arguments of the benchmark runner for one op."""
    command = ["bench", op, "--device", device, "--json", str(result)]
    if device == "cpu":
        shortest = ["--small", "--modes", "forward", "--rounds", "1"]
        return [*command, *shortest, "--providers", "sparseattn", "sdpa-flash"]
    return [*command, "--minutes", f"{minutes:.1f}"]
