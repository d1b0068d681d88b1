"""Volumes of an nnU-Net folder, cut into blocks of one size, with or without labels."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sparseattn.data.images import Volume, load_volume
from sparseattn.data.nnunet import VolumeCase, label_names, nnunet
from sparseattn.data.problems import DataError, OnError, Problems
from sparseattn.data.sources import split_by_group
from sparseattn.data.split import Example, Split

FOREGROUND = 0.1  # of a block's voxels, at least, are above 0
_Loaded = tuple[Tensor, Tensor | None]  # voxels of a case, and its labels


@dataclass(frozen=True)
class _Block:
    """A cube of a case, by its corner."""

    case: VolumeCase
    corner: tuple[int, int, int]


@dataclass(frozen=True)
class _Reading:
    """How volumes are read.

    side       of a block
    spacing    mm of a voxel; 0 leaves them as they are
    window     what becomes 0 to 1, or None
    classes    names of the labels; empty if labels are not read
    """

    side: int
    spacing: float
    window: tuple[float, float] | None
    classes: tuple[str, ...]


def nnunet_blocks(
    source: str,
    *,
    seed: int = 0,
    size: int = 96,
    spacing: float = 0.0,
    window: str | None = None,
    cache: float = 2.0,
    labelled: bool = False,
    on_error: OnError = "raise",
) -> Split:
    """Return blocks [C, size, size, size] of the volumes of imagesTr, in [0, 1].

    Blocks of a case do not overlap and cover it from its first voxel; a volume that is smaller is
    padded with 0. Of blocks with less than a tenth of voxels above 0 there are none, unless a case
    has no others: then it has the fullest. A fifth of the cases is for testing.

    Args:
        source: folder with dataset.json and imagesTr.
        seed: of the split.
        size: side of a block, in voxels.
        spacing: mm that voxels are resampled to along all axes; 0 leaves them as they are.
        window: "LOW,HIGH" becomes 0 to 1, and what is outside is clipped, such as -175,250 for
            Hounsfield units; None takes lowest and highest value of each channel of each case.
            NaN becomes 0.
        cache: GiB of volumes that stay in memory once they are read. Others are read again for
            each of their blocks.
        labelled: add the labels of labelsTr, int [size, size, size], 0 where a volume is padded.
        on_error: "raise" or "skip" cases that cannot be used.

    Raises:
        DataError: a case cannot be used, and on_error is "raise"; or fewer than two are left.
        ValueError: there is no such folder, or an argument is out of range.
    """
    folder, problems = Path(source), Problems(on_error)
    if not folder.is_dir():
        raise ValueError(f"data: source is {source!r}; expected a folder of layout nnunet")
    if size < 1 or min(spacing, cache) < 0:
        raise ValueError(
            f"data: size is {size}, spacing is {spacing} and cache is {cache}; expected 1 or more, "
            "and 0 or more"
        )
    classes = label_names(folder) if labelled else ()
    cases = _Cases(_Reading(size, spacing, _window(window), classes), cache)
    blocks: list[list[_Block]] = []
    for case in nnunet(folder, problems):
        try:
            blocks.append(cases.blocks(case))
        except DataError as error:
            place, _, detail = str(error).partition(": ")
            kind, _, detail = detail.partition(": ")
            problems.add(place, kind, detail)
    if len(blocks) < 2:
        raise DataError(f"{folder}: nothing is left to train or to test on: {problems.counts()}")
    held = split_by_group([of_case[0].case.name for of_case in blocks], seed)
    parts: list[list[_Block]] = [[], []]
    for of_case, away in zip(blocks, held, strict=True):
        parts[away].extend(of_case)
    train, test = (Blocks(part, cases) for part in parts)
    about = f"blocks of {size}³ voxels of the volumes of {folder.name}"
    channels = len(blocks[0][0].case.images)
    return Split(train, test, about, classes, channels, problems)


class Blocks(Dataset[Example]):
    """Blocks of volumes, which are read when they are asked for."""

    def __init__(self, blocks: list[_Block], cases: "_Cases") -> None:
        self.blocks, self.cases = blocks, cases

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Example:
        block, side = self.blocks[index], self.cases.reading.side
        cut = tuple(slice(at, at + side) for at in block.corner)
        voxels, labels = self.cases.load(block.case)
        example = {"images": voxels[(slice(None), *cut)]}
        return example if labels is None else {**example, "labels": labels[cut].long()}


class _Cases:
    """Cases as tensors. Those that are read first stay in memory, up to a number of GiB.

    They are read to list their blocks, before a loader starts its processes, which share them.
    """

    def __init__(self, reading: _Reading, cache: float) -> None:
        self.reading = reading
        self.kept: dict[str, _Loaded] = {}
        self.room = cache * 2**30  # bytes

    def load(self, case: VolumeCase) -> _Loaded:
        """Return the voxels and labels of a case."""
        if case.name in self.kept:
            return self.kept[case.name]
        found = load_case(case, self.reading)
        size = sum(part.nbytes for part in found if part is not None)
        if size <= self.room:
            self.kept[case.name] = found
            self.room -= size
        return found

    def blocks(self, case: VolumeCase) -> list[_Block]:
        """Return the blocks of a case that are not mostly empty, at least one."""
        side, (voxels, _) = self.reading.side, self.load(case)
        full = F.avg_pool3d((voxels > 0).any(0)[None].float(), side)[0]
        chosen = full >= min(FOREGROUND, float(full.max()))
        corners = (chosen.nonzero() * side).tolist()
        return [_Block(case, (x, y, z)) for x, y, z in corners]


def load_case(case: VolumeCase, reading: _Reading) -> _Loaded:
    """Return the channels of a case [C, X, Y, Z] in [0, 1], each axis a multiple of the side.

    And its labels uint8 [X, Y, Z], if they are to be read.

    Raises:
        DataError: a file cannot be read, is not of the shape of the case's first, or holds other
            labels than the classes.
    """
    volumes = [load_volume(path) for path in case.images]
    shape = list(volumes[0].voxels.shape)
    for path, volume in zip(case.images, volumes, strict=True):
        _check_shape(path, volume, shape)
    size = shape
    if reading.spacing:
        pairs = zip(shape, volumes[0].spacing, strict=True)
        size = [max(1, round(count * step / reading.spacing)) for count, step in pairs]
    resampled = [_resampled(volume.voxels, size, "trilinear") for volume in volumes]
    voxels = torch.stack([_scaled(channel, reading.window) for channel in resampled])
    gaps = [-count % reading.side for count in size]
    padding = [amount for gap in reversed(gaps) for amount in (0, gap)]
    labels = None
    if reading.classes:
        found = _resampled(_labels(case, shape, len(reading.classes)), size, "nearest-exact")
        labels = F.pad(found.to(torch.uint8), padding)
    return F.pad(voxels, padding), labels


def _labels(case: VolumeCase, shape: list[int], classes: int) -> Tensor:
    if case.label is None:
        raise DataError(f"{case.images[0]}: missing file: there are no labels of it in labelsTr")
    volume = load_volume(case.label)
    _check_shape(case.label, volume, shape)
    found = volume.voxels
    if not ((found == found.round()) & (found >= 0) & (found < classes)).all():
        raise DataError(
            f"{case.label}: mislabelled file: it holds {float(found.min())} to "
            f"{float(found.max())}; expected whole numbers from 0 to {classes - 1}"
        )
    return found


def _check_shape(path: Path, volume: Volume, shape: list[int]) -> None:
    found = list(volume.voxels.shape)
    if len(found) != 3 or found != shape:
        expected = "three dimensions" if len(found) != 3 else f"that of channel 0, {shape}"
        raise DataError(f"{path}: mislabelled file: it has shape {found}; expected {expected}")


def _resampled(voxels: Tensor, size: list[int], mode: str) -> Tensor:
    if list(voxels.shape) == size:
        return voxels
    return F.interpolate(voxels[None, None], size, mode=mode)[0, 0]


def _scaled(voxels: Tensor, window: tuple[float, float] | None) -> Tensor:
    known = voxels[voxels.isfinite()]
    low, high = window or ((float(known.min()), float(known.max())) if len(known) else (0.0, 1.0))
    return ((voxels - low) / max(high - low, 1e-6)).clamp(0, 1).nan_to_num(0)


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    matched = re.fullmatch(r"\s*([^,]+),([^,]+)", text)
    try:
        low, high = (float(part) for part in matched.groups()) if matched else (0.0, 0.0)
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise ValueError(f"data: window is {text!r}; expected LOW,HIGH, such as -175,250")
    return low, high
