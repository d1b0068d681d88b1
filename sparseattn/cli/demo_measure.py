"""How the demo measures: the same job with two attentions, in turn, in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sparseattn.cli.demo_vit import Attend, VitStack
from sparseattn.testing.memory import peak_extra_bytes
from sparseattn.viz.report import Row

MOST_ROUNDS, FEWEST_ROUNDS = 20, 3

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Something that can run with any attention.

    forward(attend) returns the output, without gradients; step(attend) returns the output and
    the gradients. The first `compared` gradients are those whose error is reported.
    """

    name: str
    tokens: int
    compared: int
    forward: Callable[[Attend], Tensor]
    step: Callable[[Attend], tuple[Tensor, tuple[Tensor, ...]]]


def attention_job(name: str, qkv: Sequence[Tensor], seed: int) -> Job:
    """Attention by itself: gradients of q, k and v [B, H, N, D] for one random cotangent."""
    leaves = tuple(x.detach().requires_grad_() for x in qkv)
    cotangent = _cotangent(leaves[0], seed)

    def forward(attend: Attend) -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def step(attend: Attend) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = attend(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, cotangent)

    return Job(name, leaves[0].shape[2], 3, forward, step)


def stack_job(name: str, stack: VitStack, patches: Tensor, where: Tensor, seed: int) -> Job:
    """The whole stack: gradients of the pixels and of every weight; the pixels' is compared."""
    pixels = patches.detach().requires_grad_()
    leaves = (pixels, *stack.parameters())
    device = patches.device.type
    cotangent = _cotangent(where[None], seed)

    def run(attend: Attend) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out: Tensor = stack(pixels, where, attend)
        return out

    def forward(attend: Attend) -> Tensor:
        with torch.no_grad():
            return run(attend)

    def step(attend: Attend) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = run(attend)
        return out.detach(), torch.autograd.grad(out, leaves, cotangent.to(out.dtype))

    return Job(name, patches.shape[1], 1, forward, step)


def compare(
    job: Job, dense: Attend, sparse: Attend, budget: float, tick: Callable[[], None]
) -> Row:
    """Run `job` with both attentions and return times, memory and differences.

    The first run of each is the warm-up, and the run whose memory and values are taken. Then come
    rounds of four timed runs (dense forward, sparse forward, dense step, sparse step) until
    `budget` seconds are over: three rounds at least, unless they take twice the budget. `kept` is
    left at 1; the caller knows it.
    """
    (dense_out, dense_grads), dense_bytes = peak_extra_bytes(lambda: job.step(dense))
    (sparse_out, sparse_grads), sparse_bytes = peak_extra_bytes(lambda: job.step(sparse))
    dense_compared, sparse_compared = dense_grads[: job.compared], sparse_grads[: job.compared]
    values = {
        "output_error": relative_error([sparse_out], [dense_out]),
        "gradient_error": relative_error(sparse_compared, dense_compared),
        "output_difference": largest_difference([sparse_out], [dense_out]),
        "gradient_difference": largest_difference(sparse_compared, dense_compared),
    }
    del dense_out, sparse_out, dense_grads, sparse_grads, dense_compared, sparse_compared
    tick()
    calls = {
        "dense_forward_ms": lambda: job.forward(dense),
        "sparse_forward_ms": lambda: job.forward(sparse),
        "dense_step_ms": lambda: job.step(dense),
        "sparse_step_ms": lambda: job.step(sparse),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for runs in range(1, MOST_ROUNDS + 1):
        for name, call in calls.items():
            times[name].append(_milliseconds(call))
        over = (time.perf_counter() - started) / budget
        if over > 2 or (over > 1 and runs >= FEWEST_ROUNDS):  # a slow machine ends early
            break
    tick()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return Row(
        job=job.name,
        tokens=job.tokens,
        runs=runs,
        dense_bytes=dense_bytes,
        sparse_bytes=sparse_bytes,
        **medians,
        **values,
    )


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return |got - expected| / |expected|, Euclidean over all tensors together, in float64."""
    difference = sum(
        (a.double() - b.double()).square().sum().item() for a, b in zip(got, expected, strict=True)
    )
    size = sum(b.double().square().sum().item() for b in expected)
    return float((difference / max(size, 1e-300)) ** 0.5)


def largest_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between the tensors."""
    pairs = zip(got, expected, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def _cotangent(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _milliseconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
    else:
        started = time.perf_counter()
        call()
    return 1e3 * (time.perf_counter() - started)
