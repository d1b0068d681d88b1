"""The gate before the stopwatch: no speed is printed for a wrong result.

At the size that is timed, or that of `Problem.judged`, a cotangent that is zero but for some rows
makes output and gradients depend on those rows alone. So the naive reference of these rows, in
float64 and in the dtype of the inputs, is enough to judge the whole of every gradient by the
tolerance rule of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn.benchmarks.registry import Problem, Provider
from sparseattn.testing.tolerance import Judgement, judge

Change = Callable[[Tensor], Tensor]
ROWS = 96
# Another library may round where ours does not; its time is worth printing up to this many times
# the error that ours may have.
PEER_SLACK = 16.0


@dataclass(frozen=True)
class Verdict:
    """How near a provider is: its worst error as a multiple of what the rule allows."""

    error: float
    faults: str = ""


class Gate:
    """Holds the truth of one problem, computed once for each reference."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem = problem
        self.inputs = problem.inputs if problem.judged is None else problem.judged
        self.seed = seed
        self._known: dict[Callable[..., Tensor], list[list[Any]]] = {}

    def judge(self, provider: Provider) -> Verdict:
        """Run forward, and backward where there is one, and hold both against the reference."""
        inputs = self.inputs
        built = () if provider.index is None else (provider.index(),)
        leaves = [x for x in inputs if x.requires_grad]
        out = provider.call(*inputs, *built)
        rows, dout = self._rows(out)
        results = [out.detach()[..., rows, :]]
        if provider.backward and leaves:
            full = torch.zeros_like(out)
            full[..., rows, :] = dout
            results += torch.autograd.grad(out, leaves, full)
        known = self._reference(provider.reference or self.problem.reference, rows, dout)
        names = ["out", *(f"gradient {place}" for place in range(len(leaves)))]
        found = [judge(*given) for given in zip(names, results, *known, strict=False)]
        slack = 1.0 if provider.ours else PEER_SLACK
        error = max(_ratio(judgement) for judgement in found)
        faults = [str(j) for j in found if not _ratio(j) <= slack]
        return Verdict(error, "; ".join(faults))

    def _rows(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Choose rows of the output, the first and the last among them, and their cotangent."""
        random = torch.Generator().manual_seed(self.seed)
        count = out.shape[-2]
        picked = torch.randperm(count, generator=random)[: max(0, ROWS - 2)]
        rows = torch.cat((picked, torch.tensor([0, count - 1]))).unique().to(out.device)
        shape = (*out.shape[:-2], len(rows), out.shape[-1])
        return rows, torch.randn(shape, generator=random).to(out)

    def _reference(
        self, reference: Callable[..., Tensor], rows: Tensor, dout: Tensor
    ) -> list[list[Any]]:
        """Return out and gradients of the reference, each as `judge` takes them after a result.

        In the inputs' dtype, then in float64; of sums of products, sizes and numbers of the terms
        (decision 0009): what it makes of squared inputs, and of ones.
        """

        def run(wide: bool, change: Change = Tensor.clone) -> list[Tensor]:
            inputs = [_copy(x, wide, change) for x in self.inputs]
            leaves = [x for x in inputs if x.requires_grad]
            out = reference(rows, *inputs)
            sent = change(dout.to(out.dtype))
            gradients = torch.autograd.grad(out, leaves, sent) if leaves else ()
            return [out.detach(), *gradients]

        if reference not in self._known:
            naive, truth = run(False), run(True)
            sizes: list[Any] = [None] * len(truth)
            terms: list[Any] = [None] * len(truth)
            if self.problem.sums:
                sizes = [size.sqrt() for size in run(True, torch.square)]
                terms = run(True, torch.ones_like)
            self._known[reference] = [naive, truth, sizes, terms]
        return self._known[reference]


def _copy(x: Tensor, wide: bool, change: Change) -> Tensor:
    if not x.is_floating_point():
        return x
    copy = change(x.detach().double() if wide else x.detach())
    return copy.requires_grad_(x.requires_grad)


def _ratio(judgement: Judgement) -> float:
    """Return the error as a multiple of what is allowed; infinite for NaN and wrong shapes."""
    other = [f for f in judgement.faults if " error is over" not in f]
    if other:
        return float("inf")
    limits = (
        (judgement.max_error, judgement.max_allowed),
        (judgement.mean_error, judgement.mean_allowed),
    )
    return max(error / allowed if allowed else 0.0 for error, allowed in limits)
