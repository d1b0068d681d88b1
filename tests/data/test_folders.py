"""Folders of pictures: what is read, and what is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseattn.data.images import load_image, resize
from sparseattn.data.problems import DataError, Problems
from sparseattn.data.sources import image_classes
from sparseattn.testing.files import cut, picture, table


def test_scales_of_pictures(tmp_path: Path) -> None:
    grey = picture(tmp_path / "a.png", np.array([[0, 255], [51, 102]], dtype=np.uint8))
    assert torch.allclose(load_image(grey), torch.tensor([[[0, 1], [0.2, 0.4]]]))
    deep = picture(tmp_path / "b.png", np.array([[0, 65535]], dtype=np.uint16))
    assert load_image(deep).tolist() == [[[0.0, 1.0]]]
    colour = picture(tmp_path / "c.jpg", np.full((4, 6, 3), 255, dtype=np.uint8))
    assert load_image(colour).shape == (3, 4, 6) and load_image(colour).min() == 1


def test_resize_cuts_the_centre() -> None:
    image = torch.zeros(1, 4, 8)
    image[:, :, 2:6] = 1
    assert resize(image, 2).min() == 1 and resize(image, 4).shape == (1, 4, 4)


def renamed(path: Path, name: str) -> Path:
    return Path(shutil.move(path, path.with_name(name)))


BAD_PICTURES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "no.png", "missing file"),
    "truncated": (lambda p: cut(picture(p / "a.png", side=64)), "truncated file"),
    "truncated jpg": (lambda p: cut(picture(p / "a.jpg", side=64)), "truncated file"),
    "mislabelled": (
        lambda p: renamed(picture(p / "a.png"), "a.jpg"),
        "mislabelled file.*PNG.*JPEG",
    ),
    "no picture": (lambda p: table(p / "a.png", "text"), "unreadable file"),
    "empty": (lambda p: table(p / "a.png"), "unreadable file"),
    "no dicom": (lambda p: table(p / "a.dcm", "text"), "unreadable file.*not a DICOM"),
    "unknown": (lambda p: table(p / "a.txt", "text"), "unknown kind of file"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_named(case: str, tmp_path: Path) -> None:
    make, says = BAD_PICTURES[case]
    path = make(tmp_path)
    with pytest.raises(DataError, match=says) as error:
        load_image(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_truncated_dicom_is_named(tmp_path: Path) -> None:
    from sparseattn.data import sample_radiograph_path

    pytest.importorskip("data_store", reason='needs pip install "sparseattn[samples]"')
    whole = sample_radiograph_path().read_bytes()
    path = tmp_path / "cut.dcm"
    for size in (len(whole) // 2, 1500, 200):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="unreadable file") as error:
            load_image(path)
        assert str(path) in str(error.value)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of ten pictures, and four files that cannot be used."""
    folder = tmp_path / "data"
    for i in range(10):
        picture(folder / "cat" / f"{i}.png")
        picture(folder / "dog" / "more" / f"{i}.jpg", np.zeros((9, 12, 3), dtype=np.uint8))
    cut(picture(folder / "cat" / "cut.png", side=64))
    renamed(picture(folder / "dog" / "x.png"), "wrong.jpg")
    table(folder / "dog" / "notes.txt", "text")
    picture(folder / "stray.png")
    return folder


def test_bad_files_are_skipped_and_counted(classes: Path) -> None:
    split = image_classes(str(classes), size=8, on_error="skip")
    assert split.classes == ("cat", "dog") and (len(split.train), len(split.test)) == (16, 4)
    kinds = {"truncated file", "mislabelled file", "unknown kind of file"}
    assert set(split.problems.counts()) == kinds and len(split.problems.found) == 4
    example = split.train[0]
    assert example["images"].shape == (split.channels, 8, 8) and int(example["labels"]) in (0, 1)
    shown = {record.path for part in (split.train, split.test) for record, _ in part.examples}
    assert len(shown) == 20
    again = image_classes(str(classes), size=8, on_error="skip")
    assert again.test.examples == split.test.examples


def test_bad_files_are_raised(classes: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.txt: unknown kind of file"):
        image_classes(str(classes))
    (classes / "dog" / "notes.txt").unlink()
    with pytest.raises(DataError, match=r"stray\.png: mislabelled file: stray\.png is no class"):
        image_classes(str(classes))
    (classes / "stray.png").unlink()
    with pytest.raises(DataError, match=r"cut\.png: truncated file"):
        image_classes(str(classes))
    trusting = image_classes(str(classes), check=False)
    with pytest.raises(DataError, match=r"cut\.png|wrong\.jpg"):
        [part[i] for part in (trusting.train, trusting.test) for i in range(len(part))]


def test_a_split_of_folders_is_kept(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in "ab":
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.png")
    split = image_classes(str(tmp_path))
    assert (len(split.train), len(split.test)) == (6, 4)


def test_folders_without_classes_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "only" / "a.png")
    with pytest.raises(DataError, match="it has 1 folders; expected one for each class"):
        image_classes(str(tmp_path))
    with pytest.raises(ValueError, match="layout is 'tree'"):
        image_classes(str(tmp_path), layout="tree")
    with pytest.raises(ValueError, match="table is None"):
        image_classes(str(tmp_path), layout="nih")


def test_a_wrong_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore'; expected raise or skip"):
        Problems("ignore")  # type: ignore[arg-type]
