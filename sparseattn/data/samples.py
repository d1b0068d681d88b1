"""Small real data out of installed packages: nothing is downloaded, nothing is copied here."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn.data.images import Volume, load_image, load_volume
from sparseattn.data.split import Examples, Split

HINT = 'pip install "sparseattn[samples]"'
CROP = 32  # side of a nuclei crop, in pixels
_FAR = 12  # a background crop's centre is at least that far from any nucleus' centre
_HELD = 0.25  # share of the rows of the picture of nuclei that is for testing


def digits(seed: int = 0) -> Split:
    """Handwritten digits of scikit-learn: 1797 pictures of 8 x 8 pixels, a quarter for testing.

    The split is always the same; `seed` is not used.
    """
    _need("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    examples = Examples(images=images, labels=labels)
    return Split(
        examples.take(train),
        examples.take(test),
        "handwritten digits of scikit-learn, 8 x 8 pixels, three quarters to train",
        classes=tuple("0123456789"),
    )


def nuclei(seed: int = 0) -> Split:
    """Crops of 32 x 32 pixels with a nucleus in the middle, or with background there.

    They are cut from the labelled fluorescence picture of stardist (512 x 512, 125 nuclei). The
    lower quarter of the rows is for testing; no crop reaches across. Every nucleus gives four
    crops, moved by up to 3 pixels with random numbers of `seed`, and there are as many of
    background, whose centre is at least 12 pixels from that of any nucleus.
    """
    picture, mask = nuclei_picture()
    held = held_rows(picture)
    generator = torch.Generator().manual_seed(seed)
    upper = _crops(picture[: held.start], mask[: held.start], generator)
    lower = _crops(picture[held], mask[held], generator)
    return Split(
        upper,
        lower,
        "crops of the labelled fluorescence nuclei of stardist, 32 x 32 pixels, upper three "
        "quarters of the picture to train",
        classes=("background", "nucleus"),
    )


def held_rows(picture: Tensor) -> slice:
    """Return the rows of the picture of nuclei that are for testing: the lower quarter."""
    return slice(int(picture.shape[0] * (1 - _HELD)), None)


def radiographs(seed: int = 0, side: int = 64) -> Split:
    """Crops of `side` x `side` pixels of the two radiographs of pydicom-data, without labels.

    Chest and hand or foot, each cut to its square and averaged to 512 x 512. The right quarter of
    each is for testing; crops overlap by half and none reaches across. `seed` is not used.
    """
    from sparseattn.data.dicom import load_radiograph, sample_radiograph_path, to_square

    chest = sample_radiograph_path()
    train: list[Tensor] = []
    test: list[Tensor] = []
    for path in (chest, chest.with_name("RG3_UNCR.dcm")):
        pixels = to_square(load_radiograph(path).pixels, 512).clamp(0, 1)
        for part, found in ((pixels[:, :384], train), (pixels[:, 384:], test)):
            if side > part.shape[1]:
                raise ValueError(f"radiographs: side is {side}; expected at most {part.shape[1]}")
            step = max(1, side // 2)
            found.append(part.unfold(0, side, step).unfold(1, side, step).flatten(0, 1))
    return Split(
        Examples(images=torch.cat(train)[:, None]),
        Examples(images=torch.cat(test)[:, None]),
        f"crops of the two radiographs of pydicom-data, {side} x {side} pixels, left three "
        "quarters to train",
    )


def nuclei_picture() -> tuple[Tensor, Tensor]:
    """Return stardist's picture float32 [512, 512], spanning [0, 1], and its mask int [512, 512].

    The mask gives each of the 125 nuclei a number of its own; 0 is background.
    """
    _need("tifffile", "tifffile")
    import tifffile  # type: ignore[import-untyped, unused-ignore]

    folder = package_file("stardist", "data/images/img2d.tif").parent
    picture = torch.from_numpy(tifffile.imread(folder / "img2d.tif").astype("float32"))
    mask = torch.from_numpy(tifffile.imread(folder / "mask2d.tif").astype("int64"))
    low, high = picture.aminmax()
    return (picture - low) / (high - low), mask


def cell() -> Tensor:
    """Return the quantitative phase of one cell, float32 [1, 660, 550] in [0, 1] (scikit-image).

    It was recorded with a digital hologram: an optical path difference image.
    """
    return load_image(package_file("skimage", "data/cell.png"))


def brain() -> dict[str, Volume]:
    """Return the MNI ICBM152 average brain of nilearn, 1 mm: "t1", and maps "grey" and "white".

    Each [197, 233, 189], values 0 to 255.
    """
    stem = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    names = {"t1": "t1", "grey": "gm", "white": "wm"}
    return {
        name: load_volume(package_file("nilearn", stem.format(part)))
        for name, part in names.items()
    }


def brain_blocks(seed: int = 0, side: int = 32, labelled: bool = False) -> Split:
    """Blocks of the MNI average brain, `side` voxels of 2 mm wide; labelled: with their tissue.

    Labels int [side, side, side] are 1 where the map of grey matter is above one half, 2 where
    that of white matter is, and 0 elsewhere. Blocks with less than a tenth of brain are left out.
    One half of the brain is for training, in blocks that begin at every side / 4 voxels, and the
    other, mirrored, for testing, at every side / 2. It is one average of many brains, so the
    halves are nearly the same: results say nothing about other brains. `seed` is not used.
    """
    found = {name: volume.voxels / 255 for name, volume in brain().items()}
    width = found["t1"].shape[0] // 2

    def blocks(half: Tensor, step: int) -> Tensor:
        coarse = F.avg_pool3d(half[None], 2)[0]
        for axis in range(3):
            coarse = coarse.unfold(axis, side, step)
        return coarse.reshape(-1, side, side, side)

    parts = []
    for is_test, step in ((False, side // 4), (True, side // 2)):
        halves = {n: x[-width:].flip(0) if is_test else x[:width] for n, x in found.items()}
        cut = {name: blocks(half, max(1, step)) for name, half in halves.items()}
        full = (cut["t1"] > 0).float().mean((1, 2, 3)) >= 0.1
        tissue = (cut["grey"] > 0.5).long().masked_fill(cut["white"] > 0.5, 2)
        labels = {"labels": tissue[full]} if labelled else {}
        parts.append(Examples(images=cut["t1"][full][:, None], **labels))
    about = f"blocks of {side}^3 voxels of nilearn's MNI brain, one half of it to train"
    classes = ("other", "grey matter", "white matter") if labelled else ()
    return Split(parts[0], parts[1], about, classes)


def _crops(picture: Tensor, mask: Tensor, generator: torch.Generator) -> Examples:
    """Return crops [B, 1, 32, 32] and their labels [B], half of them with a nucleus."""
    height, width = picture.shape
    places = [(mask == i).nonzero().float().mean(0) for i in mask.unique().tolist() if i]
    centres = torch.stack(places).round().long()  # [nuclei, 2]
    moved = centres.repeat(4, 1)
    moved += torch.randint(-3, 4, moved.shape, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([rows, columns], -1).flatten(0, 1)
    far = torch.cdist(grid.float(), centres.float()).min(1).values >= _FAR
    empty = grid[far & (mask.flatten() == 0)]
    half, limit = CROP // 2, torch.tensor([height, width])

    def fits(middles: Tensor) -> Tensor:
        return middles[((middles >= half) & (middles <= limit - half)).all(1)]

    moved, empty = fits(moved), fits(empty)
    empty = empty[torch.randperm(len(empty), generator=generator)[: len(moved)]]
    middles = torch.cat([empty, moved])
    crops = [picture[y - half : y + half, x - half : x + half] for y, x in middles.tolist()]
    labels = (torch.arange(len(middles)) >= len(empty)).long()
    return Examples(images=torch.stack(crops)[:, None], labels=labels)


def package_file(package: str, name: str) -> Path:
    """Return the path of a file that an installed package brings, without importing the package.

    Raises:
        ImportError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / name).is_file():
            return path
    raise ImportError(f"{name} comes with {package}, where it is not to be found; {HINT}")


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"this sample needs {package}; {HINT}")


SAMPLES: dict[str, Callable[[int], Split]] = {"digits": digits, "nuclei": nuclei}
UNLABELLED: dict[str, Callable[[int], Split]] = {
    "radiographs": radiographs,
    "brain": brain_blocks,
}
SEGMENTED: dict[str, Callable[[int], Split]] = {  # with a label a voxel
    "brain": functools.partial(brain_blocks, labelled=True)
}
