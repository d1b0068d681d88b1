"""Tables of public radiograph sets: labels, policies, and rows that cannot be used."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseattn.data import chest
from sparseattn.data.cbis_ddsm import cbis_ddsm
from sparseattn.data.images import load_image
from sparseattn.data.problems import DataError, Problems, read_table
from sparseattn.data.samples import package_file
from sparseattn.data.sources import image_classes, images_alone
from sparseattn.testing.files import picture, table

FINDINGS = ",".join(chest.FINDINGS)


def findings(**values: str) -> str:
    return ",".join(values.get(name.replace(" ", "_"), "") for name in chest.FINDINGS)


def chexpert_folder(folder: Path) -> Path:
    for i in range(5):
        picture(folder / "train" / f"patient{i}" / "study1" / "view1_frontal.jpg")
    rows = [
        f"Set-v1/train/patient{i}/study1/view1_frontal.jpg,{findings(**values)}"
        for i, values in enumerate(
            [
                {"Edema": "1.0", "Pneumonia": "0.0"},
                {"Edema": "-1.0", "Pneumonia": "-1.0"},
                {},
                {"Edema": "2.0"},
                {"Edema": "0.0"},
                {"Edema": "1.0"},  # its picture is missing
            ]
        )
    ]
    return table(folder / "train.csv", f"Path,{FINDINGS}", *rows)


@pytest.mark.parametrize(
    ("uncertain", "edema", "pneumonia"),
    [("usual", 1, 0), ("zero", 0, 0), ("one", 1, 1), ("ignore", math.nan, math.nan)],
)
def test_chexpert(tmp_path: Path, uncertain: str, edema: float, pneumonia: float) -> None:
    problems = Problems("skip")
    records = chest.chexpert(tmp_path, chexpert_folder(tmp_path), problems, uncertain)
    assert problems.counts() == {"mislabelled row": 1, "missing file": 1}
    assert [record.group for record in records] == [f"patient{i}" for i in (0, 1, 2, 4)]
    assert [record.labels["Edema"] for record in records][2:] == [0, 0]
    found = [records[1].labels[name] for name in ("Edema", "Pneumonia")]
    np.testing.assert_array_equal(found, [edema, pneumonia])


def test_chexpert_trains_on_one_finding(tmp_path: Path) -> None:
    path = str(chexpert_folder(tmp_path))
    split = image_classes(
        str(tmp_path), layout="chexpert", table=path, target="Edema", on_error="skip", size=8,
        uncertain="ignore",
    )  # fmt: skip
    assert split.classes == ("no Edema", "Edema") and len(split.train) + len(split.test) == 3
    assert split.about.endswith("; 1 with an uncertain Edema are left out")
    with pytest.raises(ValueError, match="target is 'Cold'; expected one of Atelectasis"):
        image_classes(str(tmp_path), layout="chexpert", table=path, target="Cold", on_error="skip")


def test_mimic(tmp_path: Path) -> None:
    home = tmp_path / "files" / "p10" / "p10000032"
    for name in ("a", "b"):
        picture(home / "s50" / f"{name}.jpg")
    table(home / "s50.txt", "FINDINGS: clear")
    rows = [f"10000032,50,{findings(Edema='1.0')}", f"10000032,51,{findings()}"]
    path = table(tmp_path / "chexpert.csv", f"subject_id,study_id,{FINDINGS}", *rows)
    problems = Problems("skip")
    records = chest.mimic_cxr(tmp_path, path, problems)
    assert [record.path.name for record in records] == ["a.jpg", "b.jpg"]
    assert records[0].labels["Edema"] == 1 and records[0].text.startswith("FINDINGS")
    assert problems.counts() == {"missing file": 1}


def test_nih(tmp_path: Path) -> None:
    picture(tmp_path / "images_001" / "images" / "1.png")
    picture(tmp_path / "2.png")
    path = table(
        tmp_path / "t.csv",
        "Image Index,Finding Labels,Patient ID",
        "1.png,Mass|Edema,7",
        "2.png,No Finding,8",
        "3.png,Mass,9",
    )
    problems = Problems("skip")
    records = chest.nih(tmp_path, path, problems)
    assert [record.labels for record in records] == [
        {"Edema": 1, "Mass": 1},
        {"Edema": 0, "Mass": 0},
    ]
    assert problems.counts() == {"missing file": 1}


def test_rsna(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.dcm").write_bytes(b"x")
    path = table(
        tmp_path / "t.csv",
        "patientId,x,y,width,height,Target",
        "a,1,2,3,4,1",
        "a,5,6,7,8,1",
        "b,,,,,0",
        "c,,,,,1",
        "c,1,2,3,4,1",
    )
    problems = Problems("skip")
    first, second = chest.rsna(tmp_path, path, problems)
    assert first.boxes == ((1, 2, 3, 4), (5, 6, 7, 8)) and second.labels == {"Pneumonia": 0}
    assert problems.counts() == {"mislabelled row": 1}


@pytest.mark.parametrize("none", ["-1", " -1"])
def test_siim(tmp_path: Path, none: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}.dcm").write_bytes(b"x")
    path = table(
        tmp_path / "t.csv", "ImageId, EncodedPixels", f"a,{none}", "b,1 2 3 4", "b,0 5", "c,x"
    )
    problems = Problems("skip")
    first, second = chest.siim(tmp_path, path, problems)
    assert first.labels == {"Pneumothorax": 0} and first.runs == ()
    assert second.labels == {"Pneumothorax": 1} and len(second.runs) == 2
    assert problems.counts() == {"malformed row": 1}


def test_runs_are_counted_down_the_columns() -> None:
    mask = chest.decode_runs("1 2 3 1", 3, 4)
    assert mask.T.flatten().nonzero().flatten().tolist() == [1, 2, 6]
    with pytest.raises(DataError, match="do not fit"):
        chest.decode_runs("1 2 3", 3, 4)
    with pytest.raises(DataError, match="do not fit"):
        chest.decode_runs("10 5", 3, 4)


def test_a_real_table_is_read(tmp_path: Path) -> None:
    """SIIM's as torchxrayvision brings it, without the pictures: each of them is missing."""
    if find_spec("torchxrayvision") is None:
        pytest.skip('needs pip install "sparseattn[samples]"')
    path = package_file("torchxrayvision", "data/siim-pneumothorax-train-rle.csv.gz")
    problems = Problems("skip")
    assert chest.siim(tmp_path, path, problems) == []
    assert problems.counts() == {"missing file": 12047}
    runs = [row["EncodedPixels"] for _, row in read_table(path, ("EncodedPixels",), problems)]
    assert len(runs) == 12954 and runs.count("-1") == 9378
    masks = [chest.decode_runs(run) for run in runs[:200] if run != "-1"]
    assert len(masks) > 20 and all(0 < mask.float().mean() < 0.3 for mask in masks)


BAD_TABLES = {
    "missing": (None, "missing table"),
    "empty": (b"", "has no column a, b; its columns are none"),
    "columns": (b"a,c\n1,2\n", "malformed table: it has no column b"),
    "binary": (bytes(range(128, 256)), "it is not CSV text"),
    "quote": (b'a,b\n"1,2\n', "it is not CSV text"),
    "cells": (b"a,b\n1,2\n1\n", r"bad\.csv:3: malformed row: it has 1 cells, the head 2"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_named(case: str, tmp_path: Path) -> None:
    content, says = BAD_TABLES[case]
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        list(read_table(path, ("a", "b"), Problems()))
    assert str(error.value).startswith(str(path))


def test_swapped_crops_and_masks_are_told_apart(tmp_path: Path) -> None:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:9, 5:9] = 255
    for i in range(4):
        picture(tmp_path / str(i) / "full.png", side=20)
        picture(tmp_path / str(i) / "crop.png", side=8)
        picture(tmp_path / str(i) / "mask.png", mask)
    picture(tmp_path / "2" / "mask.png", side=8)  # not a mask at all
    head = "patient_id,pathology,image file path,cropped image file path,ROI mask file path"
    path = table(
        tmp_path / "mass_case_description_train_set.csv",
        head,
        "P0,MALIGNANT,0/full.png,0/crop.png,0/mask.png",
        'P1,BENIGN_WITHOUT_CALLBACK,1/full.png,1/mask.png,"1/crop.png\n"',
        "P2,BENIGN,2/full.png,2/crop.png,2/mask.png",
        "P3,UNKNOWN,3/full.png,3/crop.png,3/mask.png",
        "P4,BENIGN,4/full.png,4/crop.png,4/mask.png",
    )
    problems = Problems("skip")
    first, second = cbis_ddsm(tmp_path, path, problems)
    assert not first.swapped and first.malignant == 1
    assert second.swapped and second.malignant == 0
    assert second.crop.name == "crop.png" and second.mask.name == "mask.png"
    assert problems.counts() == {"mislabelled row": 2, "missing file": 1}
    with pytest.raises(DataError, match="neither is a mask"):
        cbis_ddsm(tmp_path, path, Problems())
    options = {"layout": "cbis-ddsm", "table": str(path), "size": 8, "on_error": "skip"}
    split = image_classes(str(tmp_path), **options)
    assert split.classes == ("no malignant", "malignant")
    crops = {int(part[0]["labels"]): part[0]["images"] for part in (split.train, split.test)}
    assert sorted(crops) == [0, 1]
    assert torch.equal(crops[0], load_image(tmp_path / "1" / "crop.png"))
    assert len(images_alone(str(tmp_path), **options).train) == 1
