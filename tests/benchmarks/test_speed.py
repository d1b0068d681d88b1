"""Entry points of pytest-benchmark: `pytest tests/benchmarks/test_speed.py --benchmark-only`.

Without that option the calls run at the small size, as a test that they can. Its other options save
runs and compare with them (`--benchmark-autosave`, `--benchmark-compare`): did a change cost time?
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseattn.benchmarks import registry

pytest.importorskip("pytest_benchmark", reason='needs pip install "sparseattn[bench]"')
MODES = ("forward", "both")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", registry.ops())
def test_speed(op: str, mode: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    found = registry.load(op)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measuring = request.config.getoption("benchmark_only")
    case = next(found.cases(device, ("float32",), {} if measuring else found.small))
    problem = found.build(case)
    ours = next(provider for provider in problem.providers if provider.ours)
    leaves = [x for x in problem.inputs if x.requires_grad]
    built = () if ours.index is None else (ours.index(),)

    def run() -> None:
        with torch.set_grad_enabled(mode == "both"):
            out = ours.call(*problem.inputs, *built)
        if mode == "both":
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(case=str(case), density=problem.density)
    benchmark.extra_info["useful_flops"] = problem.work.of(mode)[0]
    benchmark.pedantic(run, rounds=20 if measuring else 1, warmup_rounds=2)
