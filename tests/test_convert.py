"""convert and revert: the report, what is skipped, and what is refused."""

import pytest
import torch
from torch import nn

from sparseattn import convert, revert


class Wrapped(nn.Module):
    """An encoder, attention that nobody knows, and one module under two names."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.again = self.encoder.layers[0].self_attn
        self.homemade = HomemadeAttention()


class HomemadeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.attn_drop = nn.Dropout(0.1)


def test_the_report_names_every_attention_module():
    model = Wrapped()
    report = convert(model, "topk", keep=0.5, skip=["*.layers.1.*"])
    assert report.swapped == ["encoder.layers.0.self_attn"]
    assert report.skipped == {
        "encoder.layers.1.self_attn": "named by skip",
        "homemade": "no conversion for this class",
    }
    assert model.again is model.encoder.layers[0].self_attn and model.again.method.keep == 0.5
    text = str(report).splitlines()
    assert text[0] == "convert('topk', keep=0.5): swapped 1 of 3 attention modules"
    assert len(text) == 4 and "dropout 0.1 acts on what is attended" in text[1]
    assert "HomemadeAttention: no conversion for this class" in text[3]


def test_dry_run_changes_nothing():
    model, layer = Wrapped(), nn.MultiheadAttention(32, 2)
    before = [type(module) for module in model.modules()]
    dry = convert(model, "topk", dry_run=True)
    assert [type(module) for module in model.modules()] == before
    assert model.encoder.use_nested_tensor
    assert "would swap 2 of 3" in str(dry)
    wet = convert(model, "topk")
    assert (dry.swapped, dry.skipped) == (wet.swapped, wet.skipped)
    again = convert(model, "topk", dry_run=True, skip="*")
    assert not again.swapped and model.again.method.name == "topk"
    assert convert(layer, "topk", dry_run=True).swapped == [""]
    assert "(model)" in str(convert(layer, "topk"))


def test_converting_again_starts_from_the_dense_model():
    model = Wrapped()
    convert(model, "topk")
    convert(model, "dense", skip="encoder.layers.0.*")
    assert type(model.again) is nn.MultiheadAttention
    assert model.encoder.layers[1].self_attn.method.name == "dense"


def test_reverting_keeps_what_training_has_changed():
    model = Wrapped()
    convert(model, "topk")
    with torch.no_grad():
        model.again.in_proj_weight.fill_(3)
    model.again.to(torch.float64)
    revert(model)
    assert model.again.in_proj_weight.eq(3).all()
    assert model.again.in_proj_weight.dtype == torch.float64
    revert(model)  # nothing left to do


def test_hooks_and_modes_stay():
    model, seen = Wrapped().eval(), []
    model.again.register_forward_hook(lambda *_: seen.append(1))
    convert(model, "topk", keep=1.0)
    model.encoder(torch.randn(2, 40, 32))
    assert seen == [1]
    assert not any(module.training for module in model.modules())


def test_errors():
    with pytest.raises(TypeError, match="convert: model is 3"):
        convert(3, "topk")
    with pytest.raises(ValueError, match="convert: method is 'fast'; expected one of"):
        convert(Wrapped(), "fast")
    with pytest.raises(TypeError, match="convert: blocks is no option of method 'topk'"):
        convert(Wrapped(), "topk", blocks=3)
