"""`sparseattn info`: versions, which implementation can run where, and what is proven of it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sparseattn
from sparseattn.cli import proofs
from sparseattn.ops import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_parser(subparsers: Any) -> None:
    """Add the parser of `sparseattn info`."""
    parser = subparsers.add_parser(
        "info", help="versions, what can run here and why not, what is proven and measured"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print what is known, and return 0."""
    found = gather()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def gather() -> dict[str, Any]:
    """Return everything that `sparseattn info` says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions(),
        "device": str(device),
        "ops": {name: usable(op, device) for name, op in ops().items()},
        "kernels": proofs.kernels(results_folder()),
        "unmeasured": unmeasured(),
    }


def versions() -> dict[str, str | None]:
    """Return versions of everything that decides what runs; None for what there is not."""
    gpu = capability = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    triton = importlib.metadata.version("triton") if dispatch.triton_installed() else None
    return {
        "sparseattn": sparseattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "gpu": gpu,
        "capability": capability,
    }


def ops() -> dict[str, Callable[..., Any]]:
    """Return the public functions of ops/ that take `impl`, by name."""
    public = {name: getattr(sparseattn, name) for name in sorted(sparseattn.__all__)}
    functions = {n: f for n, f in public.items() if f.__module__.startswith("sparseattn.ops.")}
    return {n: f for n, f in functions.items() if "impl" in inspect.signature(f).parameters}


def usable(op: Callable[..., Any], device: torch.device) -> dict[str, Any]:
    """Return for each dtype why Triton cannot run an op here (empty: it can), and what auto takes.

    The reasons are those of the op itself: `unsupported` beside it is asked about small tensors, or
    about what `example(device, dtype)` beside it returns, where tensors alone will not do.
    """
    module = inspect.getmodule(op)
    unsupported = getattr(module, "unsupported", None)
    if unsupported is None:
        raise LookupError(f"{op.__name__} takes impl, but {module} has no function unsupported")
    example = getattr(module, "example", None) or tensors_for(unsupported)
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        reasons = unsupported(*example(device, dtype))
        auto = dispatch.choose(op.__name__, "auto", device, reasons)
        found[str(dtype).removeprefix("torch.")] = {"auto": auto, "triton": reasons}
    return found


def tensors_for(function: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return what makes one small tensor for every parameter that has no default."""
    parameters = inspect.signature(function).parameters.values()
    count = sum(parameter.default is parameter.empty for parameter in parameters)

    def example(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (torch.empty((1, 1, 64, 64), dtype=dtype, device=device),) * count

    return example


def unmeasured() -> dict[str, list[int]]:
    """Return the launch tables with rows that nobody measured, and those rows' capabilities."""
    from sparseattn import kernels
    from sparseattn.kernels.tables import unmeasured as unmeasured_in

    found = {}
    for family in pkgutil.iter_modules(kernels.__path__):
        name = f"{kernels.__name__}.{family.name}.tuning"
        if family.ispkg and importlib.util.find_spec(name) is not None:
            for table, capabilities in unmeasured_in(importlib.import_module(name)).items():
                found[f"{family.name}.{table}"] = capabilities
    return found


def results_folder() -> Path:
    """Return where a checkout keeps its proofs; an installed package has none."""
    return Path(sparseattn.__file__).resolve().parents[1] / "benchmarks" / "results"


def text(found: dict[str, Any]) -> str:
    """Return what `gather` found, for people."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for name, version in found["versions"].items():
        yield f"{name:11} {version or 'none'}"
    yield f"\nImplementations on {found['device']}: torch and reference run everywhere"
    for op, dtypes in found["ops"].items():
        yield f"  {op}"
        for auto, names in _by({dtype: [answer["auto"]] for dtype, answer in dtypes.items()}):
            yield f"    auto takes {auto}{names}"
        for reason, names in _by({dtype: answer["triton"] for dtype, answer in dtypes.items()}):
            yield f"    not triton{names}: {reason}"
    unproven = sum(not kernel["proven"] for kernel in found["kernels"].values())
    yield f"\nKernels: {len(found['kernels'])}, of which {unproven} are unproven as they stand"
    for name, kernel in found["kernels"].items():
        yield f"  {name}: {kernel['why'] or 'proven on ' + ', '.join(kernel['proven'])}"
    yield f"\nLaunch tables with unmeasured rows: {len(found['unmeasured'])}"
    for table, capabilities in found["unmeasured"].items():
        whose = (f"capability {c // 10}.{c % 10}" if c else "every GPU" for c in capabilities)
        yield f"  {table}: rows of {', '.join(whose)}"


def _by(answers: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield each answer once, with the dtypes that have it; these are left out if all have it."""
    for answer in dict.fromkeys(answer for given in answers.values() for answer in given):
        names = [dtype for dtype, given in answers.items() if answer in given]
        yield answer, "" if len(names) == len(answers) else f" in {', '.join(names)}"
