"""Reading radiographs: the file's own steps to display values, and clear refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseattn.data import load_radiograph, sample_radiograph_path, to_square

pydicom = pytest.importorskip("pydicom", reason='needs pip install "sparseattn[test]"')

Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write stored values [height, width] as a DICOM file, with further elements by keyword."""

    def write_file(stored: np.ndarray, bits: int = 12, signed: bool = False, **elements) -> Path:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
        meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset = Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
        dataset.Modality = "CR"
        dataset.Rows, dataset.Columns = stored.shape[:2]
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
        dataset.PixelRepresentation = int(signed)
        for name, value in elements.items():
            setattr(dataset, name, value)
        dataset.PixelData = stored.astype(np.int16 if signed else np.uint16).tobytes()
        path = tmp_path / "picture.dcm"
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write_file


@pytest.mark.parametrize("bits", [10, 12, 15, 16])
def test_spans_zero_to_one_at_any_depth(write: Writer, bits: int) -> None:
    stored = np.linspace(0, 2**bits - 1, 12).round().reshape(3, 4)
    picture = load_radiograph(write(stored, bits=bits))
    assert picture.bits == bits
    assert picture.pixels.dtype == torch.float32
    expected = torch.from_numpy(stored / stored.max()).float()
    torch.testing.assert_close(picture.pixels, expected)


def test_monochrome1_is_turned_round(write: Writer) -> None:
    stored = np.array([[0, 1000], [3000, 4000]])
    bright_high = load_radiograph(write(stored)).pixels
    inverted = load_radiograph(write(stored, PhotometricInterpretation="MONOCHROME1"))
    assert inverted.photometric == "MONOCHROME1"
    torch.testing.assert_close(inverted.pixels, 1 - bright_high)
    assert inverted.pixels[0, 0] == 1


def test_window_applies_to_rescaled_values(write: Writer) -> None:
    stored = np.array([[0, 900, 1024, 1100, 4095]])  # 2 * stored - 2048
    picture = load_radiograph(
        write(stored, RescaleSlope=2, RescaleIntercept=-2048, WindowCenter=0.5, WindowWidth=1001)
    )
    assert picture.pixels[0, 0] == 0
    assert picture.pixels[0, 4] == 1
    middle = torch.tensor([252.0, 500.0, 652.0]) / 1000  # 1800, 2048 and 2200 in [-500, 500]
    torch.testing.assert_close(picture.pixels[0, 1:4], middle, atol=1e-3, rtol=0)


def test_table_replaces_the_window(write: Writer) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table["LUTDescriptor"].VR = "US"
    table.LUTData = [0, 100, 400, 1000]
    table["LUTData"].VR = "US"
    picture = load_radiograph(write(np.array([[0, 1, 2, 3]]), VOILUTSequence=[table]))
    torch.testing.assert_close(picture.pixels, torch.tensor([[0.0, 0.1, 0.4, 1.0]]))


def test_signed_values(write: Writer) -> None:
    picture = load_radiograph(write(np.array([[-100, 0, 100]]), bits=16, signed=True))
    torch.testing.assert_close(picture.pixels, torch.tensor([[0.0, 0.5, 1.0]]))


def test_one_value_everywhere_is_not_nan(write: Writer) -> None:
    assert load_radiograph(write(np.full((2, 2), 7))).pixels.isfinite().all()


def test_refuses_what_is_not_one_grey_frame(write: Writer) -> None:
    with pytest.raises(ValueError, match="has photometric interpretation RGB; expected MONO"):
        load_radiograph(write(np.zeros((2, 2)), PhotometricInterpretation="RGB"))
    with pytest.raises(ValueError, match="has 2 frames; expected 1"):
        load_radiograph(write(np.zeros((2, 2)), NumberOfFrames=2))


def test_refuses_files_that_are_not_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.dcm"):
        load_radiograph(tmp_path / "absent.dcm")
    text = tmp_path / "text.dcm"
    text.write_text("not a picture, but longer than the preamble of 128 bytes" * 5)
    with pytest.raises(ValueError, match="is not a DICOM file"):
        load_radiograph(text)


def test_the_sample_is_a_chest_seen_from_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("data_store", reason="pydicom-data holds the sample")
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("reading the sample reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert sample_radiograph_path().is_file()
    picture = load_radiograph()
    assert (picture.photometric, picture.modality, picture.bits) == ("MONOCHROME1", "CR", 15)
    assert picture.body_part == "chest"
    assert picture.pixels.shape == (1955, 1841)
    assert picture.pixels.aminmax() == (0, 1)
    square = to_square(picture.pixels, 64)
    lung, spine = square[16:24, 13:22].mean(), square[16:24, 30:34].mean()
    assert spine > lung + 0.2, "dense tissue is bright, air is dark"


def test_a_compressed_twin_gives_the_same_picture_or_a_clear_refusal() -> None:
    pytest.importorskip("data_store", reason="pydicom-data holds the sample")
    path = sample_radiograph_path().with_name("RG1_J2KR.dcm")
    try:
        picture = load_radiograph(path)
    except ValueError as error:
        assert "JPEG 2000" in str(error) and "pip install" in str(error)
    else:
        torch.testing.assert_close(picture.pixels, load_radiograph().pixels)


def test_to_square_crops_the_centre_and_averages() -> None:
    wide = torch.arange(32.0).repeat(8, 1)  # columns 12 to 19 are the centre
    small = to_square(wide, 2)
    assert small.shape == (2, 2)
    assert small[0, 0] < 15.5 < small[0, 1]
    torch.testing.assert_close(small.mean(), torch.tensor(15.5))
    torch.testing.assert_close(to_square(wide, 8), wide[:, 12:20])
    with pytest.raises(ValueError, match="expected \\[height, width\\] and a positive size"):
        to_square(wide[None], 4)
