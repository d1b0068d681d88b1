"""MONAI's SABlock: its masks, its dropout, and what cannot be made sparse."""

import copy

import pytest
import torch

from sparseattn import convert
from sparseattn.testing.tolerance import judge, require

EVERYTHING = {"keep": 1.0, "block_size": 16, "fallback": "never"}


@pytest.fixture(scope="module")
def blocks():
    return pytest.importorskip(
        "monai.networks.blocks", reason='needs pip install "sparseattn[test]"'
    )


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_masks_of_tokens(blocks, combined, flash):
    """With use_flash_attention MONAI itself fails on the mask that it documents."""
    layer = blocks.SABlock(32, 2, use_combined_linear=combined, use_flash_attention=flash).eval()
    x, shown = torch.randn(2, 50, 32), torch.arange(50) < torch.tensor([[50], [21]])
    with torch.no_grad():
        plain = copy.deepcopy(layer)
        plain.use_flash_attention = False
        naive, truth = plain(x, shown), copy.deepcopy(plain).double()(x.double(), shown)
        convert(layer, "topk", **EVERYTHING)
        require(judge("out", layer(x, shown)[shown], naive[shown], truth[shown]))
        assert torch.equal(layer(x, shown.float()), layer(x, shown))
        with pytest.raises(ValueError, match=r"attn_mask has shape \[50\]; expected \[B, N\]"):
            layer(x, shown[0])


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_is_off_in_eval(blocks, flash):
    """With use_flash_attention MONAI itself drops in eval as well."""
    layer = blocks.SABlock(32, 2, dropout_rate=0.5, use_flash_attention=flash)
    report = convert(layer, "topk", **EVERYTHING)
    assert "dropout 0.5 acts on what is attended, not on weights" in str(report)
    x = torch.randn(2, 50, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


REFUSED = {
    "causal attention": {"causal": True, "sequence_length": 50},
    "relative position embedding": {"rel_pos_embedding": "decomposed", "input_size": (5, 10)},
    "save_attn keeps the whole attention matrix": {"save_attn": True},
    "attention_dtype": {"attention_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_swapped_is_reported(blocks, reason):
    layer = blocks.SABlock(32, 2, **REFUSED[reason])
    assert convert(layer, "topk").skipped == {"": reason}
    assert type(layer) is blocks.SABlock


def test_cross_attention_is_reported(blocks):
    block = blocks.TransformerBlock(32, 64, 2, with_cross_attention=True)
    report = convert(block, "topk")
    assert report.swapped == ["attn"]
    assert report.skipped == {"cross_attn": "no conversion for this class"}
