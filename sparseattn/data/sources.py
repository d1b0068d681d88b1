"""From the word after --data to examples: a sample of an installed package, or a folder.

Layouts of a folder:

folders      one folder a class, named as the class, with PNG, JPG or DICOM files below it; with
             folders `train` and `test` on top if the split is given
chexpert, nih, rsna, siim, mimic-cxr
             pictures and a table (`sparseattn.data.chest`); one finding, the target, is told
cbis-ddsm    crops of findings and a case description table (`sparseattn.data.cbis_ddsm`):
             malignant or not
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparseattn.data.cbis_ddsm import cbis_ddsm_crops
from sparseattn.data.chest import LAYOUTS, Reader, Uncertain
from sparseattn.data.images import DICOM, PICTURES, load_image, resize
from sparseattn.data.problems import DataError, OnError, Problems
from sparseattn.data.records import Record
from sparseattn.data.samples import SAMPLES, UNLABELLED
from sparseattn.data.split import Example, Split, count

TEST_SHARE = 0.2  # of the groups, where the folder does not say
TABLES: dict[str, Reader] = {**LAYOUTS, "cbis-ddsm": cbis_ddsm_crops}
_Labelled = tuple[Record, int]


def image_classes(
    source: str,
    *,
    seed: int = 0,
    layout: str = "folders",
    table: str | None = None,
    target: str | None = None,
    uncertain: Uncertain = "usual",
    size: int = 64,
    on_error: OnError = "raise",
    check: bool = True,
) -> Split:
    """Return images with class labels.

    Args:
        source: name of a sample, or a folder.
        seed: of the split, where the folder has none: a fifth of the patients is for testing.
        layout: of the folder.
        table: CSV file of a layout that has one.
        target: finding that is to be told; not needed where the table has one.
        uncertain: what an uncertain finding becomes (CheXpert, MIMIC-CXR-JPG).
        size: pictures are cut to a square and resized to [size, size].
        on_error: "raise" or "skip" what cannot be used.
        check: read every file once, so that bad ones are found now and not in an epoch.

    Raises:
        DataError: a file or row cannot be used, and on_error is "raise"; or nothing is left.
        ValueError: there is no such sample, folder, layout or target.
    """
    if source in SAMPLES:
        return SAMPLES[source](seed)
    folder, problems, unsure = Path(source), Problems(on_error), 0
    if not folder.is_dir():
        raise ValueError(
            f"data: source is {source!r}; expected a folder, or one of {', '.join(SAMPLES)}"
        )
    if layout == "folders":
        classes, parts = _class_folders(folder, problems)
    elif layout in TABLES:
        if table is None:
            raise ValueError(f"data: table is None; expected a CSV file, layout={layout!r}")
        reader: Any = TABLES[layout]
        if layout in ("chexpert", "mimic-cxr"):
            reader = functools.partial(reader, uncertain=uncertain)
        records = reader(folder, Path(table), problems)
        classes, labelled = _told(records, target)
        parts, unsure = [labelled], len(records) - len(labelled)
    else:
        known = ", ".join(["folders", *TABLES])
        raise ValueError(f"data: layout is {layout!r}; expected one of {known}")
    if check:
        parts = [_readable(part, problems) for part in parts]
    if len(parts) == 1:
        parts = _split(parts[0], seed)
    if not all(parts):
        raise DataError(f"{folder}: nothing is left to train or to test on: {problems.counts()}")
    channels = len(load_image(parts[0][0][0].path))
    train, test = (Pictures(part, size, channels) for part in parts)
    about = f"pictures of {folder.name} ({layout}), {size} x {size} pixels"
    about += f"; {unsure} with an uncertain {target} are left out" if unsure else ""
    return Split(train, test, about, classes, channels, problems)


def images_alone(source: str, *, seed: int = 0, **options: Any) -> Split:
    """Return images without labels: a sample that has none, or what ``image_classes`` returns.

    Raises:
        DataError, ValueError: as ``image_classes``.
    """
    if source in UNLABELLED:
        return UNLABELLED[source](seed)
    found = image_classes(source, seed=seed, **options)
    train, test = _WithoutLabels(found.train), _WithoutLabels(found.test)
    return dataclasses.replace(found, train=train, test=test, classes=())


class _WithoutLabels(Dataset[Example]):
    """Examples of which the images alone are shown."""

    def __init__(self, examples: Dataset[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return count(self.examples)

    def __getitem__(self, index: int) -> Example:
        return {"images": self.examples[index]["images"]}


class Pictures(Dataset[Example]):
    """Pictures read when they are asked for, resized, with as many channels as the first."""

    def __init__(self, examples: list[_Labelled], size: int, channels: int) -> None:
        self.examples, self.size, self.channels = examples, size, channels

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        record, label = self.examples[index]
        image = _with_channels(resize(load_image(record.path), self.size), self.channels)
        return {"images": image, "labels": torch.tensor(label)}


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if len(image) == channels:
        return image
    return image.mean(0, keepdim=True) if channels == 1 else image.expand(channels, -1, -1)


def _class_folders(
    folder: Path, problems: Problems
) -> tuple[tuple[str, ...], list[list[_Labelled]]]:
    """Return the classes, and the pictures: one part, or two if there are train and test."""
    tops = [folder / "train", folder / "test"]
    tops = tops if all(top.is_dir() for top in tops) else [folder]
    classes = sorted(path.name for path in tops[0].iterdir() if _is_shown(path) and path.is_dir())
    if len(classes) < 2:
        raise DataError(
            f"{tops[0]}: it has {len(classes)} folders; expected one for each class, two or more"
        )
    parts = []
    for top in tops:
        part = []
        for path in sorted(path for path in top.rglob("*") if path.is_file() and _is_shown(path)):
            name = path.relative_to(top).parts[0]
            if path.suffix.lower() not in (*PICTURES, *DICOM):
                problems.add(path, "unknown kind of file", "it is no PNG, JPG or DICOM by its name")
            elif name not in classes:
                problems.add(path, "mislabelled file", f"{name} is no class of {tops[0]}")
            else:
                part.append((Record(path, group=str(path)), classes.index(name)))
        parts.append(part)
    return tuple(classes), parts


def _told(records: list[Record], target: str | None) -> tuple[tuple[str, ...], list[_Labelled]]:
    """Return the two classes of a finding, and the pictures in which it is certain."""
    findings = sorted({name for record in records for name in record.labels})
    if target is None and len(findings) == 1:
        target = findings[0]
    if target not in findings:
        raise ValueError(
            f"data: target is {target!r}; expected one of {', '.join(findings) or 'none'}"
        )
    certain = [record for record in records if not math.isnan(record.labels[target])]
    return (f"no {target}", target), [(record, int(record.labels[target])) for record in certain]


def _readable(part: list[_Labelled], problems: Problems) -> list[_Labelled]:
    kept = []
    for record, label in part:
        try:
            load_image(record.path)
        except DataError as error:
            kind, _, detail = str(error).removeprefix(f"{record.path}: ").partition(": ")
            problems.add(record.path, kind, detail)
            continue
        kept.append((record, label))
    return kept


def _split(part: list[_Labelled], seed: int) -> list[list[_Labelled]]:
    """Put a fifth of the groups aside."""
    held = split_by_group([record.group for record, _ in part], seed)
    return [[x for x, away in zip(part, held, strict=True) if away == side] for side in (0, 1)]


def split_by_group(groups: Sequence[str], seed: int) -> list[bool]:
    """Say which examples are for testing: those of a fifth of the groups, at least one."""
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {names[i] for i in order[: max(1, round(TEST_SHARE * len(names)))]}
    return [group in held for group in groups]


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")
