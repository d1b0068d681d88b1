"""The README: its quickstart runs as it stands, and its tables are what was measured."""

import re
from pathlib import Path

import pytest
import torch

from sparseattn.benchmarks import tables

README = Path(__file__).resolve().parents[1] / "README.md"


def test_quickstart_runs() -> None:
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(programs[0], "README.md", "exec"), names)
    assert names["out"].shape == (1, 6, 1024, 64)
    assert all(torch.isfinite(names[x].grad).all() for x in "qkv")
    # 15 % of 16 blocks, rounded up, is 3
    assert torch.equal(names["mask"].rows.counts(), torch.full((1, 6, 16), 3, dtype=torch.int32))
    lines = [line for line in programs[0].splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10


@pytest.mark.parametrize("made", [tables.with_speed, tables.with_claims])
def test_tables_are_made_from_the_committed_results(made) -> None:
    text = README.read_text(encoding="utf-8")
    assert made(text) == text, "run `make tables` and commit what it writes"


def test_pages_are_made_from_the_results_beside_them() -> None:
    for folder in tables.machines():
        page = (folder / "README.md").read_text(encoding="utf-8")
        assert tables.page(folder) == page, "run `make tables` and commit what it writes"
