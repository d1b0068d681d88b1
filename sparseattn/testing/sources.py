"""What a kernel is made of, as a hash: proofs are kept under it, and lapse when it changes.

Nothing is imported: files are read with `ast`, so this works without Triton and without a GPU.
The hash covers the text as it stands, so a comment counts too: what was proven is this text.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def kernels() -> dict[str, Path]:
    """Return every Triton kernel by name, and the file that defines it, in the order of names."""
    found = {}
    for path in _kernel_files():
        for node in _tree(path).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                marks = (ast.unparse(mark).split("(")[0] for mark in node.decorator_list)
                if not {"triton.jit", "jit"}.isdisjoint(marks):
                    found[node.name] = path
    return dict(sorted(found.items()))


def kernel_hashes() -> dict[str, str]:
    """Return the hash of every kernel: its file, the files that launch it, and their imports.

    A file launches a kernel if it imports the kernel's file and lies in the same folder. The
    launchers count, since a wrong stride is as wrong as a wrong kernel; so do the launch rows.
    """
    return {name: source_hash(path, *_launchers(path)) for name, path in kernels().items()}


def source_hash(*paths: Path) -> str:
    """Return 16 hex digits over the files and everything of this repository that they import."""
    named = {_name(path): path for path in sources(*paths)}
    total = hashlib.sha256()
    for name in sorted(named):
        text = _text(named[name])
        total.update(f"{name}\n{len(text)}\n{text}".encode())
    return total.hexdigest()[:16]


def sources(*paths: Path) -> set[Path]:
    """Return the files and what they import from this repository, however far down."""
    found: set[Path] = set()
    waiting = [path.resolve() for path in paths]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return found


def _launchers(path: Path) -> list[Path]:
    family = (other for other in _kernel_files() if other.parent == path.parent)
    return [other for other in family if path in _imported(other) and other.stem != "cases"]


def _kernel_files() -> list[Path]:
    return sorted((_PACKAGE / "kernels").resolve().rglob("*.py"))


def _imported(path: Path) -> list[Path]:
    modules = (module for node in ast.walk(_tree(path)) for module in _modules(node, path))
    return [module.resolve() for module in modules]


def _modules(node: ast.AST, path: Path) -> Iterator[Path]:
    """Files that an import statement of this file runs, as far as they are the repository's."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        folder = path.parents[node.level - 1]
        for alias in node.names:
            parts = [*(node.module or "").split("."), alias.name]
            yield from _module(folder, [part for part in parts if part])
        return
    else:
        return
    for name in names:
        head, *rest = name.split(".")
        if head == _PACKAGE.name:
            yield from _module(_PACKAGE, rest)
        elif _name(path).startswith("benchmarks/"):  # a script may import its neighbours
            folders = [f for f in path.parents if _PACKAGE.parent in f.parents]
            for folder in folders:
                if (folder / head).is_dir() or (folder / f"{head}.py").is_file():
                    yield from _module(folder, [head, *rest])


def _module(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Yield the file of a dotted name; its last part may be a name inside the file."""
    for last in (len(parts), len(parts) - 1):
        if last < 0:
            return
        place = folder.joinpath(*parts[:last])
        for file in (place.with_suffix(".py") if last else place, place / "__init__.py"):
            if file.is_file():
                yield file
                return


def _name(path: Path) -> str:
    """Name a file the same in a checkout, where sparseattn/kernels is a link, and in a wheel."""
    for root, prefix in (
        ((_PACKAGE / "kernels").resolve(), "kernels"),
        (_PACKAGE, _PACKAGE.name),
        (_PACKAGE.parent, ""),
    ):
        if root in path.parents:
            return (Path(prefix) / path.relative_to(root)).as_posix()
    return path.name


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_text(path))
