"""What counts as a kernel's source, tried on a small tree of files."""

from pathlib import Path

import pytest

from sparseattn.testing import sources

TREE = {
    "sparseattn/__init__.py": "",
    "sparseattn/ops/__init__.py": "",
    "sparseattn/ops/add.py": "def f():\n    from sparseattn.kernels.add import call\n",
    "kernels/launch.py": "ROWS = 1\n",
    "kernels/tiles.py": "import triton\n\n@triton.jit\ndef load(x): pass\n",
    "kernels/add/__init__.py": '"""Sums."""\n',
    "kernels/add/kernel.py": "import triton\nfrom ..tiles import load\n\n"
    "@triton.jit(do_not_specialize=['n'])\ndef add_fwd_kernel(n): load(n)\n",
    "kernels/add/call.py": "from .. import launch\nfrom .kernel import add_fwd_kernel\n",
    "kernels/add/cases.py": "from . import call\nfrom .kernel import add_fwd_kernel\n",
    "kernels/mean/kernel.py": "import triton\n\n@triton.jit\ndef mean_kernel(n): pass\n",
    "benchmarks/proof/case.py": "",
    "benchmarks/proof/cases/add.py": "from proof.case import Case\nimport sparseattn.ops.add\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "sparseattn" / "kernels").symlink_to("../kernels")
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "sparseattn")
    return tmp_path


def change(root: Path, name: str, line: str = "x = 1\n") -> None:
    with (root / name).open("a", encoding="utf-8") as file:
        file.write(line)
    sources._tree.cache_clear()


def test_kernels_are_found_by_decorator_and_name(root: Path) -> None:
    # load is a device helper; nothing launches it
    assert sources.kernels() == {
        "add_fwd_kernel": root / "kernels/add/kernel.py",
        "mean_kernel": root / "kernels/mean/kernel.py",
    }


@pytest.mark.parametrize(
    ("changed", "lapses"),
    [
        ("kernels/add/kernel.py", True),
        ("kernels/tiles.py", True),  # a device helper
        ("kernels/add/call.py", True),  # the launcher
        ("kernels/launch.py", True),  # what the launcher imports
        ("kernels/add/cases.py", False),  # compiles the kernel, does not run it
        ("kernels/mean/kernel.py", False),
        ("sparseattn/ops/add.py", False),
    ],
)
def test_one_line_changes_the_hash_of_what_uses_it(root: Path, changed: str, lapses: bool) -> None:
    before = sources.kernel_hashes()
    change(root, changed)
    after = sources.kernel_hashes()
    assert (before["add_fwd_kernel"] != after["add_fwd_kernel"]) == lapses
    assert (before["mean_kernel"] != after["mean_kernel"]) == (changed == "kernels/mean/kernel.py")


@pytest.mark.parametrize("changed", ["benchmarks/proof/case.py", "kernels/tiles.py"])
def test_a_script_beside_the_package_counts_its_neighbours(root: Path, changed: str) -> None:
    script = root / "benchmarks/proof/cases/add.py"
    before = sources.source_hash(script)
    change(root, changed)
    assert sources.source_hash(script) != before


def test_line_endings_and_places_do_not_count(root: Path) -> None:
    before = sources.kernel_hashes()
    for path in (root / "kernels").rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    # a wheel holds a real folder where a checkout holds a link
    (root / "sparseattn/kernels").unlink()
    (root / "kernels").rename(root / "sparseattn/kernels")
    sources._tree.cache_clear()
    assert sources.kernel_hashes() == before


def test_every_kernel_of_the_package_has_a_hash() -> None:
    assert "block_attention_fwd_kernel" in sources.kernels()
    assert sources.kernel_hashes().keys() == sources.kernels().keys()
