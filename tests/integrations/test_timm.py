"""timm beyond whole models: its hook for attention classes, grouped keys, gates, masks."""

import copy

import pytest
import torch

from sparseattn import convert, revert
from sparseattn.integrations.timm import TimmAttention, attn_layer
from sparseattn.testing.tolerance import judge, require

EVERYTHING = {"keep": 1.0, "block_size": 16, "fallback": "never"}
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason='needs pip install "sparseattn[test]"')


@pytest.mark.parametrize("by_name", [False, True])
def test_models_are_built_with_it(timm, by_name, monkeypatch):
    layer = attn_layer("topk", **EVERYTHING)
    if by_name:
        registry = timm.models.vision_transformer.ATTN_LAYERS
        monkeypatch.setitem(registry, "ours", layer)
        layer = "ours"
    dense = timm.create_model("vit_small_patch16_224", **SMALL).eval()
    sparse = timm.create_model("vit_small_patch16_224", **SMALL, attn_layer=layer).eval()
    assert [type(block.attn) for block in sparse.blocks] == [TimmAttention] * 2
    sparse.load_state_dict(dense.state_dict())  # strict
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        truth = copy.deepcopy(dense).double()(x.double())
        require(judge("out", sparse(x), dense(x), truth))
        revert(sparse)
        assert torch.equal(sparse(x), dense(x))
    with pytest.raises(TypeError, match="attn_layer: radius is no option"):
        attn_layer("topk", radius=1)


ATTENTION = {
    "qk norm": ("Attention", {"qk_norm": True, "qkv_bias": True}),
    "scaled and gated": ("Attention", {"scale_norm": True, "gated": True}),
    "wide heads": ("Attention", {"attn_head_dim": 24, "dim_out": 40}),
    "rope": ("AttentionRope", {"qk_norm": True}),
    "grouped": ("AttentionRope", {"qkv_fused": False, "num_kv_heads": 1, "gated": True}),
    "halves": ("AttentionRope", {"rotate_half": True, "scale_norm": True}),
    "eva": ("EvaAttention", {"scale_norm": True}),
    "eva, apart": ("EvaAttention", {"qkv_fused": False, "scale_norm": False}),
    "eva, bias apart": ("EvaAttention", {"qkv_bias_separate": True, "scale_norm": False}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_every_option_of_the_host_is_kept(timm, name):
    kind, options = ATTENTION[name]
    home = timm.models.eva if kind == "EvaAttention" else timm.layers
    layer = getattr(home, kind)(32, 2, norm_layer=torch.nn.LayerNorm, **options).eval()
    x, extra = torch.randn(2, 50, 32), {}
    if kind != "Attention":
        layer.num_prefix_tokens = 1
        extra["rope"] = timm.layers.RotaryEmbeddingCat(16, feat_shape=(7, 7)).get_embed((7, 7))
    shown = torch.arange(50) < torch.tensor([[50], [21]])
    extra["attn_mask"] = shown[:, None, None]
    wide = {n: t.double() if t.is_floating_point() else t for n, t in extra.items()}
    with torch.no_grad():
        naive, truth = layer(x, **extra), copy.deepcopy(layer).double()(x.double(), **wide)
        report = convert(layer, "topk", **EVERYTHING)
        assert report.swapped == [""]
        require(judge("out", layer(x, **extra)[shown], naive[shown], truth[shown]))


def test_masks_and_causal_attention(timm):
    layer, x = timm.layers.Attention(32, 2).eval(), torch.randn(2, 50, 32)
    pairs = torch.rand(50, 50) > 0.3
    with torch.no_grad():
        naive, truth = layer(x, pairs), copy.deepcopy(layer).double()(x.double(), pairs)
        convert(layer, "topk", **EVERYTHING)
        with pytest.raises(NotImplementedError, match=r"a bool mask of keys \[B, 1, 1, Nk"):
            layer(x, pairs)
        with pytest.raises(NotImplementedError, match="is_causal is True"):
            layer(x, is_causal=True)
        convert(layer, "dense")
        require(judge("out", layer(x, pairs), naive, truth))


def test_class_and_register_tokens_are_found(timm):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=98, embed_dim=32, depth=1,
                              num_heads=2)  # fmt: skip
    convert(model, "topk")
    assert model.blocks[0].attn.method.prefix == 5
    convert(model, "topk", prefix=2)
    assert model.blocks[0].attn.method.prefix == 2
    convert(model, "window", grid=(7, 7), radius=1)
    assert model(torch.randn(1, 3, 98, 98)).isfinite().all()


def test_other_attention_is_reported(timm):
    small = {"img_size": 64, "embed_dim": 32, "depths": (1, 1), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", **small, num_heads=(2, 2))
    report = convert(model, "topk")
    assert not report.swapped
    assert set(report.skipped.values()) == {"no conversion for this class"}
    assert "timm.models.swin_transformer.WindowAttention" in str(report)
