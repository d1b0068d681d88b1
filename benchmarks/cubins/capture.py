"""Runs launchers without a GPU and keeps what they would launch.

A launcher sees tensors that say they lie on a GPU of the wanted capability; in truth they are CPU
tensors. A launch is kept in place of being run, and compiled for that GPU if asked: so what is
compiled is what an op launches, with its flags, its strides and what Triton reads off them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# streaming multiprocessors of an A100, an H100, a B200: launchers cut work by them
PROCESSORS = {80: 108, 90: 132, 100: 148}
GPU = torch.device("cuda", 0)


class Launch(NamedTuple):
    """A launch that was kept: the kernel and its arguments."""

    kernel: JITFunction
    arguments: tuple
    keywords: dict[str, Any]

    def constants(self) -> dict[str, Any]:
        """Return the compile-time values by name."""
        names = [param.name for param in self.kernel.params]
        given = dict(zip(names, self.arguments, strict=False)) | self.keywords
        return {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}

    def choices(self) -> dict[str, Any]:
        """Return what decides the binary, but for types: compile-time values, warps, stages."""
        names = [param.name for param in self.kernel.params]
        options = {name: value for name, value in self.keywords.items() if name not in names}
        return self.constants() | options


class _Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on the GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)


class _Devices(TorchFunctionMode):
    """Makes every tensor on the CPU and has it say that it is on the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:  # naming a device makes nothing
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_to_cpu, (args, kwargs or {}))
        made = func(*args, **kwargs)
        return tree_map(
            lambda x: x.as_subclass(_Elsewhere) if isinstance(x, torch.Tensor) else x, made
        )


def _to_cpu(value: Any) -> Any:
    is_gpu = isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )
    return torch.device("cpu") if is_gpu else value


class _Driver:
    """What Triton asks of a GPU before it compiles. Each capability is a device of its own."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _gpu(capability: int) -> Iterator[None]:
    pair = divmod(capability, 10)
    properties = SimpleNamespace(
        multi_processor_count=PROCESSORS[capability], major=pair[0], minor=pair[1]
    )
    fakes = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.get_device_capability": lambda device=None: pair,
        "torch.cuda.get_device_properties": lambda device=None: properties,
        "torch.cuda.device_of": lambda tensor: nullcontext(),
        "torch.cuda.device": lambda device: nullcontext(),
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch(name, fake))
        stack.enter_context(_Devices())
        yield


def launches(run: Any, capability: int) -> list[Launch]:
    """Call `run` as if on a GPU of this capability; return its launches in their order."""
    kept: list[Launch] = []

    def keep(kernel, *arguments, grid, warmup, **keywords):
        kept.append(Launch(kernel, arguments, keywords))

    with _gpu(capability), mock.patch.object(JITFunction, "run", keep):
        run()
    return kept


def compiled(launch: Launch, capability: int) -> Any:
    """Compile a launch for a GPU of this capability, as Triton would have done to run it.

    The process can compile only, from then on.
    """
    triton.runtime.driver.set_active(_Driver(capability))
    kernel, arguments, keywords = launch
    return kernel.run(*arguments, grid=None, warmup=True, **keywords)
