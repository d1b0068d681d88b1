"""Small real data out of installed packages."""

import pytest
import torch

from sparseattn.data.samples import (
    CROP,
    brain,
    cell,
    digits,
    nuclei,
    nuclei_picture,
    package_file,
    radiographs,
)
from sparseattn.data.sources import image_classes, images_alone
from sparseattn.data.split import Examples, count


def test_digits() -> None:
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    split = digits()
    assert (count(split.train), count(split.test)) == (1347, 450) and len(split.classes) == 10
    image = split.test[0]["images"]
    assert image.shape == (1, 8, 8) and image.min() >= 0 and image.max() == 1
    assert split.train.columns["labels"].bincount().min() >= 130


def test_nuclei() -> None:
    pytest.importorskip("tifffile", reason='needs pip install "sparseattn[samples]"')
    picture, mask = nuclei_picture()
    assert picture.shape == mask.shape == (512, 512) and len(mask.unique()) == 126
    assert float((mask > 0).float().mean()) == pytest.approx(0.199, abs=5e-4)
    split = nuclei(seed=3)
    for data in (split.train, split.test):
        images, labels = data.columns["images"], data.columns["labels"]
        assert images.shape[1:] == (1, CROP, CROP) and labels.float().mean() == 0.5
        middle = images[:, 0, 12:20, 12:20].mean((1, 2))
        assert middle[labels == 1].mean() > 2 * middle[labels == 0].mean()
    same, other = nuclei(seed=3), nuclei(seed=4)
    assert torch.equal(same.train.columns["images"], split.train.columns["images"])
    assert not torch.equal(other.train.columns["images"], split.train.columns["images"])


def test_cell_and_brain() -> None:
    for name, extra in (("skimage", "samples"), ("nilearn", "samples"), ("nibabel", "train")):
        pytest.importorskip(name, reason=f'needs pip install "sparseattn[{extra}]"')
    assert cell().shape == (1, 660, 550)
    found = brain()
    assert all(volume.voxels.shape == (197, 233, 189) for volume in found.values())
    assert int((found["grey"].voxels > 127).sum()) == pytest.approx(1.08e6, rel=0.02)
    assert int((found["white"].voxels > 127).sum()) == pytest.approx(0.63e6, rel=0.02)


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(ImportError, match=r"x\.png comes with no_such_package.*\[samples\]"):
        package_file("no_such_package", "x.png")
    with pytest.raises(ImportError, match=r"x\.png comes with sparseattn"):
        package_file("sparseattn", "x.png")


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(ValueError, match="'faces'; expected a folder, or one of digits, nuclei"):
        image_classes("faces")


def test_columns_have_one_length() -> None:
    with pytest.raises(ValueError, match="columns have lengths"):
        Examples(images=torch.zeros(3, 1), labels=torch.zeros(2))


def test_radiographs() -> None:
    pytest.importorskip("pydicom", reason='needs pip install "sparseattn[samples]"')
    split = images_alone("radiographs")
    train, test = (data.columns["images"] for data in (split.train, split.test))
    assert train.shape == (2 * 15 * 11, 1, 64, 64) and test.shape == (2 * 15 * 3, 1, 64, 64)
    assert "labels" not in split.train.columns and train.min() >= 0 and train.max() <= 1
    assert train[:165].mean() != train[165:].mean()  # chest, and the other
    with pytest.raises(ValueError, match="side is 200; expected at most 128"):
        radiographs(side=200)


def test_labels_can_be_left_out() -> None:
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    split = images_alone("digits")
    assert set(split.test[0]) == {"images"} and not split.classes and count(split.test) == 450
    assert torch.equal(split.train[7]["images"], digits().train[7]["images"])
    with pytest.raises(ValueError, match="source is 'faces'"):
        images_alone("faces")


def test_brain_blocks() -> None:
    pytest.importorskip("nibabel", reason='needs pip install "sparseattn[train]"')
    split = images_alone("brain")
    for data in (split.train, split.test):
        blocks = data.columns["images"]
        assert len(blocks) > 30 and blocks.shape[1:] == (1, 32, 32, 32)
        assert blocks.min() >= 0 and 0.5 < blocks.max() <= 1
        assert ((blocks > 0).float().mean((1, 2, 3, 4)) >= 0.1).all()
