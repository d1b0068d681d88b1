"""The programs of README.md beyond its quickstart, and of docs/layers.md, run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def programs_in(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(program: str, name: str) -> dict:
    names: dict = {}
    exec(compile(program, name, "exec"), names)
    return names


def test_a_model_is_converted(capsys: pytest.CaptureFixture) -> None:
    model = run(programs_in("README.md")[1], "README.md")["model"]
    assert "swapped 12 of 12 attention modules" in capsys.readouterr().out
    assert all(block.attn.method.keep == 0.25 for block in model.blocks)


def test_a_layer_attends() -> None:
    names = run(programs_in("README.md")[2], "README.md")
    assert names["out"].shape == (1, 2048, 384) and names["layer"].method.fell_back is None


@pytest.mark.parametrize("program", programs_in("docs/layers.md"))
def test_programs_of_the_layers_page_run(program: str) -> None:
    run(program, "docs/layers.md")


def test_an_adaptor_trains_with_encoders_of_ones_own() -> None:
    (program,) = programs_in("docs/models.md")
    model = run(program, "docs/models.md")["model"]
    assert model.trainable_share() < 0.1 and model.log_scale.grad is not None
