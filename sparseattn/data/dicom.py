"""One DICOM radiograph as a picture: float32 in [0, 1], dense tissue bright.

Stored values go through the file's own steps, in the order of the DICOM standard: modality
(rescale slope and intercept, or a table), then value of interest (window, or a table), then the
grey scale's direction (MONOCHROME1 stores bright as low; it is turned round).
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_NAME = "RG1_UNCR.dcm"
_GREY = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True, eq=False)
class Radiograph:
    """A grey picture and the few facts about the file worth printing (no patient data).

    pixels       [height, width] float32 in [0, 1]; 1 is the brightest value of the picture
    photometric  MONOCHROME1 or MONOCHROME2, as stored; the pixels are MONOCHROME2 already
    bits         bits stored per pixel
    """

    pixels: Tensor
    photometric: str
    bits: int
    modality: str
    body_part: str
    file_name: str


def load_radiograph(path: str | Path | None = None) -> Radiograph:
    """Read a DICOM file with one grey frame; without a path, the sample of `pydicom-data`.

    Args:
        path: file to read. None takes the chest radiograph RG1, which pydicom-data installs
            (no network).

    Returns:
        Radiograph with pixels [height, width], scaled so that they span [0, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not DICOM, is truncated or damaged, has no picture, has colour or
            several frames, or is compressed in a way that no installed decoder reads.
        ImportError: pydicom is not installed.
    """
    pydicom = _import_pydicom()
    path = sample_radiograph_path() if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_radiograph: there is no file {path}")
    try:
        return _read(pydicom.dcmread(path), path)
    except pydicom.errors.InvalidDicomError as error:
        raise ValueError(f"load_radiograph: {path} is not a DICOM file") from error
    except EOFError as error:
        raise ValueError(f"load_radiograph: {path} is truncated: {error}") from error
    except (_Refused, OSError):
        raise
    except Exception as error:  # values are parsed when they are asked for, and may be anything
        raise ValueError(f"load_radiograph: {path} is damaged: {error}") from error


class _Refused(ValueError):
    """A file that is whole, and not what is read here."""


def _read(dataset: Any, path: Path) -> Radiograph:
    photometric = _check_grey_frame(dataset, path)
    pixels = torch.from_numpy(_display_values(dataset, path))
    low, high = pixels.aminmax()
    pixels = (pixels - low) / (high - low).clamp_min(torch.finfo(pixels.dtype).tiny)
    if photometric == "MONOCHROME1":
        pixels = 1 - pixels
    return Radiograph(
        pixels=pixels,
        photometric=photometric,
        bits=int(dataset.BitsStored),
        modality=str(dataset.get("Modality", "unknown")),
        body_part=str(dataset.get("BodyPartExamined", "unknown")).lower(),
        file_name=path.name,
    )


def sample_radiograph_path() -> Path:
    """Return where pydicom-data keeps the chest radiograph RG1; never uses the network.

    Raises:
        ImportError: pydicom or pydicom-data is not installed.
    """
    _import_pydicom()
    from pydicom.data import get_testdata_file

    path = get_testdata_file(SAMPLE_NAME, download=False)
    if path is None:
        raise ImportError(
            f"{SAMPLE_NAME} comes with pydicom-data, which is not installed; "
            'pip install "sparseattn[demo]"'
        )
    return Path(str(path))


def to_square(pixels: Tensor, size: int) -> Tensor:
    """Cut the centre square out of `pixels` [height, width] and resize it to [size, size].

    Shrinking averages (no aliasing); growing is bilinear and adds no detail.
    """
    if pixels.ndim != 2 or size < 1:
        raise ValueError(
            f"to_square: pixels has shape {list(pixels.shape)} and size is {size}; "
            "expected [height, width] and a positive size"
        )
    height, width = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    resized = F.interpolate(
        square[None, None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0, 0]


def _import_pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.errors
    except ImportError as error:
        raise ImportError('reading DICOM needs pydicom; pip install "sparseattn[demo]"') from error
    return pydicom


def _check_grey_frame(dataset: Any, path: Path) -> str:
    """Refuse what is not one grey frame; return the photometric interpretation."""
    if "PixelData" not in dataset:
        raise _Refused(f"load_radiograph: {path} holds no picture; expected PixelData")
    photometric = str(dataset.get("PhotometricInterpretation", "missing"))
    if photometric not in _GREY:
        raise _Refused(
            f"load_radiograph: {path} has photometric interpretation {photometric}; "
            f"expected {' or '.join(_GREY)}"
        )
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise _Refused(f"load_radiograph: {path} has {frames} frames; expected 1")
    return photometric


def _display_values(dataset: Any, path: Path) -> Any:
    """Return the values after modality and value-of-interest steps, float32 [height, width]."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        stored = dataset.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise _Refused(
            f"load_radiograph: {path} is stored as {syntax}, which no installed decoder reads; "
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        ) from error
    return apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype("float32")
