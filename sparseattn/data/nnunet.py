"""The folder layout of nnU-Net: dataset.json, imagesTr/case_0000.nii.gz, labelsTr/case.nii.gz."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseattn.data.problems import DataError, Problems


@dataclass(frozen=True)
class VolumeCase:
    """One case: a file for each channel, in the order of the channels, and its labels if any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


def nnunet(folder: Path, problems: Problems, part: str = "Tr") -> list[VolumeCase]:
    """List the cases of imagesTr (or imagesTs, with part="Ts"), sorted by name.

    Both forms of dataset.json are read: `channel_names` and `file_ending` (version 2), and
    `modality` (version 1). A case without all channels, or without labels where labelsTr exists,
    is a problem.

    Raises:
        DataError: dataset.json is missing, is not JSON, or does not name the channels.
    """
    description = _description(folder / "dataset.json")
    names = description.get("channel_names", description.get("modality"))
    if not isinstance(names, dict) or not names or set(names) != set(map(str, range(len(names)))):
        raise DataError(
            f"{folder / 'dataset.json'}: malformed file: its channel_names or modality is {names}; "
            'expected a name for each of "0", "1", ...'
        )
    ending = str(description.get("file_ending", ".nii.gz"))
    channels = list(range(len(names)))
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    if not images.is_dir():
        raise DataError(f"{images}: missing folder: there is no such folder")
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir()):
        if path.name.startswith("."):
            continue
        matched = pattern.fullmatch(path.name)
        if matched is None:
            problems.add(path, "mislabelled file", f"expected a name like case_0000{ending}")
            continue
        found.setdefault(matched[1], {})[int(matched[2])] = path
    cases = []
    for name, files in found.items():
        if sorted(files) != channels:
            problems.add(
                images / name, "missing file", f"it has channels {sorted(files)} of {channels}"
            )
            continue
        label = labels / f"{name}{ending}"
        if labels.is_dir() and not label.is_file():
            problems.add(label, "missing file", f"there are no labels of {name}")
            continue
        ordered = tuple(files[channel] for channel in channels)
        cases.append(VolumeCase(name, ordered, label if label.is_file() else None))
    return cases


def label_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the labels 0, 1, ... of dataset.json, of either version.

    Raises:
        DataError: it names none, or regions, an ignore label or numbers that are not 0, 1, ...
    """
    path = folder / "dataset.json"
    found = _description(path).get("labels")
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: malformed file: it has no labels")
    pairs = found.items()
    if all(isinstance(name, str) for name in found.values()):  # version 1: number to name
        pairs = {name: number for number, name in found.items()}.items()
    numbered = {str(number): name for name, number in pairs}
    names = [numbered.get(str(number)) for number in range(len(found))]
    if None in names or "ignore" in names:
        raise DataError(
            f"{path}: malformed file: its labels are {found}; expected a name for each of "
            "0, 1, ..., without regions and without an ignore label"
        )
    return tuple(map(str, names))


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: missing file: there is no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: malformed file: it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: malformed file: expected an object")
    return found
