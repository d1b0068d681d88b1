"""Volumes of an nnU-Net folder, cut into blocks of one size."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sparseattn.data.images import Volume, load_volume
from sparseattn.data.nnunet import VolumeCase, nnunet
from sparseattn.data.problems import DataError, OnError, Problems
from sparseattn.data.sources import split_by_group
from sparseattn.data.split import Example, Split

FOREGROUND = 0.1  # of a block's voxels, at least, are above 0


@dataclass(frozen=True)
class _Block:
    """A cube of a case, by its corner."""

    case: VolumeCase
    corner: tuple[int, int, int]


@dataclass(frozen=True)
class _Reading:
    """How volumes are read: side of a block, mm of a voxel (0: as they are), and window."""

    side: int
    spacing: float
    window: tuple[float, float] | None


def nnunet_blocks(
    source: str,
    *,
    seed: int = 0,
    size: int = 96,
    spacing: float = 0.0,
    window: str | None = None,
    on_error: OnError = "raise",
) -> Split:
    """Return blocks [C, size, size, size] of the volumes of imagesTr, in [0, 1], without labels.

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
        on_error: "raise" or "skip" cases that cannot be used.

    Raises:
        DataError: a case cannot be used, and on_error is "raise"; or fewer than two are left.
        ValueError: there is no such folder, or the window is not of that form.
    """
    folder, problems = Path(source), Problems(on_error)
    if not folder.is_dir():
        raise ValueError(f"data: source is {source!r}; expected a folder of layout nnunet")
    if size < 1 or spacing < 0:
        raise ValueError(
            f"data: size is {size} and spacing is {spacing}; expected 1 or more, and 0 or more"
        )
    reading = _Reading(size, spacing, _window(window))
    blocks: list[list[_Block]] = []
    for case in nnunet(folder, problems):
        try:
            blocks.append(_blocks(case, reading))
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
    train, test = (Blocks(part, reading) for part in parts)
    about = f"blocks of {size}³ voxels of the volumes of {folder.name}"
    channels = len(blocks[0][0].case.images)
    return Split(train, test, about, channels=channels, problems=problems)


class Blocks(Dataset[Example]):
    """Blocks of volumes, which are read when they are asked for."""

    def __init__(self, blocks: list[_Block], reading: _Reading) -> None:
        self.blocks, self.reading = blocks, reading

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Example:
        block, side = self.blocks[index], self.reading.side
        x, y, z = block.corner
        voxels = load_case(block.case, self.reading)
        return {"images": voxels[:, x : x + side, y : y + side, z : z + side]}


def load_case(case: VolumeCase, reading: _Reading) -> Tensor:
    """Return the channels of a case [C, X, Y, Z] in [0, 1], each axis a multiple of the side.

    Raises:
        DataError: a file cannot be read, or is not of the shape of the case's first.
    """
    volumes = [load_volume(path) for path in case.images]
    shape = list(volumes[0].voxels.shape)
    for path, volume in zip(case.images, volumes, strict=True):
        found = list(volume.voxels.shape)
        if len(found) != 3 or found != shape:
            expected = "three dimensions" if len(found) != 3 else f"that of channel 0, {shape}"
            raise DataError(f"{path}: mislabelled file: it has shape {found}; expected {expected}")
    voxels = torch.stack(
        [_scaled(_resampled(volume, reading.spacing), reading.window) for volume in volumes]
    )
    missing = [-size % reading.side for size in voxels.shape[1:]]
    return F.pad(voxels, [amount for gap in reversed(missing) for amount in (0, gap)])


def _blocks(case: VolumeCase, reading: _Reading) -> list[_Block]:
    """Return the blocks of a case that are not mostly empty, at least one."""
    side = reading.side
    voxels = load_case(case, reading)
    full = F.avg_pool3d((voxels > 0).any(0)[None].float(), side)[0]
    chosen = full >= min(FOREGROUND, float(full.max()))
    corners = (chosen.nonzero() * side).tolist()
    return [_Block(case, (x, y, z)) for x, y, z in corners]


def _resampled(volume: Volume, spacing: float) -> Tensor:
    if not spacing:
        return volume.voxels
    shape = zip(volume.voxels.shape, volume.spacing, strict=True)
    size = [max(1, round(count * step / spacing)) for count, step in shape]
    return F.interpolate(volume.voxels[None, None], size, mode="trilinear")[0, 0]


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
