"""Adaptor: any frozen encoders, padding, leakage, and what learns."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from sparseattn.models import Adaptor, AdaptorClassifier, AdaptorConfig

pytestmark = pytest.mark.usefixtures("one_thread")
NEEDED = 'needs pip install "sparseattn[test]"'
SMALL = AdaptorConfig(dim=32, heads=2, depth=1, queries=2, project=16)


def make(**changes) -> Adaptor:
    return Adaptor(dataclasses.replace(SMALL, **changes))


def batch(size: int = 6, length: int = 20) -> dict[str, Tensor]:
    lengths = torch.arange(size) % length + 1
    return {
        "images": torch.rand(size, 1, 8, 16),
        "words": torch.randint(1, 4096, (size, length)),
        "word_mask": torch.arange(length) < lengths[:, None],
    }


def test_timm_is_imported_beside_a_torchvision_of_another_build() -> None:
    """In a process of its own: tests/conftest.py mends that torchvision for this one."""
    pytest.importorskip("timm", reason=NEEDED)
    code = "from sparseattn.models.encoders import import_timm; import_timm().create_model"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def timm_and_hugging_face() -> Adaptor:
    timm = pytest.importorskip("timm", reason=NEEDED)
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    image = timm.create_model("resnet10t", num_classes=0)
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    widths = {"image_width": image.num_features, "text_width": 32}
    return Adaptor(dataclasses.replace(SMALL, **widths), image, transformers.BertModel(config))


def test_the_loss_is_its_formula() -> None:
    output = make()(**batch())
    scale = 1 / SMALL.temperature
    expected = scale * output.image_vectors @ output.text_vectors.T
    torch.testing.assert_close(output.similarity, expected)
    p, q = expected.log_softmax(1).diag(), expected.log_softmax(0).diag()
    torch.testing.assert_close(output.loss, -(p + q).mean() / 2)
    torch.testing.assert_close(output.image_vectors.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("fusion", ["late", "pairs", "own"])
def test_padding_is_not_read(fusion: str) -> None:
    model, given = make(fusion=fusion).eval(), batch()
    features = model.encode_texts(given["words"], given["word_mask"])
    output = model(given["images"], word_mask=given["word_mask"], text_features=features)
    features = features.masked_fill(~given["word_mask"][..., None], math.nan)
    padded = model(given["images"], word_mask=given["word_mask"], text_features=features)
    assert torch.equal(padded.similarity, output.similarity)
    padded.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)
    short = {name: x[:3, :3] if name != "images" else x[:3] for name, x in given.items()}
    cut = model(**short).text_vectors
    torch.testing.assert_close(cut, model(**{k: v[:3] for k, v in given.items()}).text_vectors)


def test_timm_and_hugging_face_encoders_stay_frozen() -> None:
    """Weights and BatchNorm statistics keep their bits in training mode; the adaptor learns."""
    model = timm_and_hugging_face().train()
    frozen = {
        name: value.clone() for name, value in model.state_dict().items() if "encoder." in name
    }
    assert any("running_mean" in name for name in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given = {**batch(), "images": torch.rand(6, 3, 64, 64)}
    first = model(**given).loss
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
    assert loss < first
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(p.grad is None for p in model.frozen_parameters())
    learned = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert learned == []


def test_features_computed_once_give_the_same() -> None:
    model, given = make().eval(), batch()
    direct = model(**given)
    cached = model(
        word_mask=given["word_mask"],
        image_features=model.encode_images(given["images"]),
        text_features=model.encode_texts(given["words"], given["word_mask"]),
    )
    assert torch.equal(direct.similarity, cached.similarity)


def test_maps_and_tokens_of_vision_transformers() -> None:
    timm = pytest.importorskip("timm", reason=NEEDED)
    for name, size, tokens in (
        ("vit_tiny_patch16_224", 32, 5),
        ("swin_tiny_patch4_window7_224", 224, 49),
    ):
        encoder = timm.create_model(name, num_classes=0, img_size=size)
        config = dataclasses.replace(SMALL, image_width=encoder.num_features)
        found = Adaptor(config, encoder).encode_images(torch.rand(1, 3, size, size))
        assert found.shape == (1, tokens, encoder.num_features)


@pytest.mark.parametrize(("changes", "most"), [({}, 0.10), ({"fusion": "pairs"}, 0.10)])
def test_less_than_a_tenth_learns_beside_resnet50_and_bert(changes: dict, most: float) -> None:
    timm = pytest.importorskip("timm", reason=NEEDED)
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    with torch.device("meta"):
        image = timm.create_model("resnet50", num_classes=0)
        text = transformers.BertModel(transformers.BertConfig())
        model = Adaptor(AdaptorConfig(image_width=2048, text_width=768, **changes), image, text)
    frozen = sum(p.numel() for p in model.frozen_parameters())
    assert frozen == 23_508_032 + 109_482_240
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.trainable_share() == learn / (learn + frozen) < most


def shuffled_training(fusion: str, shuffle: bool, steps: int = 80) -> float:
    """The mean loss at the end of a training on related features, paired by chance if `shuffle`."""
    torch.manual_seed(0)
    model = make(fusion=fusion, image_width=24, text_width=24).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    mixes, losses = torch.randn(2, 24, 24), []
    for _ in range(steps):
        hidden = torch.randn(16, 3, 24)
        pairs = torch.randperm(16) if shuffle else torch.arange(16)
        output = model(
            word_mask=torch.ones(16, 3).bool(),
            image_features=hidden @ mixes[0],
            text_features=(hidden @ mixes[1])[pairs],
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("fusion", ["late", "pairs"])
def test_shuffled_pairs_return_to_ln_b(fusion: str) -> None:
    assert shuffled_training(fusion, shuffle=True) == pytest.approx(math.log(16), rel=0.03)


def test_true_pairs_are_learned() -> None:
    assert shuffled_training("late", shuffle=False, steps=200) < 0.7 * math.log(16)


def test_a_sample_that_reads_its_partner_leaks() -> None:
    assert shuffled_training("own", shuffle=True, steps=150) < 0.7 * math.log(16)


def test_saves_and_loads(tmp_path) -> None:
    model = make(fusion="pairs").eval()
    model.save_pretrained(tmp_path)
    loaded = Adaptor.from_pretrained(str(tmp_path)).eval()
    given = batch()
    assert loaded.config == model.config
    assert torch.equal(loaded(**given).similarity, model(**given).similarity)


def test_the_classifier_reads_what_the_adaptor_reads(tmp_path) -> None:
    """Its encoder keeps its bits, BatchNorm's statistics too; the rest learns."""
    timm = pytest.importorskip("timm", reason=NEEDED)
    image = timm.create_model("resnet10t", num_classes=0)
    config = dataclasses.replace(SMALL, image_width=image.num_features, classes=3)
    model = Adaptor(config, image)
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 1])
    classifier = AdaptorClassifier.from_adaptor(model).train()
    seen = model.encode_images(images)
    read = model._read(model.image_queries, model.image_project(seen), None).mean(1)
    output = classifier(images, labels)
    torch.testing.assert_close(output.logits, classifier.head(read))
    assert torch.equal(classifier(image_features=seen).logits, output.logits)
    entropy = -output.logits.log_softmax(1)[range(4), labels].mean()
    torch.testing.assert_close(output.loss, entropy)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=1e-2)
    output.loss.backward()
    optimizer.step()
    for name, value in classifier.state_dict().items():
        frozen, flat = name.startswith("image_encoder."), name.endswith("project.0.bias")
        assert frozen == torch.equal(value, before[name]) or flat, name
    assert not torch.equal(classifier.image_queries, model.image_queries)  # a copy
    assert classifier.trainable_share() < 0.1
    small = AdaptorClassifier(dataclasses.replace(SMALL, classes=3))
    small.save_pretrained(tmp_path)
    loaded = AdaptorClassifier.from_pretrained(str(tmp_path))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images).logits, small(images).logits)
    with pytest.raises(TypeError, match="images and image_features are None"):
        small()


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


def test_what_is_wrong_is_said() -> None:
    given = batch()
    with pytest.raises(ValueError, match=r"an encoder returns \(6,\); expected tokens"):
        Adaptor(SMALL, Odd())(**given)
    with pytest.raises(ValueError, match="image_width is 65; expected that of the encoder, 64"):
        make(image_width=65)(**given)
    with pytest.raises(TypeError, match="word_mask is None"):
        make()(given["images"], given["words"])
    with pytest.raises(TypeError, match="images and image_features are None"):
        make()(words=given["words"], word_mask=given["word_mask"])
    with pytest.raises(ValueError, match="image_name is 'x'"):
        make(image_name="x")
    with pytest.raises(ValueError, match="text_name is 'x'"):
        make(text_name="x")
    with pytest.raises(ValueError, match="expected late, pairs or own"):
        make(fusion="early")
