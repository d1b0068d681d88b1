"""Tables of the public chest radiograph sets: CheXpert, NIH, RSNA, SIIM and MIMIC-CXR-JPG.

Every function takes the folder of the set, the path of its table, and the `Problems` to report to,
and returns a Record a picture. A file that is named and not there is a problem.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparseattn.data.problems import DataError, Problems, read_table
from sparseattn.data.records import Record

Uncertain = Literal["usual", "zero", "one", "ignore"]
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_USUALLY_ONE = ("Atelectasis", "Edema", "Pleural Effusion")
_NIH_ALL = "No Finding"


def chexpert(
    folder: Path, table: Path, problems: Problems, uncertain: Uncertain = "usual"
) -> list[Record]:
    """Read CheXpert's train.csv or valid.csv.

    A finding is 1, 0, -1 (uncertain) or blank (not mentioned: 0). uncertain: "usual" makes
    Atelectasis, Edema and Pleural Effusion 1 and all others 0, "zero" and "one" make all that,
    "ignore" makes them NaN.
    """
    records = []
    for place, row in read_table(table, ("Path", *FINDINGS), problems):
        labels = _findings(row, place, problems, uncertain)
        # the table's paths begin with the name of the set, whatever the folder is called
        below = Path(*Path(row["Path"]).parts[1:])
        if labels is not None:
            patient = next((part for part in below.parts if part.startswith("patient")), "")
            records.append(Record(folder / below, labels, patient))
    return _present(records, problems)


def mimic_cxr(
    folder: Path, table: Path, problems: Problems, uncertain: Uncertain = "usual"
) -> list[Record]:
    """Read MIMIC-CXR-JPG's table of findings; pictures are those of files/pNN/pNNNNNNNN/sNNNNNNNN.

    A study's labels are those of all its pictures. Reports beside the pictures' folders
    (files/.../sNNNNNNNN.txt) become the text.
    """
    records = []
    for place, row in read_table(table, ("subject_id", "study_id", *FINDINGS), problems):
        labels = _findings(row, place, problems, uncertain)
        subject, study = f"p{row['subject_id']}", f"s{row['study_id']}"
        home = folder / "files" / subject[:3] / subject / study
        pictures = sorted(home.glob("*.jpg"))
        if not pictures:
            problems.add(place, "missing file", f"there is no picture in {home}")
        report = home.with_suffix(".txt")
        text = ""
        if report.is_file():
            try:
                text = report.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                problems.add(report, "malformed file", f"it is not text: {error}")
        if labels is not None:
            records += [Record(path, labels, subject, text=text) for path in pictures]
    return records


def nih(folder: Path, table: Path, problems: Problems) -> list[Record]:
    """Read NIH's Data_Entry table; the pictures lie below the folder, at any depth.

    Findings of a picture are joined with "|"; every finding of the table is a label of all.
    """
    rows = list(read_table(table, ("Image Index", "Finding Labels", "Patient ID"), problems))
    named = [row["Finding Labels"].split("|") for _, row in rows]
    findings = sorted({name for names in named for name in names} - {_NIH_ALL, ""})
    places = {path.name: path for path in folder.rglob("*.png")}
    records = []
    for (_, row), names in zip(rows, named, strict=True):
        path = places.get(row["Image Index"], folder / row["Image Index"])
        labels = {name: float(name in names) for name in findings}
        records.append(Record(path, labels, row["Patient ID"]))
    return _present(records, problems)


def rsna(folder: Path, table: Path, problems: Problems) -> list[Record]:
    """Read RSNA's stage-2 labels: one row a box, pictures are <patientId>.dcm.

    Rows of a patient that contradict each other are a problem; the patient is left out.
    """
    found: dict[str, Record] = {}
    bad = set()
    for place, row in read_table(
        table, ("patientId", "x", "y", "width", "height", "Target"), problems
    ):
        patient, target = row["patientId"], row["Target"]
        box = tuple(_number(row[name]) for name in ("x", "y", "width", "height"))
        known = found.get(patient)
        if target not in ("0", "1") or (target == "1") != all(map(math.isfinite, box)):
            problems.add(place, "mislabelled row", f"Target is {target!r} with box {box}")
            bad.add(patient)
        elif known is not None and known.labels["Pneumonia"] != float(target):
            problems.add(place, "mislabelled row", f"patient {patient} has Target 0 and 1")
            bad.add(patient)
        else:
            before = known or Record(
                folder / f"{patient}.dcm", {"Pneumonia": float(target)}, patient
            )
            added = (box,) if target == "1" else ()
            found[patient] = replace(before, boxes=(*before.boxes, *added))  # type: ignore[arg-type]
    return _present([r for patient, r in found.items() if patient not in bad], problems)


def siim(folder: Path, table: Path, problems: Problems) -> list[Record]:
    """Read SIIM's table of run-length encoded masks; the pictures lie below the folder.

    "-1" means no pneumothorax. Some copies of the table have blanks around names and cells.
    """
    places = {path.stem: path for path in folder.rglob("*.dcm")}
    found: dict[str, Record] = {}
    for place, row in read_table(table, ("ImageId", "EncodedPixels"), problems):
        name, runs = row["ImageId"], row["EncodedPixels"]
        if not all(word.lstrip("-").isdigit() for word in runs.split()) or not runs:
            problems.add(place, "malformed row", f"EncodedPixels of {name} are no run lengths")
            continue
        before = found.get(name, Record(places.get(name, folder / f"{name}.dcm"), {}, name))
        masks = before.runs if runs == "-1" else (*before.runs, runs)
        found[name] = replace(before, labels={"Pneumothorax": float(bool(masks))}, runs=masks)
    return _present(list(found.values()), problems)


def decode_runs(runs: str, height: int = 1024, width: int = 1024) -> Tensor:
    """Return the mask, bool [height, width], of SIIM's runs: pairs of a gap and a length.

    A gap is counted from the end of the run before; pixels are counted down the columns.

    Raises:
        DataError: the runs leave the picture, or come without their lengths.
    """
    numbers = [int(word) for word in runs.split()]
    if len(numbers) % 2 or min(numbers, default=0) < 0 or sum(numbers) > height * width:
        raise DataError(f"runs of {len(numbers)} numbers do not fit {height} x {width} pixels")
    mask = torch.zeros(height * width, dtype=torch.bool)
    at = 0
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        mask[at + gap : at + gap + length] = True
        at += gap + length
    return mask.view(width, height).T


def _findings(
    row: Mapping[str, str], place: str, problems: Problems, uncertain: Uncertain
) -> dict[str, float] | None:
    labels = {}
    for name in FINDINGS:
        value = _number(row[name]) if row[name] else 0.0
        if value not in (-1.0, 0.0, 1.0):
            problems.add(place, "mislabelled row", f"{name} is {row[name]!r}; expected 1, 0 or -1")
            return None
        labels[name] = _decide(name, uncertain) if value == -1 else value
    return labels


def _decide(name: str, uncertain: Uncertain) -> float:
    if uncertain == "usual":
        return float(name in _USUALLY_ONE)
    return {"zero": 0.0, "one": 1.0, "ignore": math.nan}[uncertain]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _present(records: list[Record], problems: Problems) -> list[Record]:
    kept = []
    for record in records:
        if record.path.is_file():
            kept.append(record)
        else:
            problems.add(record.path, "missing file", "the table names it, and it is not there")
    return kept


Reader = Callable[[Path, Path, Problems], list[Record]]
LAYOUTS: dict[str, Reader] = {
    "chexpert": chexpert,
    "mimic-cxr": mimic_cxr,
    "nih": nih,
    "rsna": rsna,
    "siim": siim,
}
