"""The gate: a wrong result is not timed, and one of ours fails the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparseattn.benchmarks.attention import attention_rows, attention_work
from sparseattn.benchmarks.gate import Gate, Verdict
from sparseattn.benchmarks.registry import Benchmark, Case, Problem, Provider, Work
from sparseattn.benchmarks.runner import Settings, run_case
from sparseattn.benchmarks.timing import CpuTimer

RATES = {"matmul_tflops": {"float32": 0.1}, "copy_gbps": 10.0}


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is a little too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, dx: Tensor) -> Tensor:
        return dx * 1.001


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def one_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v).clone()
    out[..., -1, 0] = float("nan")
    return out


FAULTS = {
    "values": lambda q, k, v: attend(q, k, v) * 1.001,
    "last row": one_nan,
    "gradient of q": lambda q, k, v: attend(WrongGradient.apply(q), k, v),
    "gradient of v": lambda q, k, v: attend(q, k, WrongGradient.apply(v)),
    "shape": lambda q, k, v: attend(q, k, v)[:, :1],
}


def problem_of(*providers: Provider) -> Problem:
    q, k, v = (torch.randn(1, 2, 130, 16).requires_grad_() for _ in range(3))
    work = attention_work(q, k, 2 * 130**2)
    return Problem((q, k, v), providers, attention_rows, work)


def test_the_right_result_passes() -> None:
    verdict = Gate(problem_of()).judge(Provider("ours", attend, ours=True))
    assert not verdict.faults and verdict.error <= 1


def test_other_inputs_are_judged_where_a_problem_names_them() -> None:
    short = tuple(torch.randn(1, 2, 40, 16).requires_grad_() for _ in range(3))
    lengths = []

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append(q.shape[2])
        return attend(q, k, v)

    gate = Gate(replace(problem_of(), judged=short))
    assert not gate.judge(Provider("ours", noted, ours=True)).faults
    assert set(lengths) == {40}
    assert gate.judge(Provider("ours", FAULTS["gradient of q"], ours=True)).faults


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_results_are_caught(fault: str) -> None:
    provider = Provider("ours", FAULTS[fault], ours=True)
    try:
        verdict = Gate(problem_of()).judge(provider)
    except RuntimeError:
        assert fault == "shape"
    else:
        assert verdict.faults and verdict.error > 1


def test_a_peer_may_round_more_but_not_be_wrong() -> None:
    def rough(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) * (1 + 1e-6)

    assert Gate(problem_of()).judge(Provider("ours", rough, ours=True)).faults
    assert not Gate(problem_of()).judge(Provider("peer", rough)).faults
    assert Gate(problem_of()).judge(Provider("peer", FAULTS["values"])).faults


def records_for(call: Callable[..., Tensor], ours: bool) -> list[dict]:
    dense = Provider("dense", attend, dense=True)
    benchmark = Benchmark(
        "toy",
        lambda case: problem_of(Provider("tried", call, ours=ours), dense),
        axes={"tokens": (130,)},
        small={},
    )
    case = Case({"tokens": 130}, torch.float32, torch.device("cpu"))
    return run_case(benchmark, case, RATES, CpuTimer(), Settings(rounds=1, warmup=1))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_speed_on_a_wrong_result(fault: str, ours: bool) -> None:
    records = records_for(FAULTS[fault], ours)
    (tried,) = [record for record in records if record["provider"] == "tried"]
    assert "p50" not in tried and tried["note"].startswith(("wrong result", "fails"))
    assert tried["wrong"] or not ours
    assert {r["mode"] for r in records if r["provider"] == "dense"} == {
        "forward",
        "backward",
        "both",
    }


def test_gains_are_over_the_dense_baseline() -> None:
    records = {(r["provider"], r["mode"]): r for r in records_for(attend, ours=True)}
    for mode in ("forward", "backward", "both"):
        ours, dense = records["tried", mode], records["dense", mode]
        assert ours["speedup"] == dense["p50"] / ours["p50"] and dense["speedup"] == 1


def test_long_sums_may_err_by_their_length() -> None:
    """Decision 0009: one product after the other errs more than sums of sums do."""
    x, weight = torch.randn(64, 2048), torch.randn(2048, 8)

    def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
        out = x.new_zeros(64, 8)
        for column, row in zip(x.mT, weight, strict=True):
            out += column[:, None] * row
        return out

    def verdict(sums: bool) -> Verdict:
        work = Work(flops=1, bytes=1, backward_flops=1, backward_bytes=1, dense_flops=1)
        problem = Problem((x, weight), (), lambda rows, x, w: x[rows] @ w, work, sums=sums)
        return Gate(problem).judge(Provider("ours", one_by_one, ours=True))

    assert not verdict(True).faults and verdict(True).error < verdict(False).error
