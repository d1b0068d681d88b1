"""Runs benchmarks: one case after the other, gate first, and gives records.

A record is one provider in one mode of one case, a flat dictionary as it goes to JSON. A provider
that did not run, or computed something wrong, gives one record without times and with a `note`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseattn.benchmarks.gate import Gate
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work, dtype_name
from sparseattn.benchmarks.timing import Job, Span, Timer, interleave
from sparseattn.ops.work import floor_seconds
from sparseattn.testing.memory import peak_extra_bytes

# index: building it alone. full: index, forward and backward.
MODES = ("forward", "backward", "both", "index", "full")
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    providers: only these (empty: all). rounds, warmup: runs of a job. seconds: the most one job
    may take for all of them. memory_bytes: a provider that needs about more is left out.
    """

    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = ()
    rounds: int = 7
    warmup: int = 2
    seconds: float = 2.0
    memory_bytes: float = 1e9


def run_case(
    benchmark: Benchmark, case: Case, rates: Record, timer: Timer, settings: Settings
) -> list[Record]:
    """Check and time every provider of one case."""
    problem = benchmark.build(case)
    gate = Gate(problem, case.seed)
    records: list[Record] = []
    jobs: dict[tuple[str, str], Job] = {}
    facts: dict[str, Record] = {}
    for provider in problem.providers:
        if settings.providers and provider.name not in settings.providers:
            continue
        about = {
            "op": benchmark.op,
            "case": dict(case.axes),
            "dtype": dtype_name(case.dtype),
            "density": problem.density,
            "provider": provider.name,
            "ours": provider.ours,
            "dense": provider.dense,
        }
        fact, own = _admit(provider, problem, gate, settings)
        if not own:
            records.append(about | fact)
        facts[provider.name] = about | fact
        jobs |= {(provider.name, mode): own[mode] for mode in settings.modes if mode in own}
    del gate
    gc.collect()
    named = {f"{name} {mode}": job for (name, mode), job in jobs.items()}
    spans = interleave(named, timer, settings.warmup, settings.rounds, settings.seconds)
    for name, mode in jobs:
        figures = _figures(mode, spans[f"{name} {mode}"], problem.work, case, rates)
        records.append(facts[name] | figures)
    return _with_speedups(records)


def _admit(
    provider: Provider, problem: Problem, gate: Gate, settings: Settings
) -> tuple[Record, dict[str, Job]]:
    """Return error, peak memory and jobs by mode; or a `note` why it is not timed, and no job.

    peak_bytes: held at once beyond the inputs. scratch_bytes: and beyond output and gradients.
    """
    if provider.unavailable:
        return _note(provider.unavailable)
    if provider.scratch_bytes > settings.memory_bytes:
        needs, most = provider.scratch_bytes / 1e9, settings.memory_bytes / 1e9
        return _note(f"needs about {needs:.1f} GB, the bound is {most:.1f}")
    try:
        verdict = gate.judge(provider)
        if verdict.faults:
            return _note(f"wrong result: {verdict.faults}", wrong=True)
        jobs = _jobs(provider, problem)
        job = jobs.get("both", jobs["forward"])
        ready = job.prepare()
        results, peak = peak_extra_bytes(lambda: job.run(ready))
        held = sum(tensor.nbytes for tensor in results)
        return {"error": verdict.error, "peak_bytes": peak, "scratch_bytes": peak - held}, jobs
    except Exception as error:  # whatever a peer raises, the others are measured
        message = str(error).strip().splitlines() or [type(error).__name__]
        return _note(f"fails: {message[0][:200]}", wrong=provider.ours)


def _note(text: str, wrong: bool = False) -> tuple[Record, dict[str, Job]]:
    return {"note": text, "wrong": wrong}, {}


def _jobs(provider: Provider, problem: Problem) -> dict[str, Job]:
    """Return what is timed of one provider, by mode. It holds its index from here on."""
    inputs = problem.inputs
    leaves = [x for x in inputs if x.requires_grad]
    built = () if provider.index is None else (provider.index(),)

    def infer(_: Any) -> tuple[Tensor]:
        with torch.no_grad():
            return (provider.call(*inputs, *built),)

    jobs = {"forward": Job(infer)}
    if provider.index is not None:
        index = provider.index
        jobs["index"] = Job(lambda _: index())
    if not provider.backward or not leaves:
        return jobs
    forward: Callable[..., Tensor] = partial(provider.call, *inputs)
    dout = torch.randn_like(forward(*built))

    def both(*index: Any) -> tuple[Tensor, ...]:
        out = forward(*index)
        return out, *torch.autograd.grad(out, leaves, dout)

    jobs["backward"] = Job(
        lambda out: torch.autograd.grad(out, leaves, dout), partial(forward, *built)
    )
    jobs["both"] = Job(lambda _: both(*built))
    if provider.index is not None:
        jobs["full"] = Job(lambda _: both(index()))
    return jobs


def _figures(mode: str, span: Span, work: Work, case: Case, rates: Record) -> Record:
    """Return times and what follows from them."""
    found: Record = {"mode": mode, "p20": span.p20, "p50": span.p50, "p80": span.p80}
    found["runs"] = span.runs
    if mode == "index":
        return found
    flops, dense_flops, moved = work.of(mode)
    seconds = span.p50 / 1e3
    rate = rates["matmul_tflops"][dtype_name(case.dtype)] * 1e12
    floor = floor_seconds(flops, moved, rate, rates["copy_gbps"] * 1e9)
    return found | {
        "useful_tflops": flops / seconds / 1e12,
        "dense_tflops": dense_flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
        "floor_ms": 1e3 * floor,
        "floor_ratio": seconds / floor,
    }


def _with_speedups(records: list[Record]) -> list[Record]:
    """Add `speedup`: over the fastest dense baseline in the same mode. Its `full` is its `both`."""
    best: dict[str, float] = {}
    for record in records:
        if record["dense"] and record.get("mode"):
            best[record["mode"]] = min(best.get(record["mode"], float("inf")), record["p50"])
    for record in records:
        mode = record.get("mode")
        rival = best.get("both" if mode == "full" else str(mode))
        if rival is not None:
            record["speedup"] = rival / record["p50"]
    return records


def providers_of(benchmark: Benchmark, case: Case) -> Iterator[tuple[str, str]]:
    """Return name and, where it cannot run here, the reason of every provider."""
    for provider in benchmark.build(case).providers:
        yield provider.name, provider.unavailable
