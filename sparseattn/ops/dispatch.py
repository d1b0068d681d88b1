"""Which implementation runs, and why another may not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from functools import cache

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch", "reference")


def choose(op: str, impl: str, device: torch.device, reasons: list[str]) -> str:
    """Return the implementation to run; `reasons` say why Triton cannot (empty: it can).

    An explicit choice never falls back: NotImplementedError carries all reasons.
    """
    if impl not in IMPLS:
        options = ", ".join(repr(name) for name in IMPLS)
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {options}")
    if impl == "triton" and reasons:
        raise NotImplementedError(f"{op}: impl='triton' cannot run this: {'; '.join(reasons)}")
    if impl != "auto":
        return impl
    return "triton" if device.type == "cuda" and not reasons else "torch"


def triton_reasons(device: torch.device) -> tuple[str, ...]:
    """Return why Triton kernels cannot run on this device (empty: they can)."""
    if not triton_installed():
        return ("Triton is not installed (pip install triton)",)
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return (f"Triton is {version}; expected >= 3.6",)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (f"compute capability is {capability[0]}.{capability[1]}; expected >= 8.0",)
        return ()
    if device.type == "cpu" and interpreting():
        return ()
    return (f"tensors are on {device}; expected CUDA, or CPU with TRITON_INTERPRET=1",)


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo (0.6 s).
triton_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def triton_installed() -> bool:
    """Say whether Triton can be imported."""
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """Say whether Triton runs kernels on the CPU (TRITON_INTERPRET=1 before its import)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as scaled_dot_product_attention does under autocast: all but float64."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
