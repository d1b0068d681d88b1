"""The command `sparseattn demo`: its page, its options, and what it measures with."""

import base64
import importlib.util
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from sparseattn.cli import demo, demo_measure, demo_saliency, demo_systems, demo_vit
from sparseattn.cli.main import main
from sparseattn.training.recipe import RECIPES, recipe_type
from sparseattn.viz.report import Row, Table, rows_table, text_table

EXTRAS = ("pydicom", "data_store", "matplotlib", "tqdm")
needs_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, EXTRAS)), reason='needs pip install "sparseattn[demo]"'
)


class Outcome(NamedTuple):
    code: int
    printed: str
    page: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One quick run on the CPU, with what it printed and wrote."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["demo", "--quick", "--device", "cpu", "--out", str(folder)])
    return Outcome(code, printed.getvalue(), (folder / "index.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Collects the tags of a page with their attributes, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@needs_extra
def test_prints_stages_table_and_page(quick: Outcome) -> None:
    assert quick.code == 0
    assert "RG1_UNCR.dcm: CR chest, 1841 x 1955, 15 bit, MONOCHROME1" in quick.printed
    assert re.search(r"^attention, 256² +256 .*x .*x ", quick.printed, re.MULTILINE)
    assert re.search(r"^attention, 384² +576 ", quick.printed, re.MULTILINE)
    assert re.search(r"^2-block ViT-S/16, 256² +256 ", quick.printed, re.MULTILINE)
    assert re.search(r"^page: .*index\.html$", quick.printed, re.MULTILINE)


@needs_extra
def test_the_predictor_finds_what_is_attended_to(quick: Outcome) -> None:
    line = re.search(r"^saliency: .*$", quick.printed, re.MULTILINE)
    assert line is not None
    share, mass, chance, best = (float(x) for x in re.findall(r"([\d.]+)%", line.group()))
    assert 15 <= share == chance < 16
    assert 1.1 * chance < mass <= best < 100
    assert re.search(r"^salient tokens, 256² +256 +15\.2% ", quick.printed, re.MULTILINE)
    assert "Patches that a predictor keeps" in quick.page


def test_attention_received_is_the_mean_of_the_weights() -> None:
    q, k, v = torch.randn(3, 1, demo_vit.HEADS, 128, 64)
    weights = (q @ k.mT / 8).softmax(-1)
    assert_close(demo_saliency.attention_received((q, k, v), 64), weights.mean((0, 1, 2)))


@needs_extra
def test_all_tiles_kept_equals_dense(quick: Outcome) -> None:
    found = re.search(r"difference (\S+) in the output, (\S+) in the gradients", quick.printed)
    assert found is not None
    assert max(map(float, found.groups())) < 1e-4


@needs_extra
def test_page_is_one_well_formed_file(quick: Outcome) -> None:
    page = Page(quick.page)
    assert page.open == []
    names = {name for name, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object"})
    assert "http" not in quick.page and "url(" not in quick.page
    images = [attributes for name, attributes in page.tags if name == "img"]
    assert len(images) == 7
    for image in images:
        assert image["alt"]
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")


@needs_extra
def test_page_says_that_nothing_was_trained(quick: Outcome) -> None:
    assert "The weights are random" in quick.page
    assert "not a learned predictor" in quick.page
    assert "MKL" in quick.page  # what the CPU's memory column does not see


def test_the_page_of_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One panel, to save time, beside one that cannot be made; all of them are a model each."""
    for module in ("accelerate", "sklearn", "nilearn"):
        pytest.importorskip(module, reason='needs pip install "sparseattn[test]"')
    models = {name for name in RECIPES if not recipe_type(name).begins_with}
    assert set(demo_systems.PANELS) == models
    short = replace(demo_systems.PANELS["sparseattnnet"], options={"epochs": 1, "batch_size": 256})
    panels = {"sparseattnnet": short, "sparsecontrast": demo_systems.PANELS["sparsecontrast"]}
    monkeypatch.setattr(demo, "PANELS", panels)
    monkeypatch.setattr(demo_systems, "PANELS", panels)
    monkeypatch.setitem(sys.modules, "timm", None)  # it cannot be imported
    assert main(["demo", "--systems", "only", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "systems/index.html" in printed and "sparsecontrast is left out: this model" in printed
    page = (tmp_path / "systems" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and Page(page).open == []
    assert "After 6 steps" in page and "not how well it can do it" in page
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "1000"], "--size is 1000; expected a multiple of 128"),
        (["--size", "0"], "--size is 0; expected a multiple of 128"),
        (["--keep", "0"], "--keep is 0.0; expected a share above 0 and at most 1"),
        (["--keep", "1.5"], "--keep is 1.5; expected"),
        (["--keep", "nan"], "--keep is nan; expected"),
        (["--block", "48"], "--block is 48; expected one of 16, 64, 256"),
        (["--depth", "0"], "--depth is 0; expected 1 or more"),
        (["--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--image", "absent.dcm"], "--image is absent.dcm; there is no such file"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--depth", "two"], "invalid int value: 'two'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_options_end_with_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_out_must_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(file)])
    assert ended.value.code == 2
    assert "which is a file; expected a folder" in capsys.readouterr().err


@needs_extra
def test_an_image_that_is_not_dicom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.dcm"
    text.write_text("words " * 100)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--image", str(text), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "is not a DICOM file" in capsys.readouterr().err


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    gone = {"matplotlib", "tqdm"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else real(n))
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "matplotlib, tqdm" in error
    assert 'pip install "sparseattn[demo]"' in error


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nothing"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize("block", [16, 64, 256])
def test_tokens_come_tile_by_tile(block: int) -> None:
    side, patch = int(block**0.5), demo_vit.PATCH
    size = 2 * side * patch
    rows = torch.arange(size)[:, None].expand(size, size)
    columns = rows.T
    for axis in (rows, columns):
        tokens = demo_vit.picture_tokens(axis, block)[0]  # [N, pixels of a patch]
        tiles = tokens.reshape(4, -1) // (side * patch)  # each tile is one block of tokens
        assert (tiles == tiles[:, :1]).all()
        corner = tokens[:, 0] // patch  # patch row (or column) of each token
        grid = demo_vit.to_picture_grid(corner, block)
        expected = torch.arange(2 * side)[:, None].expand(2 * side, 2 * side)
        assert_close(grid, expected if axis is rows else expected.T)


def test_contrast_is_highest_where_the_edge_is() -> None:
    picture = torch.zeros(256, 256)
    picture[:128, 192:] = 1
    contrast = demo_vit.tile_contrast(picture, 64)
    assert contrast.argmax() == 1
    assert_close(contrast.mean(), torch.tensor(0.0))


def test_tile_attention_keeps_its_share_and_its_own_tile() -> None:
    q, k, v = torch.randn(3, 1, demo_vit.HEADS, 640, 64)
    sparse = demo_vit.TileAttention(torch.randn(10), keep=0.2, block=64, masks=[])
    out = sparse(q, k, v)
    (mask,) = sparse.masks
    kept = mask.block_states() != -1
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert set(kept.sum(-1).flatten().tolist()) <= {2, 3}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.to_dense())
    assert_close(out, expected)


def test_queries_look_for_patches_like_their_own() -> None:
    stack = demo_vit.VitStack(depth=1, seed=0)
    same = demo_vit.VitStack(depth=1, seed=0)
    assert all(map(torch.equal, stack.parameters(), same.parameters()))
    q, k, v = stack.blocks[0].heads(torch.randn(1, 32, demo_vit.EMBED))
    assert_close(q, k)
    assert not torch.equal(k, v)


def test_peak_extra_bytes_counts_what_is_held_at_once() -> None:
    def call() -> int:
        first = torch.ones(1_000_000)
        second = torch.ones(500_000)
        del first
        third = torch.ones(1_000_000)
        return len(second) + len(third)

    result, peak = demo_measure.peak_extra_bytes(call)
    assert result == 1_500_000
    assert 6_000_000 <= peak < 6_010_000


def test_relative_error_is_over_all_tensors_together() -> None:
    expected = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    got = [torch.tensor([3.0]), torch.tensor([0.5, 4.0])]
    assert demo_measure.relative_error(got, expected) == pytest.approx(0.1)
    assert demo_measure.largest_difference(got, expected) == 0.5


def test_text_table_lines_up() -> None:
    row = Row("a job", 4096, 3, 200.0, 50.0, 6.0, 3.0, 10_000_000, 20_000_000, 0.1, 0.2, 0, 0)
    groups, names, rule, cells = text_table(rows_table([row])).split("\n")
    assert len(groups) == len(names) == len(rule) == len(cells)
    expected = "a job 4096 100.0% 200 50.0 4.00x 6.0 3.0 2.00x 10 20 0.100 0.200"
    assert " ".join(cells.split()) == expected
    plain = Table([("", "name"), ("", "value")], [["x", "1"]])
    assert text_table(plain) == "name  value\n-----------\nx         1"
