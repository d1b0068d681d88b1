"""The public names, their docstrings, and what importing them costs."""

import inspect
import re
import subprocess
import sys

import pytest

import sparseattn

# a change here is a line for CHANGELOG.md
PUBLIC = ["BlockMask", "TileOrder", "block_sparse_attention", "topk_attention"]
PUBLIC += ["SparseAttention", "convert", "explain", "patch_sdpa", "revert"]
PUBLIC += ["PatchGrid", "PatchMask", "submanifold_conv3d"]
PUBLIC += ["convert_masked", "revert_masked", "densify", "sparse_avg_pool3d", "sparse_max_pool3d"]
PUBLIC += ["orthogonal_features", "performer_attention"]
PUBLIC += ["saliency_attention"]
PUBLIC += ["linear_attention", "linformer_attention"]
PUBLIC += ["AttentionFactors", "approximation_error", "redraw_features"]
PUBLIC += ["KernelMap", "VoxelTensor", "sparse_conv3d", "sparse_conv_transpose3d"]
PUBLIC += ["nystrom_attention"]
HOMES = {name: getattr(sparseattn, name).__module__ for name in PUBLIC}
OPS = [n for n, home in HOMES.items() if home.startswith("sparseattn.ops.") and n.islower()]

SECTIONS = ["Args", "Returns", "Raises", "Notes", "Reference"]
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):", re.MULTILINE)


def run(program: str) -> str:
    """Run a program in a fresh interpreter, away from the checkout, and return what it prints."""
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    assert sorted(sparseattn.__all__) == sorted(PUBLIC)
    assert all(hasattr(sparseattn, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(sparseattn, name))


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isclass(getattr(sparseattn, n))])
def test_public_methods_have_docstrings(name):
    members = vars(getattr(sparseattn, name)).items()
    kinds = (property, classmethod, staticmethod)
    public = {n: m for n, m in members if not n.startswith("_")}
    bare = [n for n, m in public.items() if callable(m) or isinstance(m, kinds)]
    bare = [n for n in bare if not (getattr(public[n], "__doc__", None) or "").strip()]
    assert bare == []


@pytest.mark.parametrize("name", OPS)
def test_op_docstring_has_its_sections_in_order(name):
    assert HEADING.findall(inspect.getdoc(getattr(sparseattn, name))) == SECTIONS


def test_heading_check():
    assert HEADING.findall("One line.\n\nArgs:\n    q: x.\n    Notes: y\n\nNotes:\n") == [
        "Args",
        "Notes",
    ]


def test_import_works_without_triton():
    assert (
        run(
            "import sys; sys.modules['triton'] = None\n"
            "import torch, sparseattn\n"
            "q = torch.randn(1, 1, 32, 16)\n"
            "blocks = torch.ones(1, 1, 2, 2).bool()\n"
            "mask = sparseattn.BlockMask.from_dense(blocks, 32, 32, (16, 16))\n"
            "print(list(sparseattn.block_sparse_attention(q, q, q, mask).shape))"
        )
        == "[1, 1, 32, 16]"
    )


def test_import_is_light():
    loaded = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import sparseattn; print(*set(sys.modules) - before)"
    ).split()
    heavy = {"triton", "matplotlib", "pydicom", "tqdm", "pytest", "hypothesis"}
    heavy |= {"timm", "transformers", "monai", "torchvision"}  # imported where a model is of them
    assert heavy.isdisjoint(name.split(".")[0] for name in loaded)


def test_import_is_fast():
    program = (
        "import time, torch; start = time.process_time()\n"  # of this process: others may be busy
        "import sparseattn; print(time.process_time() - start)"
    )
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 0.3:  # another try costs seconds
        seconds.append(float(run(program)))
    assert min(seconds) < 0.3
