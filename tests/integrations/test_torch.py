"""torch's own modules, and the context that takes scaled_dot_product_attention over."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparseattn import SparseAttention, convert, patch_sdpa, revert

SPARSE = {"keep": 1, "block_size": 16, "fallback": "never"}
EVERYTHING = SPARSE | {"keep": 1.0}


def test_the_encoder_packs_no_nested_tensors_and_gets_its_switch_back():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    assert encoder.use_nested_tensor
    convert(encoder, "topk", **SPARSE)
    assert not encoder.use_nested_tensor
    revert(encoder)
    assert encoder.use_nested_tensor and type(encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert encoder.layers[0].self_attn._qkv_same_embed_dim


@torch.no_grad()
def test_a_whole_transformer():
    model = nn.Transformer(32, 2, 1, 1, 64, batch_first=True).eval()
    source, target = torch.randn(2, 50, 32), torch.randn(2, 40, 32)
    before = model(source, target)
    report = convert(model, "topk", **EVERYTHING)
    assert len(report.swapped) == 3
    torch.testing.assert_close(model(source, target), before)
    causal = nn.Transformer.generate_square_subsequent_mask(40)
    with pytest.raises(NotImplementedError, match="attn_mask"):
        model(source, target, tgt_mask=causal)
    revert(model)
    convert(model, "topk", skip="decoder.layers.*.self_attn", **EVERYTHING)
    model(source, target, tgt_mask=causal)


def test_layers_that_were_sparse_before_stay():
    model = nn.ModuleList([SparseAttention(32, 2, keep=0.5), nn.MultiheadAttention(32, 2)])
    report = convert(model, "topk", keep=0.25)
    assert report.swapped == ["1"] and report.skipped == {"0": "sparse already"}
    revert(model)
    assert model[0].method.keep == 0.5 and type(model[1]) is nn.MultiheadAttention


# -- patch_sdpa --------------------------------------------------------------------------------


def test_patch_takes_calls_over():
    q, k, v = torch.randn(3, 2, 4, 50, 16, requires_grad=True).unbind()
    shown = (torch.arange(50) < torch.tensor([[50], [21]]))[:, None, None]
    with patch_sdpa("topk", **EVERYTHING) as patch:
        found = sdpa(q, k, v, shown), sdpa(q, k[:, :2], v[:, :2], scale=0.1, enable_gqa=True)
    expected = sdpa(q, k, v, shown), sdpa(q, k[:, :2], v[:, :2], scale=0.1, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    assert patch.calls == 2 and not patch.passed
    with patch_sdpa("topk", **SPARSE):
        assert not torch.allclose(sdpa(q, k, v), expected[0])
    assert torch.equal(sdpa(q, k, v, shown), expected[0])


def test_patch_passes_on_what_it_cannot_take():
    q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
    pairs = torch.rand(50, 50) > 0.3
    calls = [
        ((q, k, v), {"is_causal": True}),
        ((q, k, v, pairs), {}),
        ((q, k, v[..., :8]), {}),
        ((q[0], k[0], v[0]), {}),
    ]
    expected = [sdpa(*args, **kwargs) for args, kwargs in calls]
    with patch_sdpa("topk", **SPARSE) as patch:
        found = [sdpa(*args, **kwargs) for args, kwargs in calls]
    assert all(map(torch.equal, found, expected)) and patch.calls == 0
    reasons = ["causal", "mask of pairs", "values of another head dim", "not [B, H, N, D]"]
    assert patch.passed == dict.fromkeys(reasons, 1)


def test_patch_under_compile():
    q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
    compiled = torch.compile(lambda *args: sdpa(*args) * 2, fullgraph=True, backend="eager")
    with patch_sdpa("topk", **SPARSE):
        found = compiled(q, k, v)
        assert torch.equal(found, sdpa(q, k, v) * 2)
    assert not torch.allclose(found, sdpa(q, k, v) * 2)
