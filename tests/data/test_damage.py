"""Files with a few wrong bytes: read, or refused by name, and never another error."""

import gzip
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sparseattn.data.images import load_image, load_volume
from sparseattn.data.problems import DataError, Problems, read_table
from sparseattn.testing.files import picture

nibabel = pytest.importorskip("nibabel", reason='needs pip install "sparseattn[train]"')


def damaged(content: bytes, head: int, count: int = 150) -> Iterator[bytes]:
    """Yield copies with one to four bytes of the head changed; some are cut, too."""
    rng = random.Random(0)
    for _ in range(count):
        copy = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            copy[rng.randrange(min(head, len(copy)))] = rng.choice((0, 1, 34, 44, 255))
        yield bytes(copy[: rng.randrange(len(copy))] if rng.random() < 0.1 else copy)


def dicom(path: Path) -> bytes:
    pydicom_data = pytest.importorskip(
        "pydicom.data", reason='needs pip install "sparseattn[demo]"'
    )
    return Path(pydicom_data.get_testdata_file("CT_small.dcm", download=False)).read_bytes()


def nifti(path: Path) -> bytes:
    values = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path.read_bytes()


def rows(path: Path) -> bytes:
    text = b'a,b\n1,2\n"x",5\n' * 20
    return gzip.compress(text) if path.suffix == ".gz" else text


def read_rows(path: Path) -> object:
    return list(read_table(path, ("a", "b"), Problems()))


KINDS: dict[str, tuple[Callable, int, Callable]] = {  # name: whole file, size of its head, reader
    "x.dcm": (dicom, 3000, load_image),
    "x.nii": (nifti, 400, load_volume),
    "x.nii.gz": (nifti, 400, load_volume),
    "x.png": (lambda path: picture(path).read_bytes(), 300, load_image),
    "x.jpg": (lambda path: picture(path).read_bytes(), 700, load_image),
    "x.csv": (rows, 300, read_rows),
    "x.csv.gz": (rows, 300, read_rows),
}


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    make, head, read = KINDS[name]
    path, refused = tmp_path / name, 0
    whole = make(path)
    path.write_bytes(whole)
    read(path)
    for content in damaged(whole, head):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except DataError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 10
