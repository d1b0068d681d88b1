"""Finds the kernels, the launch tables and the cases of every family; checks that none is missing.

Nothing is listed by hand. A family is a folder of the package with a file `cases.py`; its tables
are in `tuning.py`; kernels are what `@triton.jit` made of functions named `*_kernel`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction

from sparseattn.kernels.cases import Case
from sparseattn.kernels.tables import tables

CAPABILITIES = (80, 90, 100)


class Job(NamedTuple):
    """Which case to compile, and for what: enough to find it again in another process."""

    package: str
    family: str
    capability: int
    index: int


def modules(package: str) -> dict[str, Any]:
    """Import every file of the package; return them by dotted name below it."""
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, f"{package}.")
    names = [name for _, name, _ in found]
    return {name.removeprefix(f"{package}."): importlib.import_module(name) for name in names}


def cases(job: Job) -> list[Case]:
    """Return all cases of the job's family and capability."""
    module = importlib.import_module(f"{job.package}.{job.family}.cases")
    return list(module.cases(job.capability))


def jobs(package: str, capabilities: Iterable[int], scope: str) -> list[Job]:
    """Return what is to be compiled: all "cases", or the first of each of the "rows", "kernels"."""
    families = [name.split(".")[0] for name in modules(package) if name.endswith(".cases")]
    found = []
    for family in families:
        for capability in capabilities:
            first = set()
            for index, case in enumerate(cases(Job(package, family, capability, 0))):
                row = "" if scope == "kernels" else repr(case.row)
                key = (case.kernel, row)
                if scope == "cases" or key not in first:
                    found.append(Job(package, family, capability, index))
                first.add(key)
    return found


def omissions(package: str) -> list[str]:
    """Say which kernels and rows no case reaches."""
    files = modules(package)
    kernels = {
        (name.split(".")[0], value.__name__)
        for name, module in files.items()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
        if value.__module__ == module.__name__
    }
    every = {
        name.split(".")[0]: [
            case
            for capability in CAPABILITIES
            for case in cases(Job(package, name.split(".")[0], capability, 0))
        ]
        for name in files
        if name.endswith(".cases")
    }
    reached = {(family, case.kernel) for family, found in every.items() for case in found}
    missing = [f"no case reaches {'.'.join(kernel)}" for kernel in sorted(kernels - reached)]
    missing += [f"{'.'.join(k)} has cases, but is no kernel" for k in sorted(reached - kernels)]
    for name, module in files.items():
        family, _, rest = name.partition(".")
        if rest != "tuning":
            continue
        rows = [case.row for case in every.get(family, [])]
        for table, lines in tables(module).items():
            unused = [row for row in lines if not any(row is other for other in rows)]
            missing += [f"no case reaches a row of {family}.{table}: {row}" for row in unused]
    return missing
