"""Timing: turns, warm-up, percentiles, and an end for what is too slow."""

from __future__ import annotations

import time

import pytest
import torch

from sparseattn.benchmarks.timing import CpuTimer, CudaTimer, Job, Span, interleave


def test_calls_take_turns_after_the_warm_up() -> None:
    seen: list[str] = []
    jobs = {name: Job(lambda _, name=name: seen.append(name)) for name in "ab"}
    spans = interleave(jobs, CpuTimer(), warmup=2, rounds=3, seconds=1.0)
    assert seen == list("ab" * 5)
    assert [spans[name].runs for name in "ab"] == [3, 3]


def test_a_slow_call_gets_fewer_rounds_and_a_very_slow_one_none() -> None:
    runs = {"slow": 0, "very slow": 0, "fast": 0}

    def job(name: str, seconds: float) -> Job:
        def call(_: object) -> None:
            runs[name] += 1
            time.sleep(seconds)

        return Job(call)

    jobs = {"slow": job("slow", 0.03), "very slow": job("very slow", 0.15), "fast": job("fast", 0)}
    spans = interleave(jobs, CpuTimer(), warmup=2, rounds=5, seconds=0.1)
    assert runs["very slow"] == 1 and spans["very slow"].runs == 1
    assert 2 <= runs["slow"] < 7 and spans["slow"].runs == runs["slow"] - 1
    assert runs["fast"] == 7
    assert spans["very slow"].p50 >= 150


def test_preparation_is_not_timed() -> None:
    job = Job(lambda ready: ready, lambda: time.sleep(0.05))
    assert CpuTimer().start(job)() < 40


def test_percentiles() -> None:
    span = Span.of([float(i) for i in range(11)])
    assert (span.p20, span.p50, span.p80, span.runs) == (2, 5, 8, 11)
    assert Span.of([3.0]) == Span(3.0, 3.0, 3.0, 1)


@pytest.mark.gpu
def test_gpu_times_cover_the_work() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    jobs = {"one": Job(lambda _: x @ x), "ten": Job(lambda _: [x @ x for _ in range(10)])}
    spans = interleave(jobs, CudaTimer(device), warmup=3, rounds=5, seconds=5.0)
    assert 5 < spans["ten"].p50 / spans["one"].p50 < 20
