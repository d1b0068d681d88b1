"""What an op gives to be measured: its axes, its providers, a reference, and a model of its work.

A file `bench_<op>.py` beside this one holds `BENCHMARK = Benchmark(...)`; that is all it takes to
be found. `build` makes one `Problem` from one `Case`, a point on the axes.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.work import Work

PREFIX = "bench_"
Axes = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """One point on the axes, in one dtype, on one device. `case["tokens"]` reads an axis."""

    axes: Mapping[str, float]
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def __getitem__(self, axis: str) -> int:
        """Return the value of an axis of whole numbers."""
        value = self.axes[axis]
        if value != int(value):
            raise ValueError(f"{axis} is {value:g}; expected a whole number")
        return int(value)

    def share(self, axis: str) -> float:
        """Return the value of an axis of fractions, such as a density."""
        return float(self.axes[axis])

    def generator(self) -> torch.Generator:
        """Return a random generator on the device, the same for every provider."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def __str__(self) -> str:
        """Say the axes and the dtype in one line."""
        axes = " ".join(f"{axis}={value:g}" for axis, value in self.axes.items())
        return f"{axes} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Provider:
    """One implementation.

    name: as it is printed and chosen with --providers.
    call: (*inputs) -> out, or (*inputs, index()) -> out with an index.
    index: builds what the call reads beside its inputs: a mask, block lists, a kernel map.
    ours: a wrong result of this one fails the run; of another it is only not timed.
    dense: a baseline; speed-ups are over the fastest of these.
    backward: whether it has one; `inputs` then get their gradients checked too.
    reference: what it computes, where that is not what the problem computes (dense baselines).
    unavailable: why it cannot run here (empty: it can).
    scratch_bytes: roughly what it needs at once, where that may be too much for the machine.
    """

    name: str
    call: Callable[..., Tensor]
    index: Callable[[], Any] | None = None
    ours: bool = False
    dense: bool = False
    backward: bool = True
    reference: Callable[..., Tensor] | None = None
    unavailable: str = ""
    scratch_bytes: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One case made real.

    inputs: tensors; those that require grad are differentiated.
    providers: who runs it, ours among them.
    reference: (rows, *inputs) -> out[..., rows, :], naive and differentiable, in the dtype of the
        inputs; `rows` is an int64 tensor of places in the second-last dimension of the output.
    density: the share of the dense work that the problem really has.
    sums: whether output and gradients are sums of products of the inputs and what is sent, so that
        long ones may err by their length (decision 0009).
    judged: inputs that the gate takes in place of `inputs`, where float64 at the size that is timed
        takes minutes: a shorter network through the same calls.
    """

    inputs: tuple[Tensor, ...]
    providers: tuple[Provider, ...]
    reference: Callable[..., Tensor]
    work: Work
    density: float = 1.0
    sums: bool = False
    judged: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Benchmark:
    """An op as the runner knows it.

    axes: name -> default values; every combination is one case. `density`, where there is one, is
        the axis of break-even, and `tokens` that of the plots over length.
    cuda_axes: other defaults on a GPU.
    cuda_cases: single cases on a GPU beside those; an axis that one leaves out has its first value.
    small: values for the tests, which run every provider in moments on a CPU.
    """

    op: str
    build: Callable[[Case], Problem]
    axes: Axes
    small: Axes
    cuda_axes: Axes = field(default_factory=dict)
    cuda_cases: tuple[dict[str, float], ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def cases(
        self, device: torch.device, dtypes: tuple[str, ...], changes: Axes, seed: int = 0
    ) -> Iterator[Case]:
        """Return every combination of the axes; `changes` replace the defaults.

        Raises:
            ValueError: a change names no axis of this op.
        """
        unknown = [axis for axis in changes if axis not in self.axes]
        if unknown:
            known = ", ".join(self.axes)
            raise ValueError(f"{self.op}: there is no axis {unknown[0]!r}; expected one of {known}")
        on_gpu = device.type == "cuda"
        axes = {**self.axes, **(self.cuda_axes if on_gpu else {}), **changes}
        points = [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]
        if on_gpu and not changes:
            first = {axis: values[0] for axis, values in axes.items()}
            points += [{**first, **single} for single in self.cuda_cases]
        for dtype in dtypes or self.dtypes:
            for point in points:
                yield Case(point, getattr(torch, dtype), device, seed)


def ops() -> list[str]:
    """Return the names of all ops that have a benchmark."""
    from sparseattn import benchmarks

    names = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def load(op: str) -> Benchmark:
    """Import the benchmark of an op."""
    module = importlib.import_module(f"sparseattn.benchmarks.{PREFIX}{op}")
    benchmark: Benchmark = module.BENCHMARK
    return benchmark


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
