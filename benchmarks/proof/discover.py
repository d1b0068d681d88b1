"""Finds cases, ops and launches; no list is kept by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proof.case import Case

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
OWN_CASES = Path(__file__).resolve().parent / "cases"


def ops() -> list[str]:
    """Return every op: what has a reference."""
    names = (path.stem for path in (ROOT / "sparseattn" / "reference").glob("*.py"))
    return sorted(name for name in names if not name.startswith("_"))


def case_files(folders: tuple[Path, ...] = (OWN_CASES,)) -> dict[str, Path]:
    """Return the case file of every op that has one, by the op's name."""
    files = (path for folder in folders for path in sorted(folder.glob("*.py")))
    return {path.stem: path.resolve() for path in files if not path.stem.startswith("_")}


def load(path: Path) -> tuple[Case, ...]:
    """Return the cases of a file."""
    spec = importlib.util.spec_from_file_location(f"proof_cases_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    cases: tuple[Case, ...] = tuple(module.CASES)
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: CASES has two cases {twice}; expected distinct names")
    if not any(case.size == "small" for case in cases):
        raise ValueError(f"{path.name}: CASES has no small case; expected at least one")
    return cases


@contextmanager
def noted_launches() -> Iterator[set[str]]:
    """Note the name of every Triton program that is launched, on a GPU or in the interpreter."""
    import triton

    kind: Any
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import InterpretedFunction as kind
    else:
        from triton.runtime.jit import JITFunction as kind
    names: set[str] = set()
    original = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return original(self, *args, **kwargs)

    kind.run = run
    try:
        yield names
    finally:
        kind.run = original
