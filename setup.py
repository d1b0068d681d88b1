"""Build script. Everything static is in pyproject.toml; here is the one check that needs Python.

`sparseattn/kernels` is a symbolic link to `../kernels`. A checkout without links (git on Windows
with `core.symlinks` off, some zip tools) holds a small text file in its place, and the wheel would
lack every kernel without a word. So the build stops and says how to mend it.
"""

from pathlib import Path

from setuptools import setup

link = Path(__file__).resolve().parent / "sparseattn" / "kernels"
if not link.is_dir():
    raise SystemExit(
        "sparseattn/kernels is not a folder: this checkout was made without symbolic links. "
        "Clone again with `git clone -c core.symlinks=true`, "
        "or replace sparseattn/kernels by a copy of the folder kernels."
    )

setup()
