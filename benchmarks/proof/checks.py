"""What is checked of a case. A check returns a line that says what it found, or raises Wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from proof.case import Arguments, Case
from proof.trees import copy_into, same_bits, sample, tensors, to_float, with_mates

Results = dict[str, Tensor]


class Wrong(Exception):
    """An op does not do what it should."""


@dataclass(frozen=True)
class Setting:
    """Where and how a check runs."""

    device: torch.device
    dtype: torch.dtype
    launches: int = 200

    @property
    def replays(self) -> int:
        """How often a graph is replayed with other values."""
        return 3 if self.gpu else 1

    @property
    def gpu(self) -> bool:
        """Say whether launches are real."""
        return self.device.type == "cuda"


def made(case: Case, setting: Setting, seed: int = 0) -> Arguments:
    """Return the arguments of a case."""
    return case.make(setting.dtype, setting.device, seed)


def run(
    function: Callable[..., Any],
    case: Case,
    arguments: Arguments,
    sent: Results,
    seed: int | None = None,
) -> Results:
    """Return the results of a call, and the gradient "dx" of every argument x that has one.

    sent: the gradient sent into each floating result, by name.
    seed: draw these gradients, and put them into `sent`.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.gradients}
    found = function(**(arguments | leaves))
    outputs = dict(zip(case.results, found if isinstance(found, tuple) else (found,), strict=True))
    results = {name: output.detach() for name, output in outputs.items()}
    if seed is not None:
        sent |= {n: _normal(x, seed) for n, x in results.items() if x.is_floating_point()}
    used = [name for name, output in outputs.items() if output.requires_grad and name in sent]
    if leaves and used:
        gradients = torch.autograd.grad(
            [outputs[name] for name in used],
            list(leaves.values()),
            [sent[name].to(outputs[name].dtype) for name in used],
            materialize_grads=True,
        )
        results |= {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return results


def _normal(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed + 1)
    return torch.empty_like(like).normal_(generator=generator)


# -- numbers -----------------------------------------------------------------------------------


def numbers(case: Case, setting: Setting) -> str:
    """Results and gradients against float64, with NaN in all new memory."""
    arguments, sent = made(case, setting), {}
    with poisoned_memory():
        results = run(case.call, case, arguments, sent, seed=0)
    return _held(case, setting, arguments, sent, results)


def compiled(case: Case, setting: Setting) -> str:
    """The same through torch.compile, in one graph."""
    arguments, sent = made(case, setting), {}
    torch._dynamo.reset()
    # on a CPU inductor would want a C++ compiler; the graph is traced and run either way
    backend = "inductor" if setting.gpu else "aot_eager"
    torch._inductor.config.compile_threads = 1  # there are other workers beside this one
    call = torch.compile(case.call, fullgraph=True, backend=backend)
    try:
        results = run(call, case, arguments, sent, seed=0)
    finally:
        torch._dynamo.reset()
    return _held(case, setting, arguments, sent, results)


def huge(case: Case, setting: Setting) -> str:
    """The first and the last sample of a call with more than 2^31 elements, against float64."""
    arguments, sent = made(case, setting), {}
    largest = max(tensor.numel() for tensor in tensors(arguments))
    if setting.gpu and largest <= 2**31:
        raise Wrong(f"the largest tensor has {largest} elements; expected more than 2^31")
    results = run(case.call, case, arguments, sent, seed=0)
    samples = {arguments[n].shape[0] for n in case.batched if isinstance(arguments.get(n), Tensor)}
    if not samples:
        return _held(case, setting, arguments, sent, results)
    found = []
    for index in (0, max(samples) - 1):
        own = {n: sample(x, index) if n in case.batched else x for n, x in arguments.items()}
        sends = {n: sample(x, index) for n, x in sent.items() if n in case.batched}
        kept = {n: sample(x, index) for n, x in results.items() if _batched(case, n)}
        found.append(f"sample {index}: {_held(case, setting, own, sends, kept)}")
    return "; ".join(found)


def _batched(case: Case, name: str) -> bool:
    """Say whether a result, or the gradient of an argument, has the sample first."""
    return name in case.batched or (name not in case.results and name[1:] in case.batched)


def _held(
    case: Case, setting: Setting, arguments: Arguments, sent: Results, results: Results
) -> str:
    """Hold results against the reference; raise Wrong with every judgement that fails."""
    wide, wide_sent = to_float(arguments, torch.float64), to_float(sent, torch.float64)
    truth = run(case.reference, case, wide, wide_sent)
    naive = run(case.reference, case, arguments, sent)
    if setting.dtype.itemsize == 2:
        _use_float32(case, arguments, results, naive)
    sizes: Mapping[str, Tensor] = {}
    if case.magnitudes is not None:
        sizes = case.magnitudes(wide, wide_sent, truth, setting.dtype)
    terms = {} if case.terms is None else case.terms(wide, wide_sent)
    judgements = []
    for name, result in results.items():
        if truth[name].is_floating_point():
            counts = {"terms": terms[name]} if name in terms else {}
            held = (result, naive[name], truth[name], sizes.get(name))
            judgements.append(case.judge(name, *held, **counts))
        elif not torch.equal(result, truth[name]):
            raise Wrong(f"{name} differs from the reference")
    if faults := [str(judgement) for judgement in judgements if not judgement.passed]:
        raise Wrong("; ".join(faults))
    return "max and mean error by what is allowed: " + ", ".join(
        f"{j.name} {_share(j.max_error, j.max_allowed)} {_share(j.mean_error, j.mean_allowed)}"
        for j in judgements
    )


def _use_float32(case: Case, arguments: Arguments, results: Results, naive: Results) -> None:
    """Hold results that come in float32 for 16-bit inputs against the reference in float32."""
    exact = [n for n in case.results if n in results and results[n].dtype == torch.float32]
    if exact:
        raised = to_float(arguments, torch.float32)
        with torch.no_grad():
            single = run(case.reference, replace(case, gradients=()), raised, {})
        naive |= {name: single[name] for name in exact}


def _share(error: float, allowed: float) -> str:
    return f"{error / allowed:.2f}" if allowed > 0 else "0"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory: NaN for floats, the largest value for integers."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# -- equal bits --------------------------------------------------------------------------------


def repeat(case: Case, setting: Setting) -> str:
    """Many equal calls, forward and backward: every bit the same."""
    arguments, sent = made(case, setting), {}
    first = run(case.call, case, arguments, sent, seed=0)
    for launch in range(1, setting.launches):
        again = run(case.call, case, arguments, sent)
        _require_same(first, again, f"call {launch + 1} of {setting.launches}")
    return f"{setting.launches} calls"


def mates(case: Case, setting: Setting) -> str:
    """The first sample among other mates: every bit the same."""
    arguments, others, sent = made(case, setting), made(case, setting, seed=1), {}
    results = run(case.call, case, arguments, sent, seed=0)
    mixed = {n: with_mates(x, others[n]) if n in case.batched else x for n, x in arguments.items()}
    mixed_sent = {n: with_mates(x, -x) if n in case.batched else x for n, x in sent.items()}
    again = run(case.call, case, mixed, mixed_sent)
    batched = {name for name in results if _batched(case, name)}
    if not batched:
        raise Wrong("no result is batched; name one in Case.batched")
    if all(same_bits(results[name], again[name]) for name in batched):
        raise Wrong("other mates change nothing at all: with one sample this check sees nothing")
    own = {name: results[name][:1] for name in batched}
    _require_same(own, {name: again[name][:1] for name in batched}, "among other batch mates")
    return f"{len(batched)} results"


def _require_same(expected: Results, found: Results, when: str) -> None:
    differing = [name for name, value in expected.items() if not same_bits(value, found[name])]
    if differing:
        raise Wrong(f"{', '.join(differing)} differ in bits: {when}")


# -- how it runs -------------------------------------------------------------------------------


def launch(case: Case, setting: Setting) -> str:
    """One forward and backward; what compute-sanitizer looks at."""
    run(case.call, case, made(case, setting), {}, seed=0)
    if setting.gpu:
        torch.cuda.synchronize()
    return "launched"


def sync(case: Case, setting: Setting) -> str:
    """No call waits for the GPU: torch raises where one does."""
    arguments, sent = made(case, setting), {}
    run(case.call, case, arguments, sent, seed=0)
    if not setting.gpu:
        return "it runs; a CPU has nothing to wait for"
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case.call, case, arguments, sent)
    except RuntimeError as error:
        if "synchroniz" in str(error):
            raise Wrong(f"it waits for the GPU: {error}") from error
        raise
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "no wait"


def graph(case: Case, setting: Setting) -> str:
    """A CUDA graph captured once and replayed with other values, masks and indices."""
    arguments, sent = made(case, setting), {}
    run(case.call, case, arguments, sent, seed=0)
    results, replay = _captured(lambda: run(case.call, case, arguments, sent), setting)
    for seed in range(1, 1 + setting.replays):
        others, other_sent = made(case, setting, seed), {}
        expected = run(case.call, case, others, other_sent, seed=seed)
        copy_into(arguments, others)
        copy_into(sent, other_sent)
        replay()
        _require_same(expected, results, f"replayed with the values of seed {seed}")
    return f"{setting.replays} replays with other values"


def _captured(call: Callable[[], Results], setting: Setting) -> tuple[Results, Callable[[], None]]:
    """Return the results of a call, and what computes them anew in the same memory."""
    if not setting.gpu:
        results = call()
        return results, lambda: copy_into(results, call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = call()
    return results, captured.replay


CHECKS: dict[str, Callable[[Case, Setting], str]] = {
    "numbers": numbers, "repeat": repeat, "mates": mates, "launch": launch, "sync": sync,
    "graph": graph, "compile": compiled, "huge": huge,
}  # fmt: skip
