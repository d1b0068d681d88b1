"""Timing: calls take turns, and medians are taken after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU


@dataclass(frozen=True)
class Job:
    """What is timed: `run` of what `prepare` returns; the preparation is not timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Span:
    """Milliseconds over some runs."""

    p20: float
    p50: float
    p80: float
    runs: int

    @classmethod
    def of(cls, times: list[float]) -> Span:
        """Take the percentiles; of a single run all three are the same."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(times), cuts[7], len(times))


class CpuTimer:
    """Wall clock."""

    def start(self, job: Job) -> Callable[[], float]:
        """Run the job; return what gives its milliseconds."""
        ready = job.prepare()
        started = time.perf_counter()
        job.run(ready)
        taken = 1e3 * (time.perf_counter() - started)
        return lambda: taken


class CudaTimer:
    """CUDA events around one call. The L2 cache is overwritten before each, so data comes from
    memory, and the GPU is busy with that while the call is launched. Nothing waits for the device
    until the times of a turn are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def start(self, job: Job) -> Callable[[], float]:
        """Launch the job; return what waits for it and gives its milliseconds."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = job.prepare()
        self.flush.zero_()
        first.record()
        job.run(ready)
        last.record()

        def read() -> float:
            last.synchronize()
            return float(first.elapsed_time(last))

        return read


Timer = CpuTimer | CudaTimer


def make_timer(device: torch.device) -> Timer:
    """Return the timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    jobs: Mapping[str, Job], timer: Timer, warmup: int, rounds: int, seconds: float
) -> dict[str, Span]:
    """Time the jobs in turn, a round of all of them after the other.

    seconds: how long one job may run in all. A job that needs more for its rounds gets fewer, and
    one whose first run takes longer is not run again: that run is its time.
    """
    first = {name: timer.start(job)() for name, job in jobs.items()}
    allowed = {name: int(1e3 * seconds / max(taken, 1e-6)) for name, taken in first.items()}
    for _ in range(warmup - 1):
        for name, job in jobs.items():
            if allowed[name] > rounds:
                timer.start(job)()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        running = {name: timer.start(job) for name, job in jobs.items() if turn < allowed[name]}
        for name, read in running.items():
            times[name].append(read())
    return {name: Span.of(taken or [first[name]]) for name, taken in times.items()}
