"""Each model from the command line: a short run on real samples, its page, and its resumption."""

import json
import math
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
from sparseattn.training.metrics import dice_metrics
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import RECIPES, recipe_type


class Case(NamedTuple):
    """A run of seconds. `falls`: the share of its first loss that the last epoch is under."""

    data: str
    needs: str
    options: str
    config: str
    falls: float
    metric: str
    pictures: set[str]


CASES = {
    "miram": Case(
        "radiographs",
        "pydicom",
        "--epochs 3 --batch-size 32 --lr 5e-3",
        "patch=8 dim=32 depth=1 heads=2 low_dim=16 low_depth=1 low_heads=1 high_dim=16 "
        "high_depth=1 high_heads=1 features=16 normalise=false",
        0.5,
        "high_error",
        {"low_resolution.png", "high_resolution.png"},
    ),
    "sparsecontrast": Case(
        "digits",
        "timm",
        "--epochs 6 --batch-size 64 --lr 5e-3",
        "patch=2 dim=32 depth=2 heads=2 predictor_dim=16 crop=0.7 temperature=0.2",
        0.9,
        "view_recall",
        {"kept_tokens.png", "share_of_tokens.png"},
    ),
    "hyspark": Case(
        "brain",
        "nibabel",
        "--epochs 2 --batch-size 16 --lr 1e-2",
        "width=2 heads=2 vit_depth=1 decoder_width=16",
        0.9,
        "error",
        {"three_planes.png"},
    ),
    "adaptor": Case(
        "numbers",
        "sklearn",
        "--epochs 3",
        "dim=64 heads=4 queries=8 project=64",
        0.9,
        "recall_at_5",
        {"similarity_of_images_and_texts.png", "retrieval.png"},
    ),
}


SLOW = ("hyspark", "sparsecontrast", "adaptor", "hyspark-segmenter")
NEEDED = 'needs pip install "sparseattn[test]"'
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_a_short_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = CASES[name]
    pytest.importorskip(case.needs, reason=NEEDED)
    out = tmp_path / "run"
    words = ["train", name, "--data", case.data, "--out", str(out), "--device", "cpu"]
    words += [*case.options.split(), "--checkpoint-every", "5", "--log-every", "1"]
    assert main([*words, "--set", *case.config.split()]) == 0
    assert case.metric in capsys.readouterr().out
    rows, steps = read_csv(out / "epochs.csv"), read_csv(out / "steps.csv")
    assert rows[-1]["loss"] < case.falls * steps[0]["loss"]
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


class FineTuned(NamedTuple):
    """A fine-tuning: the model before and its data, what both need, and what comes out."""

    before: str
    before_data: str
    data: str
    needs: str
    config: str
    metric: str
    picture: str


FINE_TUNED = {
    "miram-classifier": FineTuned(
        "miram", "digits", "digits", "sklearn",
        "patch=2 dim=16 depth=1 heads=2 low_dim=16 low_depth=1 low_heads=1 high_dim=16 "
        "high_depth=1 high_heads=1 features=8",
        "accuracy", "test_images.png",
    ),
    "sparsecontrast-classifier": FineTuned(
        "sparsecontrast", "digits", "digits", "timm",
        "patch=4 dim=16 depth=1 heads=2 start=0 stages=1 predictor_dim=8 projector_dim=8",
        "accuracy", "test_images.png",
    ),
    "adaptor-classifier": FineTuned(
        "adaptor", "numbers", "digits", "sklearn",
        "dim=16 depth=1 heads=2 queries=2 project=8",
        "accuracy", "test_images.png",
    ),
    "hyspark-segmenter": FineTuned(
        "hyspark", "brain", "brain", "nibabel",
        "width=2 heads=2 vit_depth=1 decoder_width=16",
        "dice", "three_planes.png",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FINE_TUNED]
)
def test_fine_tuning_begins_with_a_run(name: str, tmp_path: Path) -> None:
    """With a rate of nearly 0 its parts stay those of the run; with none given they are others."""
    case = FINE_TUNED[name]
    pytest.importorskip(case.needs, reason=NEEDED)
    before, config = tmp_path / "before", ["--set", *case.config.split()]
    words = ["--device", "cpu", "--epochs", "1", "--batch-size", "256"]
    first = ["train", case.before, "--data", case.before_data, "--out", str(before)]
    assert main([*first, *words, *config]) == 0
    after = ["train", name, "--data", case.data, *words, "--lr", "1e-30", "--out"]
    assert main([*after, str(tmp_path / "begun"), "--from", str(before)]) == 0
    assert main([*after, str(tmp_path / "new"), *config]) == 0
    weights = load_file(before / "model" / "model.safetensors")
    parts = recipe_type(name).parts
    # biases begin at 0, and frozen encoders are the same in every run
    taken = {key: value for key, value in weights.items() if key.split(".")[0] in parts}
    drawn = [
        key
        for key, value in taken.items()
        if "_encoder." not in key and value.numel() > 1 and value.std() > 0
    ]
    assert {key.split(".")[0] for key in taken} == set(parts) and drawn
    for run in ("begun", "new"):
        found = load_file(tmp_path / run / "model" / "model.safetensors")
        if run == "begun":
            assert all(torch.equal(found[key], taken[key]) for key in taken)
        else:
            assert not any(
                torch.equal(found[key], taken[key]) for key in drawn if "norm" not in key
            )
    result = json.loads((tmp_path / "begun" / "evaluation.json").read_text())
    assert 0 <= result[case.metric] <= 1
    assert (tmp_path / "begun" / "report" / case.picture).is_file()
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


def test_dice_is_its_formula() -> None:
    """Over all voxels of all volumes; a class that is nowhere is left out."""
    predicted, labels = torch.randint(0, 3, (2, 5, 4, 4, 4), dtype=torch.uint8)
    found = dice_metrics(predicted, labels, 4)
    expected = []
    for number in (1, 2):
        both = ((predicted == number) & (labels == number)).sum()
        sizes = (predicted == number).sum() + (labels == number).sum()
        expected.append(float(2 * both / sizes))
    assert [found["dice_1"], found["dice_2"]] == pytest.approx(expected)
    assert found["dice"] == pytest.approx(sum(expected) / 2) and len(found) == 3
    assert math.isnan(dice_metrics(0 * predicted, 0 * labels, 4)["dice"])
    assert dice_metrics(predicted, 0 * labels, 4)["dice"] == 0


def test_cases_are_recipes() -> None:
    assert set(CASES) <= set(RECIPES)
    assert set(FINE_TUNED) == {name for name in RECIPES if recipe_type(name).begins_with}
