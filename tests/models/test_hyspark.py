"""HySparK: the sparse encoder against dense x mask, counts of parameters, and the mended faults."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseattn.claims.encoder import SMALL, equality
from sparseattn.models import HySparK, HySparKConfig, HySparKSegmenter
from sparseattn.models.hyspark import from_cells, to_cells
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.testing.tolerance import require


def make(kind=HySparK, **changes):
    return kind(dataclasses.replace(SMALL, **changes))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_released_counts_of_parameters() -> None:
    """Convolutions 6.47 M, ViT 5.41 M, densify 6.0 M, decoder 85.6 M, 103.5 M in all."""
    with torch.device("meta"):
        released, lean = HySparK(HySparKConfig(released=True)), HySparK()
    encoder = released.encoder
    convolutions = count(encoder.stem) + count(encoder.stages) + count(encoder.widen)
    vit = count(encoder) - convolutions + released.vit_token.numel()
    filled = count(released.project) + count(released.tokens)
    found = [convolutions, vit, filled, count(released.decoder), count(released)]
    assert [round(n / 1e6, 2) for n in found[:2]] == [6.47, 5.41]
    assert [round(n / 1e6, 1) for n in found[2:]] == [6.0, 85.6, 103.5]
    # what never learns there
    assert round((count(released) - count(lean)) / 1e6, 1) == 47.9


def test_the_encoder_is_the_dense_one_times_the_mask() -> None:
    """Volumes with different masks; forward, and the gradient of the images."""
    require(*equality(SMALL))


def test_hidden_cells_have_no_gradient() -> None:
    encoder = make().encoder
    images = torch.rand(2, 1, 32, 32, 32, requires_grad=True)
    mask = PatchMask.from_scores(torch.rand(2, 2, 2, 2), 4)
    assert not torch.equal(mask.table[0] >= 0, mask.table[1] >= 0)
    sum(
        grid.features.square().sum() for grid in encoder(PatchGrid.from_dense(images, mask))
    ).backward()
    shown = F.interpolate((mask.table >= 0)[:, None].float(), scale_factor=16).bool()
    assert bool(images.grad[shown].any()) and not images.grad[~shown].any()


def test_every_volume_keeps_its_share_and_does_not_see_its_batch_mates() -> None:
    model = make(image_size=48, mask=0.75).eval()
    images = torch.rand(3, 1, 48, 48, 48)
    output = model(images)
    active = output.mask.table >= 0
    assert active.flatten(1).sum(1).tolist() == [7, 7, 7]  # 0.25 * 27, rounded
    assert len({tuple(row) for row in active.flatten(1).tolist()}) > 1
    others = model(torch.cat([images[:1], 100 * torch.rand(2, 1, 48, 48, 48)]), output.mask)
    assert torch.equal(others.reconstruction[0], output.reconstruction[0])


def test_hidden_voxels_do_not_reach_the_reconstruction() -> None:
    model = make().eval()
    images = torch.rand(2, 1, 32, 32, 32)
    first = model(images)
    shown = F.interpolate((first.mask.table >= 0)[:, None].float(), scale_factor=16).bool()
    hidden = torch.where(shown, images, torch.full_like(images, torch.nan))
    assert torch.equal(model(hidden, first.mask).reconstruction, first.reconstruction)


@pytest.mark.parametrize("full_skip", [False, True])
def test_every_parameter_learns(full_skip: bool) -> None:
    model = make(full_skip=full_skip)
    model(torch.rand(2, 1, 32, 32, 32)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    encoder = [p for p in model.encoder.parameters()]
    assert all(bool(p.grad.any()) for p in [*encoder, *model.tokens])


def test_released_mode_computes_the_same() -> None:
    lean, released = make().eval(), make(released=True).eval()
    missing = released.load_state_dict(lean.state_dict(), strict=False)
    assert not missing.unexpected_keys
    dead = {"tokens.4", "project.4.weight", "project.4.bias", "vit_token", "encoder.positions"}
    assert {key for key in missing.missing_keys if not key.startswith("decoder.unused")} == dead
    images = torch.rand(1, 1, 32, 32, 32)
    first = lean(images)
    assert torch.equal(released(images, first.mask).reconstruction, first.reconstruction)


def test_the_loss_is_its_formula() -> None:
    model = make().eval()
    images = torch.rand(2, 1, 32, 32, 32)
    output = model(images)
    losses = []
    for b in range(2):
        errors = []
        for cell in (output.mask.table[b] < 0).nonzero().tolist():
            where = tuple(slice(16 * i, 16 * i + 16) for i in cell)
            truth, found = images[b, 0][where], output.reconstruction[b, 0][where]
            truth = (truth - truth.mean()) / (truth.var() + 1e-6).sqrt()
            errors.append((found - truth).square().mean())
        assert len(errors) == 4
        losses.append(torch.stack(errors).mean())
    torch.testing.assert_close(output.errors, torch.stack(losses))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_cells_are_put_back_and_reconstructions_paste_what_was_seen() -> None:
    images = torch.rand(1, 1, 32, 32, 32)
    assert torch.equal(from_cells(to_cells(images), 2, 1), images)
    model = make().eval()
    mask = PatchMask.from_scores(torch.rand(1, 2, 2, 2), 4)
    found = model.reconstruct(images, mask)
    shown = F.interpolate((mask.table >= 0)[:, None].float(), scale_factor=16).bool()
    assert torch.equal(found.filled[shown], images[shown])
    assert torch.equal(found.seen, images * shown)
    assert not torch.allclose(found.filled[~shown], images[~shown])


def test_masks_come_from_the_seed() -> None:
    model, images = make().eval(), torch.rand(1, 1, 32, 32, 32)
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(model(images).mask.table)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def brain() -> tuple[Tensor, Tensor]:
    """Crops [4, 1, 32, 32, 32] of the MNI brain at 2 mm, and which voxels are grey matter."""
    pytest.importorskip("nibabel", reason='needs pip install "sparseattn[train]"')
    from sparseattn.data.samples import brain as load

    found = []
    for name in ("t1", "grey"):
        middle = (load()[name].voxels / 255)[32:160:2, 40:168:2, 48:112:2]
        blocks = middle.unfold(0, 32, 32).unfold(1, 32, 32)
        found.append(blocks.permute(0, 1, 3, 4, 2).reshape(-1, 1, 32, 32, 32).float())
    return found[0], (found[1][:, 0] > 0.5).long()


def train(model: nn.Module, *given: Tensor, steps: int) -> list[float]:
    """Minimise the loss of one batch; return it at each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(*given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_reconstruction_loss_falls_on_a_brain() -> None:
    torch.manual_seed(0)
    images, _ = brain()
    losses = train(make(decoder_width=32), images[:2], steps=24)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.slow
def test_the_segmenter_starts_from_the_encoder_and_learns() -> None:
    torch.manual_seed(0)
    images, labels = brain()
    model = make(classes=2)
    segmenter = HySparKSegmenter.from_pretrained_model(model)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, segmenter.encoder.state_dict()[name])
    output = segmenter(images[:2], labels[:2])
    assert output.logits.shape == (2, 2, 32, 32, 32)
    shares = output.logits.softmax(1)
    overlaps = []
    for c in range(2):
        truth = (labels[:2] == c).float()
        both = 2 * (shares[:, c] * truth).sum()
        overlaps.append(both / (shares[:, c].sum() + truth.sum()))
    torch.testing.assert_close(output.dice_loss, 1 - torch.stack(overlaps).mean())
    entropy = F.cross_entropy(output.logits, labels[:2])
    torch.testing.assert_close(output.loss, entropy + output.dice_loss)
    losses = train(segmenter, images[:2], labels[:2], steps=12)
    assert all(p.grad is not None for p in segmenter.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_saves_its_config_and_its_weights(tmp_path) -> None:
    model = make(full_skip=True).eval()
    model.save_pretrained(tmp_path)
    loaded = HySparK.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config
    images = torch.rand(1, 1, 32, 32, 32)
    first = model(images)
    assert torch.equal(loaded(images, first.mask).reconstruction, first.reconstruction)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 40}, "image_size is 40; expected a multiple of 16"),
        ({"heads": 5}, "heads is 5; expected a divisor of 12"),
        ({"decoder_width": 24}, "decoder_width is 24; expected a multiple of 16"),
        ({"mask": 1.0}, "mask is 1.0"),
        ({"mask": 0.99}, "mask is 0.99; .* cells=8"),
        ({"released": True, "full_skip": True}, "full_skip is True"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images has shape .*; expected \[B, 1, 32, 32, 32\]"):
        make()(torch.rand(1, 1, 16, 16, 16))
