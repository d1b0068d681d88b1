"""Each model from the command line: a short run on real samples, its page, and its resumption."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason='needs pip install "sparseattn[train]"')

from sparseattn.cli.main import main
from sparseattn.training.logs import read_csv
from sparseattn.training.loop import load_run, resume, train
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import RECIPES


class Case(NamedTuple):
    """A run that takes seconds. `falls` is a loss and the share of its start that it is under."""

    data: str
    needs: str
    options: str
    config: str
    falls: tuple[str, float]
    metric: str
    pictures: set[str]


CASES = {
    "miram": Case(
        "radiographs",
        "pydicom",
        "--epochs 3 --batch-size 32 --lr 5e-3",
        "patch=8 dim=32 depth=1 heads=2 low_dim=16 low_depth=1 low_heads=1 high_dim=16 "
        "high_depth=1 high_heads=1 features=16 normalise=false",
        ("loss", 0.5),
        "high_error",
        {"low_resolution.png", "high_resolution.png"},
    ),
    "sparsecontrast": Case(
        "digits",
        "timm",
        "--epochs 2 --batch-size 64 --lr 5e-3",
        "patch=2 dim=32 depth=2 heads=2 start=0 predictor_dim=8 projector_dim=16 crop=0.7 "
        "temperature=0.2",
        ("loss", 0.99),
        "view_recall",
        {"kept_tokens.png", "share_of_tokens.png"},
    ),
    "hyspark": Case(
        "brain",
        "nibabel",
        "--epochs 2 --batch-size 16 --lr 1e-2",
        "width=2 heads=2 vit_depth=1 decoder_width=16",
        ("loss", 0.9),
        "error",
        {"three_planes.png"},
    ),
}


SLOW = ("hyspark", "sparsecontrast")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_a_short_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = CASES[name]
    if importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"the run needs {case.needs}")
    out = tmp_path / "run"
    words = ["train", name, "--data", case.data, "--out", str(out), "--device", "cpu"]
    words += [*case.options.split(), "--checkpoint-every", "5", "--log-every", "2"]
    assert main([*words, "--set", *case.config.split()]) == 0
    assert case.metric in capsys.readouterr().out
    rows = read_csv(out / "epochs.csv")
    loss, share = case.falls
    assert rows[-1][loss] < share * rows[0][loss]
    saved = json.loads((out / "evaluation.json").read_text())
    assert rows[-1][case.metric] == pytest.approx(saved[case.metric])
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    found = {path.name for path in (out / "report").glob("*.png")}
    assert found == {*case.pictures, "losses.png"}
    assert page.count("data:image/png;base64,") == len(found)
    recipe, _ = load_run(out)
    model = type(recipe).model_type.from_pretrained(str(out / "model"))
    assert model.config == recipe.config

    stopped = tmp_path / "stopped"
    shutil.copytree(out, stopped)
    shutil.rmtree(sorted((stopped / "checkpoints").iterdir())[-1])
    resume(stopped)
    first, second = (load_file(path / "model" / "model.safetensors") for path in (out, stopped))
    assert all(torch.equal(first[key], second[key]) for key in first)


FINE_TUNED = {  # model, part that is taken over, config
    "miram-classifier": (
        "encoder",
        "patch=2 dim=16 depth=1 heads=2 low_dim=16 low_depth=1 low_heads=1 high_dim=16 "
        "high_depth=1 high_heads=1 features=8",
    ),
    "sparsecontrast-classifier": (
        "backbone",
        "patch=4 dim=16 depth=1 heads=2 start=0 stages=1 predictor_dim=8 projector_dim=8",
    ),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_begins_with_a_run(name: str, tmp_path: Path) -> None:
    """With a rate of nearly 0 the encoder stays that of the run; with none given it is another."""
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    if name.startswith("sparsecontrast"):
        pytest.importorskip("timm")
    part, config = FINE_TUNED[name]
    before = tmp_path / "before"
    words = ["--data", "digits", "--device", "cpu", "--epochs", "1", "--batch-size", "256"]
    model = name.removesuffix("-classifier")
    assert main(["train", model, *words, "--out", str(before), "--set", *config.split()]) == 0
    after = ["train", name, *words, "--lr", "1e-30", "--out"]
    assert main([*after, str(tmp_path / "begun"), "--from", str(before)]) == 0
    assert main([*after, str(tmp_path / "new"), "--set", *config.split()]) == 0
    weights = load_file(before / "model" / "model.safetensors")
    taken = {key: value for key, value in weights.items() if key.startswith(f"{part}.")}
    for run, same in (("begun", True), ("new", False)):
        found = load_file(tmp_path / run / "model" / "model.safetensors")
        assert taken and all(torch.equal(found[key], taken[key]) for key in taken) == same
    result = json.loads((tmp_path / "begun" / "evaluation.json").read_text())
    assert 0 <= result["accuracy"] <= 1
    assert (tmp_path / "begun" / "report" / "test_images.png").is_file()
    resume(tmp_path / "begun")  # of which nothing is left to do
    with pytest.raises(SystemExit):  # not a run of its pre-training
        main([*after, str(tmp_path / "wrong"), "--from", str(tmp_path / "begun")])


def test_a_model_that_begins_with_none_says_so(tmp_path: Path) -> None:
    options = TrainOptions(data="digits", out=str(tmp_path / "run"), begin=str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model": "miram", "options": {"data": "x", "out": "y"}, "config": {}})
    )
    with pytest.raises(ValueError, match="a run of miram; expected none, model=sparseattnnet"):
        train("sparseattnnet", options)


def test_cases_are_recipes() -> None:
    assert set(CASES) <= set(RECIPES)
