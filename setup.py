"""Build script. Everything static is in pyproject.toml; here is the one check that needs Python.

`sparseattn/kernels` and `sparseattn/benchmarks` are symbolic links to the folders of that name at
the root. A checkout without links (git on Windows with `core.symlinks` off, some zip tools) holds
small text files in their place, and the wheel would lack every kernel without a word. So the build
stops and says how to mend it.
"""

from pathlib import Path

from setuptools import setup

for name in ("kernels", "benchmarks"):
    if not (Path(__file__).resolve().parent / "sparseattn" / name).is_dir():
        raise SystemExit(
            f"sparseattn/{name} is not a folder: this checkout was made without symbolic links. "
            "Clone again with `git clone -c core.symlinks=true`, "
            f"or replace sparseattn/{name} by a copy of the folder {name}."
        )

setup()
