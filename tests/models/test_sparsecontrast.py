"""SparseContrast: what is kept, what learns, and that the choice is worth learning."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("timm", reason="the backbones are timm's")

from sparseattn.claims.saliency import accuracy
from sparseattn.data.samples import digits
from sparseattn.models import (
    SparseContrast,
    SparseContrastClassifier,
    SparseContrastConfig,
    info_nce,
    nt_xent,
    two_views,
)

SMALL = SparseContrastConfig(
    backbone="vit_tiny_patch16_224", image_size=16, patch=4, dim=32, depth=3, heads=2, start=1,
    stages=2, predictor_dim=8, projector_dim=16, keep=0.25, quality_share=1.0, classes=3,
)  # fmt: skip
CONV = {"backbone": "resnet10t", "image_size": 64, "pool_heads": 8}


def make(kind=SparseContrast, **changes):
    return kind(dataclasses.replace(SMALL, **changes))


def learns(module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


@pytest.mark.parametrize("changes", [{"trim": "maps"}, {"trim": "tokens"}, CONV])
@pytest.mark.parametrize("contrast", ["nt-xent", "infonce"])
@pytest.mark.parametrize("quality", ["mse", "cosine"])
def test_shapes_and_what_gradients_reach(changes: dict, contrast: str, quality: str) -> None:
    model = make(**changes, contrast=contrast, quality=quality)
    output = model(torch.rand(4, 1, model.config.image_size, model.config.image_size))
    assert output.features.shape == (8, model.backbone.dim)
    assert output.quality_loss > 0 and output.sparsity_loss > 0
    weights = (model.config.sparsity_weight, model.config.quality_weight)
    parts = output.contrast_loss + weights[0] * output.sparsity_loss
    torch.testing.assert_close(output.loss, parts + weights[1] * output.quality_loss)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    predictors = [m for n, m in model.backbone.named_children() if n.startswith("predictor")]
    assert predictors and all(all(learns(module)) for module in predictors)


@pytest.mark.parametrize("trim", ["maps", "tokens"])
def test_the_softmax_alone_teaches_the_predictor(trim: str) -> None:
    for gradient, expected in (("bias", True), ("none", False)):
        model = make(SparseContrastClassifier, trim=trim, gradient=gradient, sparsity_weight=0.0)
        model(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])).loss.backward()
        assert all(any(learns(p)) == expected for p in model.backbone.predictors)


def test_maps_and_tokens_keep_the_most_salient() -> None:
    images = torch.rand(2, 1, 16, 16)
    for trim, shares in (("maps", [0.25, 0.25]), ("tokens", [0.5, 0.5])):
        backbone = make(trim=trim).eval().backbone
        found = backbone(images, 0.25)
        assert found.shares == shares and found.tokens.shape == (2, 4)
        assert [s.shape[1] for s in found.saliency] == ([16, 16] if trim == "maps" else [16, 8])
        first = found.saliency[0].topk(8 if trim == "tokens" else 4).indices
        kept = [set(row) for row in found.tokens.tolist()]
        if trim == "maps":
            first = found.saliency[1].topk(4).indices
            assert kept == [set(row) for row in first.tolist()]
        else:
            assert all(k <= set(row) for k, row in zip(kept, first.tolist(), strict=True))


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("trim", ["maps", "tokens"])
def test_untrimmed_is_the_vit_of_timm(trim: str, pool: str) -> None:
    model = make(trim=trim, pool=pool).eval()
    images = torch.rand(2, 1, 16, 16)
    vit = model.backbone.vit
    expected = vit(images)
    torch.testing.assert_close(model.backbone(images, None).pooled, expected)
    # all tokens kept, and no saliency in the softmax: the same
    same = make(trim=trim, pool=pool, gradient="none").eval()
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(same.backbone(images, 1.0).pooled, expected)


def test_dropped_tokens_do_not_reach_the_result() -> None:
    """With one stage in front of the first block, what is dropped is not seen at all."""
    model = make(SparseContrastClassifier, start=0, stages=1, trim="tokens").eval()
    images = torch.rand(1, 1, 16, 16)
    output = model(images)
    fixed = output.saliency.detach()
    model.backbone.predictors[0].register_forward_hook(lambda *_: fixed)
    shown = torch.zeros(1, 16).scatter(1, output.tokens, 1).view(1, 1, 4, 4)
    shown = F.interpolate(shown, scale_factor=4).bool()
    hidden = torch.where(shown, images, torch.rand_like(images))
    assert torch.equal(model(hidden).logits, output.logits)
    assert not torch.allclose(model(torch.where(shown, 1 - images, images)).logits, output.logits)


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    for changes in ({"trim": "maps"}, {"trim": "tokens"}, CONV):
        model = make(SparseContrastClassifier, **changes).eval()
        side = model.config.image_size
        images = torch.rand(3, 1, side, side)
        others = torch.cat([images[:1], 100 * torch.rand(2, 1, side, side)])
        assert torch.equal(model(images).logits[0], model(others).logits[0])


@pytest.mark.parametrize("compare", [nt_xent, info_nce])
def test_contrastive_losses_are_their_formulas(compare) -> None:
    first, second = torch.randn(2, 3, 5, dtype=torch.float64)
    views = [F.normalize(v.float(), dim=0) for v in (*first, *second)]
    losses = []
    for i in range(6):
        partner = (i + 3) % 6
        others = [j for j in range(6) if j != i]
        if compare is info_nce:
            others = [j for j in others if j // 3 != i // 3]
        scores = {j: torch.exp(views[i] @ views[j] / 0.2) for j in others}
        losses.append(-(scores[partner] / sum(scores.values())).log())
    torch.testing.assert_close(compare(first, second, 0.2), torch.stack(losses).mean())


def test_the_schedule_ends_at_keep_and_is_saved(tmp_path) -> None:
    model = make(dense_share=0.2)
    seen = []
    for done in (0.0, 0.2, 0.6, 1.0):
        model.set_progress(done)
        seen.append(model.keep)
    assert seen == pytest.approx([1.0, 1.0, 0.625, 0.25])
    model.set_progress(0.6)
    model.eval().save_pretrained(tmp_path)
    loaded = SparseContrast.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config and loaded.keep == pytest.approx(0.625)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded.features(images).pooled, model.features(images).pooled)


def test_a_step_repeats_under_a_seed() -> None:
    model, images = make(), torch.rand(4, 1, 16, 16)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(float(model(images).loss.detach()))
    assert found[0] == found[1] != found[2]


def test_views_differ_and_keep_the_image() -> None:
    images = torch.rand(2, 1, 16, 16)
    assert torch.allclose(two_views(images, 1.0, 0.0, 0.0)[:2].sum((2, 3)), images.sum((2, 3)))
    first, second = two_views(images, 0.4, 10.0, 0.2).chunk(2)
    assert first.shape == images.shape and not torch.allclose(first, second)
    assert torch.isfinite(first).all()


def train(model, batches: list[dict[str, Tensor]], rate: float, loss: str) -> list[float]:
    """Minimise the model's loss; return the loss of that name of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20)
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(getattr(output, loss).detach()))
    return losses


@pytest.mark.slow
def test_contrastive_loss_falls_on_digits() -> None:
    """Well under ln(2 B - 1), where all features are the same."""
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    torch.manual_seed(0)
    images = digits().train.columns["images"]
    model = make(
        image_size=8, patch=2, depth=2, start=0, stages=1, keep=0.5, temperature=0.2, crop=0.7,
        quality_share=0.25,
    )  # fmt: skip
    chosen = [torch.randint(len(images), (32,)) for _ in range(110)]
    losses = train(model, [{"images": images[b]} for b in chosen], 5e-3, "contrast_loss")
    assert sum(losses[-10:]) / 10 < math.log(63) - 0.15


@pytest.mark.usefixtures("one_thread")
def test_learned_saliency_beats_random_at_the_same_share() -> None:
    """Digits from 4 of 16 patches, chosen before anything else has seen them."""
    pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')
    learned, random = (accuracy(choose, 0, steps=160) for choose in ("learned", "random"))
    assert learned > random + 0.2, (learned, random)


def test_the_classifier_starts_from_the_backbone() -> None:
    model = make().eval()
    classifier = SparseContrastClassifier.from_contrastive(model).eval()
    images = torch.rand(2, 1, 16, 16)
    output = classifier(images)
    assert output.logits.shape == (2, 3) and output.loss is None
    expected = classifier.head(model.backbone(images, 0.25).pooled)
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 3}, "start is 3 and stages is 2; expected a block for every stage, depth=3"),
        ({"keep": 0.0}, "keep is 0.0; expected a share"),
        ({"trim": "heads"}, "trim is 'heads'; expected maps or tokens"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"quality_share": 1.5}, "quality_share is 1.5"),
        ({**CONV, "pool_heads": 7}, "pool_heads is 7; expected a divisor"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images has shape .*; expected \[B, 1, 16, 16\]"):
        make()(torch.rand(2, 1, 8, 8))
