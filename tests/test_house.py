"""The conventions of this repository, executable.

Each rule is a function of source text, so each is first tried on a bad example written here. The
rules are explained in CONTRIBUTING.md.
"""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports point down this list only, never up and never sideways.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"claims"},
    {"benchmarks"},  # a link, as kernels is; its files lie beside the package
    {"training"},
    {"data", "viz"},
    {"models"},
    {"__init__"},  # the public names: for everything above, for nothing below
    {"convert", "explain"},
    {"integrations"},
    {"layers"},
    {"ops", "testing"},
    {"reference"},
    {"structures"},
    {"checks"},
    {"constants"},
)
LEVEL = {unit: -depth for depth, units in enumerate(FLOORS) for unit in units}

# Who may reach the kernels, and whether only inside functions (imported on first use).
KERNEL_USERS = {"ops": "anywhere", "structures": "in functions", "cli": "in functions"}
KERNEL_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}

FILE_LINES, HOST_LINES, JIT_LINES = 400, 60, 120


class Import(NamedTuple):
    target: str
    relative: bool
    in_function: bool


def imports(name: str, tree: ast.AST) -> Iterator[Import]:
    """Every import of a file as a full dotted name; relative ones are resolved."""
    place = "sparseattn/" + name if name.startswith("kernels/") else name
    package = place.split("/")[:-1]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(".".join([*base, alias.name]), node.level > 0, in_function)
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def unit_of(parts: list[str]) -> str:
    """The floor of a path or dotted name below sparseattn; an unknown name is a public one."""
    first = parts[0].removesuffix(".py") if parts else "__init__"
    return first if first in LEVEL or first == "kernels" else "__init__"


def kernel_import_error(found: Import) -> str | None:
    if found.relative:
        inside = found.target.startswith("sparseattn.kernels.")
        return None if inside else f"{found.target} lies outside kernels/"
    if found.target.split(".")[0] == "sparseattn":
        return f"{found.target}: kernels/ imports itself relatively and nothing else of sparseattn"
    if found.target.split(".")[0] not in KERNEL_IMPORTS:
        return f"{found.target}: kernels/ knows torch, triton and the standard library only"
    return None


def package_import_error(unit: str, found: Import) -> str | None:
    head, *rest = found.target.split(".")
    if head == "kernels":
        return "`kernels` is Hugging Face's package; ours is sparseattn.kernels"
    if head != "sparseattn":
        return None
    target = unit_of(rest)
    if target == "kernels":
        allowed = KERNEL_USERS.get(unit)
        if allowed is None:
            return f"{unit} may not import kernels"
        if allowed == "in functions" and not found.in_function:
            return f"{unit} may import kernels inside functions only"
        return None
    if target != unit and LEVEL[target] >= LEVEL[unit]:
        return f"{unit} may not import {target}"
    return None


def floor_errors(name: str, tree: ast.AST) -> list[str]:
    folder, *rest = name.split("/")
    if folder == "kernels":
        errors = [kernel_import_error(found) for found in imports(name, tree)]
    elif folder == "sparseattn":
        if rest[0].removesuffix(".py") not in LEVEL:
            return [f"{rest[0]} has no floor; give it one in FLOORS"]
        errors = [package_import_error(unit_of(rest), found) for found in imports(name, tree)]
    else:
        top_level = {found.target.split(".")[0] for found in imports(name, tree)}
        errors = ["write sparseattn.kernels, not kernels"] if "kernels" in top_level else []
    return [error for error in errors if error]


def decorators(function: ast.FunctionDef) -> set[str]:
    calls = (node.func if isinstance(node, ast.Call) else node for node in function.decorator_list)
    return {ast.unparse(node) for node in calls}


def is_jit(function: ast.FunctionDef) -> bool:
    return not decorators(function).isdisjoint({"triton.jit", "jit"})


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def code_lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end; the docstring does not count."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def size_errors(name: str, tree: ast.AST) -> list[str]:
    errors = []
    for function in functions(tree):
        ceiling = JIT_LINES if is_jit(function) else HOST_LINES
        if (lines := code_lines(function)) > ceiling:
            errors.append(f"{function.name} has {lines} lines of at most {ceiling}")
    return errors


def environment_errors(name: str, tree: ast.AST) -> list[str]:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    used = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in names]
    taken = [i.target for i in imports(name, tree) if i.target in {f"os.{n}" for n in names}]
    return [f"{use}: no environment variables of our own" for use in used + taken]


def assert_errors(name: str, tree: ast.AST) -> list[str]:
    lines = [str(node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return [f"assert in line {line}; raise an error that says what is wrong" for line in lines]


def program_errors(name: str, tree: ast.AST) -> list[str]:
    return [
        f'the docstring of {function.name} does not say "One program: ..."'
        for function in functions(tree)
        if is_jit(function) and function.name.endswith("_kernel")
        if "One program" not in (ast.get_docstring(function) or "")
    ]


PACKAGE = ("kernels", "sparseattn")
RULES = {  # rule: (checker, folders it holds for)
    "floors": (floor_errors, ("kernels", "sparseattn", "benchmarks", "tests")),
    "function sizes": (size_errors, ("kernels", "sparseattn", "benchmarks")),
    "no environment variables": (environment_errors, PACKAGE),
    "no assert": (assert_errors, PACKAGE),
    "kernels say what one program does": (program_errors, ("kernels",)),
}

JIT = "@triton.jit\ndef f_kernel(x_ptr):\n"
BAD = [  # rule, file, source, what the error must mention
    ("floors", "sparseattn/reference/x.py", "import sparseattn.kernels.launch", "reference"),
    ("floors", "sparseattn/reference/x.py", "from ..kernels import launch", "reference"),
    ("floors", "sparseattn/reference/x.py", "def f():\n from ..kernels import a", "reference"),
    ("floors", "sparseattn/structures/x.py", "from sparseattn.kernels import a", "functions only"),
    ("floors", "sparseattn/structures/x.py", "from sparseattn.ops import a", "ops"),
    ("floors", "sparseattn/structures/x.py", "from sparseattn import BlockMask", "__init__"),
    ("floors", "sparseattn/checks.py", "from sparseattn import structures", "structures"),
    ("floors", "sparseattn/ops/x.py", "from sparseattn import testing", "testing"),
    ("floors", "sparseattn/layers/x.py", "import sparseattn", "__init__"),
    ("floors", "sparseattn/layers/x.py", "import sparseattn.kernels.launch", "kernels"),
    ("floors", "sparseattn/ops/x.py", "from kernels import launch", "Hugging Face"),
    ("floors", "sparseattn/viz/x.py", "from sparseattn.benchmarks import runner", "benchmarks"),
    ("floors", "sparseattn/helpers.py", "", "no floor"),
    ("floors", "kernels/x/a.py", "from sparseattn.kernels import launch", "relatively"),
    ("floors", "kernels/x/a.py", "from ...ops import a", "outside"),
    ("floors", "kernels/x/a.py", "import numpy", "numpy"),
    ("floors", "benchmarks/a.py", "import kernels.launch", "sparseattn.kernels"),
    ("function sizes", "sparseattn/a.py", "def f():\n" + " x = 1\n" * 60, "61 lines of at most 60"),
    ("function sizes", "kernels/a.py", JIT + " x = 1\n" * 120, "121 lines of at most 120"),
    ("no environment variables", "sparseattn/a.py", "import os\nos.environ['A']", "environ"),
    ("no environment variables", "kernels/a.py", "from os import getenv", "getenv"),
    ("no assert", "kernels/a.py", "def f(x):\n assert x", "line 2"),
    ("kernels say what one program does", "kernels/a.py", JIT + " pass", "f_kernel"),
    ("kernels say what one program does", "kernels/a.py", JIT + " 'A sum.'", "f_kernel"),
]
GOOD = [
    (
        "floors",
        "sparseattn/ops/x.py",
        "from sparseattn.kernels import a\nfrom ..reference import b",
    ),
    ("floors", "sparseattn/structures/x.py", "def f():\n from sparseattn.kernels import a"),
    (
        "floors",
        "sparseattn/structures/x.py",
        "from .y import z\nfrom sparseattn.checks import Shapes",
    ),
    ("floors", "sparseattn/cli/x.py", "from sparseattn import BlockMask, __version__"),
    ("floors", "sparseattn/ops/x.py", "from sparseattn import structures"),
    (
        "floors",
        "kernels/x/a.py",
        "import math\nimport triton.language as tl\nfrom ..launch import a",
    ),
    (
        "function sizes",
        "sparseattn/a.py",
        "def f():\n '''" + "\n" * 99 + " '''\n" + " x = 1\n" * 59,
    ),
    ("no assert", "kernels/a.py", JIT + " tl.static_assert(x)"),
    ("kernels say what one program does", "kernels/a.py", JIT + " 'One program: one block.'"),
    ("kernels say what one program does", "kernels/a.py", "@triton.jit\ndef helper(x): pass"),
]


def numbered(examples: list[tuple]) -> list[str]:
    return [f"{index}-{rule}" for index, (rule, *_) in enumerate(examples)]


@pytest.mark.parametrize(("rule", "name", "source", "mention"), BAD, ids=numbered(BAD))
def test_rule_catches(rule, name, source, mention):
    errors = RULES[rule][0](name, ast.parse(source))
    assert len(errors) == 1 and mention in errors[0]


@pytest.mark.parametrize(("rule", "name", "source"), GOOD, ids=numbered(GOOD))
def test_rule_allows(rule, name, source):
    assert RULES[rule][0](name, ast.parse(source)) == []


def files(*folders: str) -> list[str]:
    """Python files as names from the root. Links are not followed, so kernels/ appears once."""
    found = []
    for folder in folders:
        for place, below, names in os.walk(ROOT / folder):
            below[:] = [name for name in below if not name.startswith((".", "__pycache__"))]
            found += [Path(place, name) for name in names if name.endswith(".py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule):
    check, folders = RULES[rule]
    errors = [
        f"{name}: {error}"
        for name in files(*folders)
        for error in check(name, ast.parse(read(name), name))
    ]
    assert not errors, "\n".join(errors)


def test_files_are_short():
    lines = {
        name: len(read(name).splitlines())
        for name in files("kernels", "sparseattn", "benchmarks", "tests")
    }
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_folder_beside_the_package_is_committed_as_a_link(name):
    link = ROOT / "sparseattn" / name
    assert link.is_symlink() and Path(os.readlink(link)) == Path("..", name)


# One name, five places and one row.
OPS = [
    Path(name).stem for name in files("sparseattn/reference") if not Path(name).stem.startswith("_")
]
PLACES = (
    "sparseattn/ops/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
    "docs/math/{}.md",
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def map_rows(text: str) -> dict[str, list[list[str]]]:
    """Rows of the table `op | forward | backward | lists`: op -> link targets of each column."""
    lines = (line.strip().strip("|").split("|") for line in text.splitlines() if "|" in line)
    cells = [[cell.strip() for cell in line] for line in lines]
    titles = [row for row in cells if row[:3] == ["op", "forward", "backward"]]
    rows = cells[cells.index(titles[0]) + 2 :] if titles else []
    return {row[0].strip("`"): [LINK.findall(cell) for cell in row[1:]] for row in rows}


def map_errors(text: str, ops: list[str], folder: Path) -> list[str]:
    rows = map_rows(text)
    errors = [f"{op} has no row" for op in ops if op not in rows]
    errors += [f"{op} is no op" for op in rows if op not in ops]
    for op, columns in rows.items():
        for title, targets in zip(("forward", "backward"), columns, strict=False):
            if not targets:
                errors.append(f"{op} has no link under {title}")
        missing = [target for column in columns for target in column]
        missing = [target for target in missing if not (folder / target).is_file()]
        errors += [f"{op} links to {target}, which does not exist" for target in missing]
    return errors


def test_map_check_catches():
    text = "# Map\n| op | forward | backward | lists |\n|---|---|---|---|\n"
    text += "| `a` | [f](test_house.py) | [b](no.py) | |\n| b | [f](test_house.py) | none | |\n"
    errors = map_errors(text, ["a", "c"], Path(__file__).parent)
    assert len(errors) == 4
    for error in ("c has no row", "b is no op", "a links to no.py", "b has no link under backward"):
        assert any(found.startswith(error) for found in errors)


def test_there_are_ops():
    assert OPS


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_places(op):
    missing = [place.format(op) for place in PLACES if not (ROOT / place.format(op)).is_file()]
    assert not missing


def test_kernel_map_is_complete():
    errors = map_errors(read("kernels/README.md"), OPS, ROOT / "kernels")
    assert not errors, "\n".join(errors)
