"""The quickstart of the README runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_quickstart_runs() -> None:
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 1
    names: dict = {}
    exec(compile(programs[0], "README.md", "exec"), names)
    assert names["out"].shape == (1, 6, 1024, 64)
    assert all(torch.isfinite(names[x].grad).all() for x in "qkv")
    # 15 % of 16 blocks, rounded up, is 3
    assert torch.equal(names["mask"].rows.counts(), torch.full((1, 6, 16), 3, dtype=torch.int32))
    lines = [line for line in programs[0].splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10
