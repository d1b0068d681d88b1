"""Image files as tensors: PNG, JPG and DICOM in [0, 1], NIfTI volumes in their own units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn.data.dicom import load_radiograph
from sparseattn.data.problems import DataError

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
DICOM = (".dcm", ".dicom")
VOLUMES = (".nii", ".nii.gz")


def load_image(path: Path) -> Tensor:
    """Read one picture as float32 [1 or 3, H, W] in [0, 1]; by the end of its name.

    PNG and JPG keep their scale (8 bit / 255, 16 bit / 65535), DICOM goes through
    `load_radiograph`.

    Raises:
        DataError: the file is missing, empty, truncated, or not what its name says.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing file: there is no such file")
    suffix = path.suffix.lower()
    if suffix in DICOM:
        try:
            return load_radiograph(path).pixels[None]
        except ValueError as error:
            raise DataError(f"{path}: unreadable file: {error}") from error
    if suffix not in PICTURES:
        kinds = ", ".join([*PICTURES, *DICOM])
        raise DataError(f"{path}: unknown kind of file; expected one of {kinds}")
    return _load_picture(path, PICTURES[suffix])


def _load_picture(path: Path, expected: str) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.format != expected:
                raise DataError(
                    f"{path}: mislabelled file: it holds {picture.format}, its name says {expected}"
                )
            if picture.mode in ("I;16", "I;16B", "I"):
                grey = torch.from_numpy(np.asarray(picture).astype("float32"))[None] / 65535
                return grey
            mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
            pixels = np.asarray(picture.convert(mode)).astype("float32") / 255
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: unreadable file: it is no picture") from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: truncated file: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: unreadable file: {error}") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)


def resize(image: Tensor, size: int) -> Tensor:
    """Cut the centre square out of an image [C, H, W] and resize it to [C, size, size]."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    if side == size:
        return square[0]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume in RAS orientation: voxels [X, Y, Z] or [X, Y, Z, T], spacing in mm."""

    voxels: Tensor
    spacing: tuple[float, float, float]


def load_volume(path: Path) -> Volume:
    """Read a NIfTI file, in the closest orientation to RAS; values after the file's own scaling.

    Raises:
        DataError: the file is missing, truncated, not NIfTI, or has fewer than three dimensions.
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError('NIfTI needs nibabel; pip install "sparseattn[train]"') from error
    if not path.is_file():
        raise DataError(f"{path}: missing file: there is no such file")
    if not path.name.lower().endswith(VOLUMES):
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(VOLUMES)}")
    try:
        image: Any = nibabel.load(path)
        if len(image.shape) < 3:
            raise DataError(
                f"{path}: unreadable file: it has shape {list(image.shape)}; "
                "expected three dimensions or more"
            )
        image = nibabel.as_closest_canonical(image)
        voxels = torch.from_numpy(image.get_fdata(dtype="float32"))
    except DataError:
        raise
    except (ImageFileError, HeaderDataError) as error:
        raise DataError(f"{path}: unreadable file: it is no NIfTI file: {error}") from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: truncated file: {error}") from error
    except Exception as error:  # a damaged header or stream may end in any error
        raise DataError(f"{path}: unreadable file: it is damaged: {error}") from error
    spacing = tuple(float(step) for step in image.header.get_zooms()[:3])
    return Volume(voxels, spacing)  # type: ignore[arg-type]
