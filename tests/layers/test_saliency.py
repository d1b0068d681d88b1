"""The method "saliency": dense attention when it keeps all, where its saliency comes from, and the
hosts whose attention modules show their tokens to a predictor."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseattn import SparseAttention, convert, patch_sdpa, revert
from sparseattn.integrations.timm import attn_layer
from sparseattn.layers.registry import make_method
from sparseattn.ops.saliency_attention import saliency_attention
from sparseattn.testing.tolerance import judge, require

EMBED, HEADS, TOKENS = 32, 2, 37


def layer_of(**options):
    return SparseAttention(EMBED, HEADS, batch_first=True, method="saliency", **options)


def inputs():
    """Tokens, a saliency, and padding of three samples."""
    hidden = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [28], [5]])
    return torch.randn(3, TOKENS, EMBED), torch.rand(3, TOKENS) * 0.9 + 0.1, hidden


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"batch_first": True}, {"kdim": 24, "vdim": 40}])
def test_keeping_all_at_saliency_one_is_the_dense_layer(variant):
    torch_layer = nn.MultiheadAttention(EMBED, HEADS, **variant).eval()
    layer = SparseAttention.from_torch(torch_layer, "saliency", keep=1.0)
    x, _, hidden = inputs()
    k, v = torch.randn(3, TOKENS, layer.kdim), torch.randn(3, TOKENS, layer.vdim)
    qkv = [t if layer.batch_first else t.mT.permute(2, 0, 1) for t in (x, k, v)]
    naive = torch_layer(*qkv, hidden)
    truth = copy.deepcopy(torch_layer).double()(*(t.double() for t in qkv), hidden)
    found = layer(*qkv, hidden, need_weights=True, saliency=torch.ones(3, TOKENS))
    require(*map(judge, ("out", "weights"), found, naive, truth))


@torch.no_grad()
@pytest.mark.parametrize("prune", [False, True])
def test_attends_as_the_op_does(prune):
    layer = layer_of(keep=0.25, prefix=2, prune_queries=prune).eval()
    x, saliency, hidden = inputs()
    saliency[:, :2] = 0.01  # of class tokens, which are kept nevertheless
    out, weights = layer(
        x, x, x, hidden, need_weights=True, average_attn_weights=False, saliency=saliency
    )
    q, k, v = layer._project(x, x, x, True)
    attended, tokens = saliency_attention(
        q, k, v, saliency, 0.25, key_mask=~hidden, always=2, prune_queries=prune,
        return_indices=True,
    )  # fmt: skip
    assert torch.equal(out, layer.out_proj(attended.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(weights @ v, attended)
    for sample, kept in enumerate(tokens[:, 0]):
        seen = weights[sample].amax((0, 1)).nonzero().flatten()
        assert seen.tolist() == kept[kept >= 0].tolist() and seen[:2].tolist() == [0, 1]
        asking = weights[sample].amax((0, 2)).nonzero().flatten()
        assert len(asking) == (len(seen) if prune else TOKENS)


@torch.no_grad()
def test_cross_attention_and_inputs_without_a_batch():
    layer = layer_of(keep=9, predictor=True).eval()
    x, saliency, hidden = inputs()
    query = torch.randn(3, 21, EMBED)
    for given in (saliency, None):
        out, _ = layer(query, x, x, hidden, saliency=given)
        one = None if given is None else given[1]
        single, _ = layer(query[1], x[1], x[1], hidden[1], saliency=one)
        torch.testing.assert_close(single, out[1])
    assert not torch.allclose(layer(query, x, x, saliency=saliency)[0], out)


def test_errors_name_the_saliency():
    layer, (x, saliency, _) = layer_of(), inputs()
    with pytest.raises(ValueError, match=r"saliency is None; expected \[B, Nk\].*predictor=True"):
        layer(x, x, x)
    with pytest.raises(ValueError, match=r"saliency has shape \[37, 3\]; expected \[B, Nk\]"):
        layer(x, x, x, saliency=saliency.mT)
    with pytest.raises(TypeError, match=r"saliency has dtype torch\.bool"):
        layer(x, x, x, saliency=saliency > 0)
    for name, options in (("topk", {}), ("dense", {}), ("window", {"radius": 1, "grid": TOKENS})):
        other = SparseAttention(EMBED, HEADS, batch_first=True, method=name, **options)
        with pytest.raises(NotImplementedError, match=f"{name}: saliency is given; expected None"):
            other(x, x, x, saliency=saliency)
    with pytest.raises(NotImplementedError, match="has no extra keys"):
        layer_of(add_bias_kv=True)
    q = torch.randn(1, 2, 9, 16)
    with pytest.raises(NotImplementedError, match="extra is given"):
        make_method("saliency", {}, "here")(q, q, q, extra=(q, q), saliency=torch.ones(1, 9))
    with pytest.raises(ValueError, match="patch_sdpa: method is 'saliency'; expected one without"):
        patch_sdpa("saliency", predictor=True)
    for option, value in (("keep", 1.5), ("prefix", -1)):
        with pytest.raises(ValueError, match=f"saliency: {option} is {value}; expected"):
            layer_of(**{option: value})
    for option in ("predictor", "prune_queries"):
        with pytest.raises(TypeError, match=f"saliency: {option}"):
            layer_of(**{option: 1})


# -- the predictor -----------------------------------------------------------------------------


def test_the_predictor_learns_and_alone_is_in_the_state_dict():
    torch_layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    assert list(layer_of().state_dict()) == list(torch_layer.state_dict())
    layer = layer_of(keep=0.25, predictor=True)
    own = ["method.predictor.weight", "method.predictor.bias"]
    assert list(layer.state_dict()) == [*torch_layer.state_dict(), *own]
    x, _, hidden = inputs()
    out, _ = layer(x, x, x, hidden)
    (out * torch.linspace(-1, 1, EMBED)).sum().backward()
    assert layer.method.predictor.weight.grad.abs().sum() > 0
    assert torch.equal(layer(x, x, x, hidden, saliency=layer.method.predict(x))[0], out)


@torch.no_grad()
def test_padding_may_hold_nan():
    layer, (x, _, hidden) = layer_of(keep=0.25, predictor=True).eval(), inputs()
    dirty = x.masked_fill(hidden[..., None], torch.nan)
    clean_out, dirty_out = (layer(each, each, each, hidden)[0] for each in (x, dirty))
    assert torch.equal(clean_out[~hidden], dirty_out[~hidden])


def test_copies_and_pickles_have_a_predictor_of_their_own():
    layer, (x, _, _) = layer_of(keep=0.25, predictor=True), inputs()
    expected = layer(x, x, x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x)[0], expected)
        assert twin.method.predictor.weight is not layer.method.predictor.weight


def test_the_predictor_is_made_where_the_layer_is():
    layer = layer_of(predictor=True, kdim=24, vdim=40, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    assert layer.method.predictor.in_features == 24
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.method.predictor.weight.fill_(torch.nan)
    layer.reset_parameters()
    assert layer.method.predictor.weight.isfinite().all()
    half = SparseAttention.from_torch(
        nn.MultiheadAttention(EMBED, HEADS, dtype=torch.bfloat16), "saliency", predictor=True
    )
    assert half.method.predictor.weight.dtype == torch.bfloat16
    assert half.method.predict(torch.randn(1, 9, EMBED).bfloat16()).dtype == torch.float32


# -- hosts -------------------------------------------------------------------------------------

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def ones_from(predictor):
    """Make a predictor's saliency 1: in float32 the sigmoid of 100 is."""
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.fill_(100)


def test_a_converted_timm_vit_trains():
    timm = pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')
    model = timm.create_model("vit_small_patch16_224", **VIT, num_classes=2).train()
    report = convert(model, "saliency", predictor=True, keep=0.25)
    assert len(report.swapped) == 2 and model.blocks[0].attn.method.prefix == 1
    before = [block.attn.method.predictor.weight.clone() for block in model.blocks]
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    x[y == 1, :, 8:16, 8:16] += 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for block, old in zip(model.blocks, before, strict=True):
        assert not torch.equal(block.attn.method.predictor.weight, old)
    revert(model)
    assert not [name for name in model.state_dict() if "predictor" in name]


def timm_vit():
    timm = pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')
    return timm.create_model("vit_small_patch16_224", **VIT), torch.randn(2, 3, 32, 32)


def timm_eva_apart():
    timm = pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')
    layer = timm.models.eva.EvaAttention(32, 2, qkv_fused=False, scale_norm=False)
    return layer, torch.randn(2, 50, 32)


def monai_block(**options):
    blocks = pytest.importorskip(
        "monai.networks.blocks", reason='needs pip install "sparseattn[test]"'
    )
    return blocks.TransformerBlock(32, 64, 2, **options), torch.randn(2, 50, 32)


def monai_apart():
    blocks = pytest.importorskip(
        "monai.networks.blocks", reason='needs pip install "sparseattn[test]"'
    )
    return blocks.SABlock(32, 2, use_combined_linear=False), torch.randn(2, 50, 32)


HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HF |= {"intermediate_size": 64}


class Output(nn.Module):
    """A Hugging Face model that returns its last hidden state alone."""

    def __init__(self, model, **inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, x):
        return self.model(x, **self.inputs).last_hidden_state


def hf_vision(kind):
    transformers = pytest.importorskip(
        "transformers", reason='needs pip install "sparseattn[test]"'
    )
    config = getattr(transformers, f"{kind}Config")(**HF, image_size=32, patch_size=4)
    return Output(getattr(transformers, f"{kind}Model")(config)), torch.randn(2, 3, 32, 32)


def hf_vit():
    return hf_vision("ViT")


def hf_dinov2():
    return hf_vision("Dinov2")


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 50, 32)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [timm_vit, timm_eva_apart, monai_block, monai_apart, torch_encoder, hf_vit, hf_dinov2]
)
def test_hosts_that_show_their_tokens(make):
    model, x = make()
    model.eval()
    naive, truth = model(x), copy.deepcopy(model).double()(x.double())
    report = convert(model, "saliency", predictor=True, keep=1.0)
    predictors = [m.predictor for m in model.modules() if hasattr(m, "predictor")]
    assert report.swapped and not report.skipped and len(predictors) == len(report.swapped)
    for predictor in predictors:
        ones_from(predictor)
    require(judge("out", model(x), naive, truth))
    convert(model, "saliency", predictor=True, keep=4)
    assert not torch.allclose(model(x), naive, rtol=0.01)
    revert(model)
    assert torch.equal(model(x), naive)


def test_hosts_that_cannot_are_reported():
    model, _ = timm_vit()
    reasons = set(convert(model, "saliency").skipped.values())
    assert reasons == {"method='saliency' needs a saliency in every call, or predictor=True"}
    model, _ = monai_block()
    assert set(convert(model, "saliency").skipped.values()) == reasons
    with pytest.raises(ValueError, match="attn_layer: predictor is False; expected True"):
        attn_layer("saliency")
    extra = nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True)
    report = convert(extra, "saliency", predictor=True)
    assert report.skipped == {"": "extra keys, which method='saliency' does not have"}
    plain = nn.MultiheadAttention(EMBED, HEADS)
    report = convert(plain, "saliency")
    assert report.swapped == [""] and "its calls must give saliency=" in str(report)


def test_cross_attention_of_transformers_is_reported():
    """Its forward is given other tokens beside the hidden states: which ones, no name tells."""
    transformers = pytest.importorskip(
        "transformers", reason='needs pip install "sparseattn[test]"'
    )
    config = transformers.BertConfig(**HF, vocab_size=9, is_decoder=True, add_cross_attention=True)
    report = convert(transformers.BertModel(config), "saliency", predictor=True)
    assert not report.swapped and len(report.skipped) == 4
    config = transformers.ViTConfig(**HF, image_size=32, patch_size=4)
    model = transformers.ViTModel(config)
    reason = "method='saliency' needs a saliency in every call, or predictor=True"
    assert set(convert(model, "saliency").skipped.values()) == {reason}
    assert model.config._attn_implementation != "sparseattn"


def test_timm_builds_models_with_it():
    timm = pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')
    layer = attn_layer("saliency", predictor=True, keep=0.5)
    model = timm.create_model("vit_small_patch16_224", **VIT, attn_layer=layer)
    assert model.blocks[1].attn.method.predictor.in_features == 32
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert model.blocks[0].attn.method.predictor.weight.grad.abs().sum() > 0
