"""Hugging Face: masks, causal models, and what the attention function refuses."""

import pytest
import torch

from sparseattn import convert, revert

SPARSE = {"keep": 1, "block_size": 16, "fallback": "never"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "vocab_size": 50}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason='needs pip install "sparseattn[test]"')


@pytest.fixture
def bert(transformers):
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


@torch.no_grad()
def test_a_padded_sample_is_what_it_is_alone(bert):
    """A custom attention without a mask function gets no mask at all, without a word."""
    convert(bert, "topk", **SPARSE)
    ids = torch.randint(0, 50, (2, 60))
    mask = (torch.arange(60) < torch.tensor([[60], [21]])).long()
    alone = bert(input_ids=ids[1:, :21]).last_hidden_state
    padded = bert(input_ids=ids, attention_mask=mask).last_hidden_state[1:, :21]
    torch.testing.assert_close(padded, alone)
    other = ids.clone()
    other[1, 21:] = 7
    replaced = bert(input_ids=other, attention_mask=mask).last_hidden_state
    assert torch.equal(replaced[1:, :21], padded)


def test_masks_of_pairs_are_refused(bert):
    convert(bert, "topk", **SPARSE)
    ids, pairs = torch.randint(0, 50, (2, 60)), torch.rand(2, 1, 60, 60) > 0.3
    with pytest.raises(NotImplementedError, match=r"expected a bool mask of keys \[B, 1, 1, Nk"):
        bert(input_ids=ids, attention_mask=pairs)


@torch.no_grad()
def test_causal_models_are_left_dense(transformers):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    model = transformers.LlamaModel(config).eval()
    ids, mask = torch.randint(0, 50, (2, 20)), torch.ones(2, 20).long()
    mask[1, :5] = 0
    before = model(ids, attention_mask=mask).last_hidden_state
    report = convert(model, "topk", **SPARSE)
    assert not report.swapped and set(report.skipped.values()) == {"causal attention"}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, before)


@torch.no_grad()
def test_modules_left_out_stay_dense_beside_sparse_ones(bert):
    ids, mask = torch.randint(0, 50, (2, 20)), torch.ones(2, 20).long()
    mask[1, 15:] = 0
    before = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    report = convert(bert, "topk", skip="encoder.layer.0.*", keep=1.0, block_size=16)
    assert report.swapped == ["encoder.layer.1.attention.self"]
    assert report.skipped == {"encoder.layer.0.attention.self": "named by skip"}
    after = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()])


def test_the_implementation_before_comes_back(transformers):
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    model = transformers.ViTModel._from_config(config, attn_implementation="eager")
    names = [name for name, _ in model.named_modules()]
    convert(model, "topk", **SPARSE)
    assert model.config._attn_implementation == "sparseattn"
    revert(model)
    assert model.config._attn_implementation == "eager"
    assert [name for name, _ in model.named_modules()] == names


def test_a_model_that_cannot_be_set_is_left_as_it_was(bert, monkeypatch):
    monkeypatch.setattr(type(bert), "_can_set_attn_implementation", lambda *_: False)
    names = [name for name, _ in bert.named_modules()]
    with pytest.raises(NotImplementedError, match="BertModel is of a class whose"):
        convert(bert, "topk", **SPARSE)
    assert [name for name, _ in bert.named_modules()] == names
    assert bert.config._attn_implementation == "sdpa"


def test_models_inside_others_are_found(transformers):
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    model = torch.nn.Sequential(torch.nn.Identity(), transformers.ViTModel(config))
    report = convert(model, "topk", **SPARSE)
    assert report.swapped == [f"1.layers.{layer}.attention" for layer in range(2)]
    assert model[1].layers[0].attention.method.prefix == 1  # the class token


def test_position_biases_are_reported(transformers):
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                                   vocab_size=50)  # fmt: skip
    report = convert(transformers.T5EncoderModel(config), "topk")
    assert not report.swapped and report.skipped


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"softcap": 50.0}, "soft-capped"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"cache": object()}, "paged cache"),
        ({"sliding_window": 4}, "sliding window"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "packed"),
        ({"output_attentions": True}, "weights are not formed"),
        ({"is_causal": True}, "is_causal is True"),
    ],
)
def test_what_is_not_computed_is_refused(bert, given, word):
    from sparseattn.integrations.transformers import attention

    convert(bert, "topk", **SPARSE)
    q, k, v = torch.randn(3, 2, 2, 40, 16).unbind()
    module = bert.encoder.layer[0].attention.self
    out, weights = attention(module, q, k, v, None, scaling=0.25, softcap=None, use_cache=False)
    assert out.shape == (2, 40, 2, 16) and out.is_contiguous() and weights is None
    with pytest.raises(NotImplementedError, match=word):
        attention(module, q, k, v, None, **given)
