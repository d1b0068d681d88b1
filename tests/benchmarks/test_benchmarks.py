"""Every registered op at its small size: it is found, right, timed, and says what it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import linear_attention
from sparseattn.benchmarks import registry
from sparseattn.benchmarks.bench_linear_attention import causal_rows
from sparseattn.benchmarks.registry import Benchmark, Case
from sparseattn.benchmarks.runner import Record, Settings, run_case
from sparseattn.benchmarks.timing import CpuTimer
from sparseattn.testing.memory import peak_extra_bytes

CPU = torch.device("cpu")
RATES: Record = {"matmul_tflops": {"float32": 0.1, "bfloat16": 0.2}, "copy_gbps": 10.0}
QUICK = Settings(rounds=2, warmup=1, seconds=0.5, memory_bytes=2e8)


def small_case(benchmark: Benchmark, dtype: str = "float32") -> Case:
    """The first case at the small size."""
    axes = {axis: values[:1] for axis, values in {**benchmark.axes, **benchmark.small}.items()}
    return next(benchmark.cases(CPU, (dtype,), axes))


def run_small(op: str, dtype: str, providers: tuple[str, ...]) -> list[Record]:
    benchmark = registry.load(op)
    settings = Settings(**{**QUICK.__dict__, "providers": providers})
    return run_case(benchmark, small_case(benchmark, dtype), RATES, CpuTimer(), settings)


@pytest.mark.parametrize("depthwise", [0, 1])
@pytest.mark.parametrize("size", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_convolution_of_patches_holds_half_of_what_dense_does(size: int, depthwise: int) -> None:
    """Beyond the inputs, at HySparK's smallest levels, where weights outweigh the features."""
    axes = {"batch": 1, "size": size, "depthwise": depthwise, "density": 0.25}
    problem = registry.load("submanifold_conv3d").build(Case(axes, torch.float32, CPU))
    held: dict[bool, list[int]] = {True: [], False: []}
    for provider in problem.providers:
        index = () if provider.index is None else (provider.index(),)

        def both(
            call: Callable[..., Tensor] = provider.call, index: tuple[Any, ...] = index
        ) -> tuple[Tensor, ...]:
            out = call(*problem.inputs, *index)
            return out, *torch.autograd.grad(out, problem.inputs, out.detach())

        held[provider.ours].append(peak_extra_bytes(both)[1])
    assert len(held[False]) == 2 and 0 < held[True][0] <= 0.5 * min(held[False])


def test_ops_are_found_by_the_names_of_their_files() -> None:
    assert "block_sparse_attention" in registry.ops()
    assert all(registry.load(op).op == op for op in registry.ops())


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=[pytest.mark.slow] * (op == "vit_trim_tokens"))
        for op in registry.ops()
    ],
)
def test_every_provider_runs_or_says_why_not(op: str) -> None:
    benchmark = registry.load(op)
    providers = benchmark.build(small_case(benchmark)).providers
    names = tuple(p.name for p in providers if not p.name.endswith("compiled"))  # 10 s each
    records = run_small(op, "float32", names)
    assert {record["provider"] for record in records} == set(names)
    wrong = [record for record in records if record.get("wrong")]  # of a peer: said, not our fault
    assert not [record for record in wrong if record["ours"]], wrong
    ours = {record["mode"]: record for record in records if record["ours"]}
    assert "forward" in ours
    for record in ours.values():
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
        assert record["error"] <= 1 and record["peak_bytes"] > 0
        if record["mode"] != "index":
            assert record["floor_ms"] > 0 and record["useful_tflops"] > 0
    if any(record["dense"] and record.get("mode") for record in records):
        assert ours["forward"]["speedup"] > 0


@pytest.mark.slow
def test_compiled_flex_attention_computes_the_same() -> None:
    (record, *_) = run_small("block_sparse_attention", "float32", ("flex-compiled",))
    assert record.get("note") == "needs a C++ compiler" or record["error"] < 2


def test_bfloat16_keeps_the_rule_too() -> None:
    names = ("sparseattn", "sdpa-flash", "sdpa-math", "flex-eager")
    records = run_small("block_sparse_attention", "bfloat16", names)
    assert not [record for record in records if record.get("wrong")]


def test_a_provider_that_needs_too_much_memory_is_left_out() -> None:
    benchmark = registry.load("block_sparse_attention")
    settings = Settings(providers=("sdpa-math",), memory_bytes=1.0)
    records = run_case(benchmark, small_case(benchmark), RATES, CpuTimer(), settings)
    assert [record.get("mode") for record in records] == [None]
    assert "the bound is" in records[0]["note"] and not records[0]["wrong"]


def test_work_of_block_sparse_attention() -> None:
    benchmark = registry.load("block_sparse_attention")
    problem = benchmark.build(small_case(benchmark))
    q = problem.inputs[0]
    pairs = 0.5 * 2 * 256**2
    assert problem.density == 0.5
    flops, dense, moved = problem.work.of("forward")
    assert (flops, dense) == (4 * 16 * pairs, 2 * 4 * 16 * pairs)
    assert moved == 4 * q.numel() * 4 + 4 * 2 * 256
    assert problem.work.of("backward")[:2] == (2.5 * flops, 2.5 * dense)
    assert problem.work.of("both")[:2] == problem.work.of("full")[:2] == (3.5 * flops, 3.5 * dense)


def test_single_cases_join_the_default_grid_on_a_gpu_alone() -> None:
    benchmark = registry.load("nystrom_attention")
    for device, changes, singles in (("cuda", {}, 2), ("cpu", {}, 0), ("cuda", {"heads": (1,)}, 0)):
        cases = benchmark.cases(torch.device(device), ("float32",), changes)
        points = [tuple(case.axes.items()) for case in cases]
        known = [tuple({**dict(points[0]), **single}.items()) for single in benchmark.cuda_cases]
        assert sum(point in known for point in points) == singles
        assert len(set(points)) == len(points)


def test_causal_rows_are_linear_attention_of_each_prefix() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 16, dtype=torch.float64)
    rows = torch.tensor([0, 4, 8])
    found = causal_rows(rows, q, k, v)
    for place, row in enumerate(rows):
        shown = slice(0, int(row) + 1)
        expected = linear_attention(q[:, :, row, None], k[:, :, shown], v[:, :, shown])
        torch.testing.assert_close(found[:, :, place, None], expected)
