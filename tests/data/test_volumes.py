"""NIfTI volumes, nnU-Net's folders, and the text of reports."""

import io
import json
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseattn.data import volumes
from sparseattn.data.images import Volume, load_volume
from sparseattn.data.nnunet import nnunet
from sparseattn.data.problems import DataError, Problems
from sparseattn.data.reports import sample_reports, sections, xml_reports
from sparseattn.data.volumes import nnunet_blocks
from sparseattn.testing.files import cut, table

nibabel = pytest.importorskip("nibabel", reason='needs pip install "sparseattn[train]"')


def volume(path: Path, shape: tuple[int, ...] = (4, 5, 6), flip: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    affine = np.diag([-2.0 if flip else 2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def test_volumes_come_in_ras(tmp_path: Path) -> None:
    straight = load_volume(volume(tmp_path / "a.nii.gz"))
    assert straight.spacing == (2, 3, 4) and straight.voxels[1, 0, 0] == 30
    flipped = load_volume(volume(tmp_path / "b.nii", flip=True))
    assert torch.equal(flipped.voxels, straight.voxels.flip(0))


@pytest.mark.parametrize(
    "name", ["anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"]
)
def test_nibabels_own_files_are_read(name: str) -> None:
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    found = load_volume(path)
    assert found.voxels.dim() >= 3 and torch.isfinite(found.voxels).all()


BAD_VOLUMES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "a.nii", "missing file"),
    "cut": (lambda p: cut(volume(p / "a.nii", (30, 30, 30))), "truncated file"),
    "cut gz": (lambda p: cut(volume(p / "a.nii.gz", (30, 30, 30))), "truncated file"),
    "text": (lambda p: table(p / "a.nii", "text" * 200), "unreadable file"),
    "text gz": (lambda p: table(p / "a.nii.gz", "text" * 200), "(unreadable|truncated) file"),
    "flat": (lambda p: volume(p / "a.nii", (4, 5)), r"has shape \[4, 5\]"),
    "name": (lambda p: table(p / "a.mha", "x"), "unknown kind of file"),
}


@pytest.mark.parametrize("case", BAD_VOLUMES)
def test_a_bad_volume_is_named(case: str, tmp_path: Path) -> None:
    make, says = BAD_VOLUMES[case]
    path = make(tmp_path)
    with pytest.raises(DataError, match=says) as error:
        load_volume(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet(tmp_path: Path, version: int) -> None:
    names = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii"}
    old = {"modality": {"0": "T1", "1": "T2"}}
    (tmp_path / "dataset.json").write_text(json.dumps(names if version == 2 else old))
    ending = ".nii" if version == 2 else ".nii.gz"
    for case, channels in (("x", (0, 1)), ("y_1", (0, 1)), ("z", (0,))):
        for channel in channels:
            volume(tmp_path / "imagesTr" / f"{case}_{channel:04}{ending}")
    volume(tmp_path / "labelsTr" / f"x{ending}")
    table(tmp_path / "imagesTr" / "notes.txt", "text")
    problems = Problems("skip")
    (case,) = nnunet(tmp_path, problems)
    assert case.name == "x" and [p.name for p in case.images] == [
        f"x_0000{ending}",
        f"x_0001{ending}",
    ]
    assert problems.counts() == {"mislabelled file": 1, "missing file": 2}
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: malformed file: it is not JSON"):
        nnunet(tmp_path, problems)


LABELS = {"background": 0, "liver": 1, "tumour": 2}


def nnunet_folder(
    folder: Path, labels: dict[str, np.ndarray] | None = None, **cases: np.ndarray
) -> Path:
    """Write volumes of one channel, voxels of 2 x 3 x 4 mm."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"channel_names": {"0": "CT"}, "labels": LABELS}
    (folder / "dataset.json").write_text(json.dumps(description))
    files = {f"imagesTr/{name}_0000.nii.gz": values for name, values in cases.items()}
    files |= {f"labelsTr/{name}.nii.gz": values for name, values in (labels or {}).items()}
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0])), path)
    return folder


def test_blocks_of_nnunet_volumes(tmp_path: Path) -> None:
    """A corner with foreground, a case of padding, NaN, values outside of the window."""
    corner = np.full((20, 16, 33), -1000, dtype=np.float32)
    corner[16:, :8, :16] = 50  # 512 of the 4096 voxels of block (1, 0, 0)
    corner[0, 0, 0] = 900  # too little of block (0, 0, 0)
    small = np.full((8, 8, 8), 300, dtype=np.float32)
    small[0] = np.nan
    folder = nnunet_folder(tmp_path, corner=corner, small=small)
    split = nnunet_blocks(str(folder), size=16, window="0,200")
    assert len(split.train) == len(split.test) == 1 and split.channels == 1
    found = [part[0]["images"] for part in (split.train, split.test)]
    assert all(block.shape == (1, 16, 16, 16) for block in found)
    by_case = {
        part.blocks[0].case.name: block[0]
        for part, block in zip((split.train, split.test), found, strict=True)
    }
    assert by_case["corner"][:4, :8].unique().tolist() == [0.25]
    assert by_case["corner"].count_nonzero() == 4 * 8 * 16
    assert by_case["small"].count_nonzero() == 7 * 8 * 8 and by_case["small"].max() == 1
    whole = nnunet_blocks(str(folder), size=16, spacing=4.0)  # 10 x 12 x 33 and 4 x 6 x 8 voxels
    assert len(whole.train) + len(whole.test) == 2
    filled = [bool(part[0]["images"].any()) for part in (whole.train, whole.test)]
    assert sorted(filled) == [False, True]  # a case of one value has no range


def test_bad_nnunet_volumes_are_named(tmp_path: Path) -> None:
    block = np.ones((8, 8, 8), dtype=np.float32)
    folder = nnunet_folder(tmp_path, a=block, b=block, flat=block[0], cut=np.tile(block, (4, 4, 4)))
    cut(folder / "imagesTr" / "cut_0000.nii.gz")
    split = nnunet_blocks(str(folder), size=8, on_error="skip")
    assert len(split.train) == len(split.test) == 1
    kinds = sorted((Path(place).name, kind) for place, kind, _ in split.problems.found)
    assert kinds == [
        ("cut_0000.nii.gz", "truncated file"),
        ("flat_0000.nii.gz", "unreadable file"),
    ]
    with pytest.raises(DataError, match=r"cut_0000\.nii\.gz: truncated file"):
        nnunet_blocks(str(folder), size=8)
    for window in ("1", "2,1", "a,b", "nan,1"):
        with pytest.raises(ValueError, match=r"window is .*; expected LOW,HIGH"):
            nnunet_blocks(str(folder), size=8, window=window)
    with pytest.raises(ValueError, match="expected a folder of layout nnunet"):
        nnunet_blocks(str(folder / "nothing"))


def test_labels_of_nnunet_volumes(tmp_path: Path) -> None:
    """They are cut, padded and resampled with their volume; a label a voxel."""
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, 3, (12, 8, 10), dtype=np.uint8) for name in "ab"}
    images = {name: values.astype(np.float32) / 2 for name, values in labels.items()}
    folder = nnunet_folder(tmp_path, labels, **images)
    split = nnunet_blocks(str(folder), size=8, labelled=True, window="0,1")
    assert split.classes == ("background", "liver", "tumour")
    for part in (split.train, split.test):
        for example in (part[i] for i in range(len(part))):
            assert example["labels"].shape == (8, 8, 8) and example["labels"].dtype == torch.int64
            assert torch.equal(2 * example["images"][0], example["labels"].float())
    half = nnunet_blocks(str(folder), size=8, labelled=True, spacing=4.0)  # 6 x 6 x 10 voxels
    assert {tuple(half.train[i]["labels"].shape) for i in range(len(half.train))} == {(8, 8, 8)}
    old = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}
    (folder / "dataset.json").write_text(json.dumps(old))
    assert nnunet_blocks(str(folder), size=8, labelled=True).classes == split.classes


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({}, r"a_0000\.nii\.gz: missing file: there are no labels"),
        ({"a": np.ones((8, 8, 4))}, r"labelsTr.a\.nii\.gz: mislabelled file: it has shape"),
        ({"a": np.full((8, 8, 8), 3.0)}, "it holds 3.0 to 3.0; expected whole numbers from 0 to 2"),
        ({"a": np.full((8, 8, 8), 0.5)}, "it holds 0.5 to 0.5; expected whole numbers"),
        ({"a": np.full((8, 8, 8), np.nan)}, "expected whole numbers from 0 to 2"),
    ],
)
def test_bad_labels_are_named(labels: dict, says: str, tmp_path: Path) -> None:
    block = np.ones((8, 8, 8), dtype=np.float32)
    folder = nnunet_folder(tmp_path, {**labels, "b": block} if labels else {}, a=block, b=block)
    with pytest.raises(DataError, match=says):
        nnunet_blocks(str(folder), size=8, labelled=True)


@pytest.mark.parametrize(
    "labels", [None, {}, [1], {"a": 0, "b": 2}, {"a": 0, "b": [1, 2]}, {"a": 0, "ignore": 1}]
)
def test_names_of_labels_that_cannot_be_used_are_refused(labels: object, tmp_path: Path) -> None:
    block = np.ones((8, 8, 8), dtype=np.float32)
    folder = nnunet_folder(tmp_path, a=block, b=block)
    description = {"channel_names": {"0": "CT"}, "labels": labels}
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"dataset\.json: malformed file: its? .*labels"):
        nnunet_blocks(str(folder), size=8, labelled=True)


def test_volumes_are_read_once_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).random((2, 16, 16, 16), dtype=np.float32)
    folder = nnunet_folder(tmp_path, a=values[0], b=values[1])
    read: list[str] = []

    def counted(path: Path) -> Volume:
        read.append(path.name)
        return load_volume(path)

    monkeypatch.setattr(volumes, "load_volume", counted)
    found = []
    for cache in (1.0, 16**3 * 4 / 2**30, 0.0):  # GiB: all, one volume, none
        split = nnunet_blocks(str(folder), size=8, cache=cache)
        listed = len(read)
        blocks = [part[i]["images"] for part in (split.train, split.test) for i in range(8)]
        found.append((listed, len(read) - listed, torch.stack(blocks)))
        read.clear()
    assert [counts[:2] for counts in found] == [(2, 0), (2, 8), (2, 16)]
    assert all(torch.equal(found[0][2], other[2]) for other in found[1:])


def test_hyspark_trains_on_nnunet_volumes(tmp_path: Path) -> None:
    """And its encoder is fine-tuned on their labels."""
    pytest.importorskip("accelerate", reason='needs pip install "sparseattn[train]"')
    from sparseattn.cli.main import main

    values = np.random.default_rng(0).random((3, 32, 32, 32), dtype=np.float32)
    cases = dict(zip("abc", values, strict=True))
    labels = {name: (x > 0.5).astype(np.uint8) for name, x in cases.items()}
    folder = nnunet_folder(tmp_path / "data", labels, **cases)
    for model, more in (
        ("hyspark", ["--set", "width=2", "heads=2", "vit_depth=1", "decoder_width=16"]),
        ("hyspark-segmenter", ["--from", str(tmp_path / "hyspark")]),
    ):
        words = ["train", model, "--data", str(folder), "--layout", "nnunet", "--out"]
        words += [str(tmp_path / model), "--image-size", "32", "--epochs", "1", "--device", "cpu"]
        assert main([*words, *more]) == 0
        assert (tmp_path / model / "report" / "three_planes.png").is_file()
    result = json.loads((tmp_path / "hyspark-segmenter" / "evaluation.json").read_text())
    assert 0 <= result["dice_1"] <= 1


def test_sections_of_reports() -> None:
    text = "EXAM: chest\nFINDINGS:  the heart\nis normal\n IMPRESSION: no disease: none\n"
    assert sections(text) == {
        "EXAM": "chest",
        "FINDINGS": "the heart is normal",
        "IMPRESSION": "no disease: none",
    }


def test_reports_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "r.tgz"
    good = b'<r><AbstractText Label="FINDINGS">clear\n lungs</AbstractText></r>'
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("a.xml", good), ("b.xml", b"<r>"), ("c.xml", b"<r></r>")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    problems = Problems("skip")
    assert xml_reports(path, problems) == [{"FINDINGS": "clear lungs"}]
    assert problems.counts() == {"malformed file": 1, "missing text": 1}
    with pytest.raises(DataError, match="truncated file"):
        xml_reports(cut(path), Problems("skip"))


def test_reports_of_the_package_are_read_where_they_are() -> None:
    if find_spec("torchxrayvision") is None:
        pytest.skip('needs pip install "sparseattn[samples]"')
    problems = Problems("skip")
    reports = sample_reports(problems)
    assert len(reports) == 3927 and problems.counts() == {"missing text": 28}
