"""CBIS-DDSM: mammograms with crops and masks of their findings, whose files are partly swapped."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sparseattn.data.images import load_image
from sparseattn.data.problems import DataError, Problems, read_table
from sparseattn.data.records import Record

_CROP, _MASK = "cropped image file path", "ROI mask file path"
COLUMNS = ("patient_id", "pathology", "image file path", _CROP, _MASK)
PATHOLOGIES = {"BENIGN": 0, "BENIGN_WITHOUT_CALLBACK": 0, "MALIGNANT": 1}


@dataclass(frozen=True)
class Case:
    """One finding: its mammogram, crop and mask, and whether it is malignant.

    swapped: the table had crop and mask the wrong way round.
    """

    mammogram: Path
    crop: Path
    mask: Path
    malignant: int
    patient: str
    swapped: bool


def cbis_ddsm(folder: Path, table: Path, problems: Problems) -> list[Case]:
    """Read a case description table (mass or calc, train or test).

    BENIGN_WITHOUT_CALLBACK counts as benign. In places the table names crop and mask the wrong
    way round; which is which is told by content: a mask has two values at most.
    """
    cases = []
    for place, row in read_table(table, COLUMNS, problems):
        if row["pathology"] not in PATHOLOGIES:
            known = ", ".join(PATHOLOGIES)
            problems.add(
                place, "mislabelled row", f"pathology is {row['pathology']!r}; expected {known}"
            )
            continue
        paths = {name: folder / row[name] for name in ("image file path", _CROP, _MASK)}
        lacking = [str(path) for path in paths.values() if not path.is_file()]
        if lacking:
            problems.add(place, "missing file", f"there is no {', '.join(lacking)}")
            continue
        try:
            masks = [is_mask(paths[_CROP]), is_mask(paths[_MASK])]
        except DataError as error:
            problems.add(place, "unreadable file", str(error))
            continue
        if masks[0] == masks[1]:
            problems.add(
                place,
                "mislabelled row",
                f"of {paths[_CROP]} and {paths[_MASK]} {'both' if masks[0] else 'neither'} is a "
                "mask",
            )
            continue
        crop, mask = paths[_CROP], paths[_MASK]
        if masks[0]:
            crop, mask = mask, crop
        malignant = PATHOLOGIES[row["pathology"]]
        cases.append(
            Case(paths["image file path"], crop, mask, malignant, row["patient_id"], masks[0])
        )
    return cases


def cbis_ddsm_crops(folder: Path, table: Path, problems: Problems) -> list[Record]:
    """Return the crops of such a table as pictures of one finding, malignant."""
    return [
        Record(case.crop, {"malignant": float(case.malignant)}, case.patient)
        for case in cbis_ddsm(folder, table, problems)
    ]


def is_mask(path: Path) -> bool:
    """Say whether a picture is a mask: it has two values at most."""
    pixels = load_image(path)
    low, high = pixels.aminmax()
    return bool(torch.logical_or(pixels == low, pixels == high).all())
