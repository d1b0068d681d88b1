"""MIRAM: what the encoder sees, the two-scale loss, and decoders whose memory is linear."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sparseattn.claims.memory import LINEAR, MOST, STORED, decoder_slope
from sparseattn.models import MIRAM, MIRAMClassifier, MIRAMConfig
from sparseattn.models.transformer import from_patches, sincos_positions, to_patches

SMALL = MIRAMConfig(
    image_size=16, patch=4, dim=32, depth=2, heads=2, low_dim=32, low_depth=1, low_heads=2,
    high_dim=32, high_depth=1, high_heads=2, features=32, projected_keys=16,
    landmarks=16, high_method="performer",
)  # fmt: skip
METHODS = ["linformer", "performer", "nystrom", "softmax"]


def make(**changes) -> MIRAM:
    return MIRAM(dataclasses.replace(SMALL, **changes))


def test_patches_are_cut_in_raster_order_and_put_back() -> None:
    images = torch.rand(2, 3, 8, 12)
    patches = to_patches(images, 4)
    assert patches.shape == (2, 6, 48)
    cell = images[1, :, 4:8, 8:12].permute(1, 2, 0)  # row 1, column 2
    assert torch.equal(patches[1, 5].view(4, 4, 3), cell)
    assert torch.equal(from_patches(patches, 4, 2), images)


def test_positions_are_sines_of_each_axis() -> None:
    found = sincos_positions((2, 3), 8)
    row, column, rates = 1, 2, torch.tensor([1.0, 0.01])
    waves = [f(n * rates) for n in (row, column) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(found[5], torch.cat(waves))


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_what_gradients_reach(method: str) -> None:
    model = make(high_method=method, scale=2)
    output = model(torch.rand(3, 1, 32, 32))
    assert output.low.shape == (3, 16, 16) and output.high.shape == (3, 64, 16)
    assert output.kept.shape == (3, 4) and bool((output.kept.diff() > 0).all())
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("high_input", ["encoder", "low"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_every_choice_learns_in_all_its_parameters(
    high_input: str, interpolation: str, scale: int
) -> None:
    model = make(high_input=high_input, interpolation=interpolation, scale=scale)
    model(torch.rand(2, 1, 16 * scale, 16 * scale)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_its_formula(normalise: bool) -> None:
    model = make(normalise=normalise, low_weight=0.5, high_weight=2.0)
    images = torch.rand(3, 1, 32, 32)
    output = model(images)
    small = F.interpolate(images, size=16, mode="area")
    expected = []
    for truth, predicted, times in ((small, output.low, 1), (images, output.high, 2)):
        errors = []
        for b in range(3):
            for n in range(predicted.shape[1]):
                row, column = divmod(n, 4 * times)
                if row // times * 4 + column // times in output.kept[b]:
                    continue
                patch = truth[b, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                if normalise:
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                errors.append((predicted[b, n] - patch).square().mean())
        assert len(errors) == 3 * 12 * times**2
        expected.append(torch.stack(errors).mean())
    torch.testing.assert_close(output.low_loss, expected[0])
    torch.testing.assert_close(output.high_loss, expected[1])
    torch.testing.assert_close(output.loss, 0.5 * expected[0] + 2 * expected[1])


def test_hidden_patches_do_not_reach_predictions() -> None:
    model = make().eval()
    images = torch.rand(1, 1, 32, 32)
    kept = torch.tensor([[0, 3, 9, 14]])
    first = model(images, kept)
    shown = torch.zeros(1, 1, 4, 4).flatten().scatter(0, kept[0], 1).view(1, 1, 4, 4)
    shown = F.interpolate(shown, scale_factor=8).bool()
    second = model(torch.where(shown, images, torch.rand_like(images)), kept)
    assert torch.equal(first.low, second.low) and torch.equal(first.high, second.high)
    third = model(torch.where(shown, 1 - images, images), kept)
    assert not torch.allclose(first.high, third.high)


def test_masks_are_drawn_for_each_image_from_the_seed() -> None:
    model, images = make(), torch.rand(8, 1, 32, 32)
    torch.manual_seed(3)
    first = model(images)
    torch.manual_seed(3)
    second = model(images)
    assert torch.equal(first.kept, second.kept) and torch.equal(first.high, second.high)
    assert len({tuple(kept) for kept in first.kept.tolist()}) > 1
    assert not torch.equal(model(images).kept, first.kept)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch_mates(method: str) -> None:
    model = make(high_method=method).eval()
    images = torch.rand(3, 1, 32, 32)
    kept = model(images).kept
    whole = model(images, kept)
    others = model(torch.cat([images[:1], 100 * torch.rand(2, 1, 32, 32)]), kept)
    assert torch.equal(whole.low[0], others.low[0])
    assert torch.equal(whole.high[0], others.high[0])


def test_reconstructions_paste_what_was_seen() -> None:
    model = make().eval()
    images, kept = torch.rand(1, 1, 32, 32), torch.tensor([[1, 2, 3, 15]])
    found = model.reconstruct(images, kept)
    assert torch.equal(found.high, images) and found.low.shape == (1, 1, 16, 16)
    for true, seen, filled in (found[:3], found[3:]):
        side = true.shape[2] // 4  # of a patch: patch 1 is seen, patch 0 is not
        assert torch.equal(filled[..., :side, side : 2 * side], true[..., :side, side : 2 * side])
        assert torch.equal(seen[..., :side, side : 2 * side], true[..., :side, side : 2 * side])
        assert not seen[..., :side, :side].any()
        assert not torch.allclose(filled[..., :side, :side], true[..., :side, :side])
    # predictions of normalised patches get back their mean and deviation
    patches = to_patches(images, 4)
    scaled = model(images, kept).high * patches.std(-1, keepdim=True) + patches.mean(-1, True)
    expected = from_patches(scaled, 4, 8)[..., :8, :8]
    torch.testing.assert_close(found.high_filled[..., :8, :8], expected)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits [B, 1, 32, 32], to train on and not to."""
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    from sparseattn.data.samples import digits as load

    split = load()
    found = [
        F.interpolate(p.columns["images"], size=32, mode="bilinear")
        for p in (split.train, split.test)
    ]
    return found[0], found[1]


def train(model: MIRAM, images: torch.Tensor, steps: int) -> list[float]:
    rate = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 40, 1 - step / steps)
        output = model(images[torch.randint(len(images), (32,))])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return losses


def errors_of(model: MIRAM, truth: torch.Tensor, guess: torch.Tensor) -> tuple[float, ...]:
    """Errors on images of a model at both scales, and of guesses [B or 1, 1, 32, 32] there."""
    model.eval()
    with torch.no_grad():
        output = model(truth)
    naive = []
    hidden = torch.ones(len(truth), 16).scatter(1, output.kept, 0).view(-1, 1, 4, 4)
    for size in (16, 32):
        wrong = (F.avg_pool2d(truth - guess, 32 // size)).square()
        covered = F.interpolate(hidden, size=size)
        naive.append(float((wrong * covered).sum() / covered.sum()))
    return float(output.low_loss), float(output.high_loss), *naive


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_decoder_reconstructs_digits_it_has_not_seen(method: str) -> None:
    """After 150 steps: better at both scales than the mean of the image, which is not given."""
    torch.manual_seed(0)
    images, unseen = digits()
    model = make(high_method=method, normalise=False, mask=0.5)
    losses = train(model, images, 150)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    low, high, *naive = errors_of(model, unseen, unseen.mean((1, 2, 3), keepdim=True))
    assert low < 0.75 * naive[0] and high < 0.75 * naive[1]


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [(method, 0.5, MOST) for method in LINEAR] + [("stored", *STORED)],
)
def test_memory_of_the_high_resolution_decoder(method: str, low: float, high: float) -> None:
    assert low <= decoder_slope(method) <= high


def test_saves_its_config_and_its_weights(tmp_path) -> None:
    model = make(scale=3).eval()
    model.save_pretrained(tmp_path)
    loaded = MIRAM.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config
    images, kept = torch.rand(1, 1, 48, 48), torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(loaded(images, kept).high, model(images, kept).high)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_the_classifier_starts_from_the_encoder(pool: str, tmp_path) -> None:
    model = make(classes=3, pool=pool).eval()
    classifier = MIRAMClassifier.from_autoencoder(model).eval()
    images = torch.rand(2, 1, 32, 32)
    small, everything = F.avg_pool2d(images, 2), torch.arange(16).expand(2, -1)
    tokens = model.encoder(small, everything)
    pooled = tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1)
    output = classifier(images, torch.tensor([2, 0]))
    torch.testing.assert_close(output.logits, classifier.head(pooled))
    assert torch.equal(classifier(small).logits, output.logits)
    assert classifier(small).loss is None
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([2, 0])))
    output.loss.backward()
    assert all(p.grad is not None for p in classifier.parameters())
    assert all(p.grad is None for p in model.parameters())  # a copy
    classifier.save_pretrained(tmp_path)
    loaded = MIRAMClassifier.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(loaded(images).logits, output.logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 18}, "image_size is 18; expected a multiple of patch, patch=4"),
        ({"dim": 30}, "dim is 30; expected a multiple of 4 and of heads, heads=2"),
        ({"high_heads": 5}, "high_dim is 32; expected a multiple of 4 and of high_heads"),
        ({"mask": 0.0}, "mask is 0.0"),
        ({"mask": 0.99}, "mask is 0.99; .* patches=16"),
        ({"high_method": "topk"}, "high_method is 'topk'; expected linformer or"),
        ({"pool": "max"}, "pool is 'max'; expected mean or class"),
        ({"scale": 0}, "scale is 0"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_wrong_inputs_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"images has shape .* expected \[B, 1, 32, 32\]$"):
        model(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"kept has shape \[1, 3\]; expected \[B, kept\], B=1"):
        model(torch.rand(1, 1, 32, 32), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\] or \[B, 1, 16, 16\]"):
        MIRAMClassifier(SMALL)(torch.rand(1, 1, 8, 8))
