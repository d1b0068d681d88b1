"""FlexAttention's BlockMask, both ways, and its eager attention as a witness."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import BlockMask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

WINDOW = 20
DOCUMENTS = torch.arange(300) // 37
HEAD_REACH = torch.tensor([0, 5, 90])
LENGTHS = torch.tensor([0, 60])


def causal(b, h, q, k):
    return q >= k


def sliding(b, h, q, k):
    return (q - k).abs() <= WINDOW


def documents(b, h, q, k):
    return DOCUMENTS[q] == DOCUMENTS[k]


def per_head(b, h, q, k):
    return (q - k).abs() <= HEAD_REACH[h]


def padded(b, h, q, k):
    return k < LENGTHS[b]


def per_both(b, h, q, k):
    return (k < LENGTHS[b]) & (q + h >= k)


def nothing(b, h, q, k):
    return q < 0


MODS = [  # mask_mod, B, H
    (causal, None, None),
    (sliding, None, None),
    (documents, None, None),
    (per_head, None, 3),
    (padded, 2, None),
    (per_both, 2, 3),
    (nothing, 1, 1),
]
MOD_IDS = [mod.__name__ for mod, _, _ in MODS]
SIZES = [(16, 16), (64, 64), (128, 128), (32, 80), (256, 48)]


def token_mask(batch=2, heads=3, q_len=70, k_len=90):
    keep = torch.rand(batch, heads, q_len, k_len) < 0.5
    keep[:, :, :32, :64] = True
    keep[:, :, 32:64, :64] = False
    keep[:, :, -1] = False
    return keep


def our_masks():
    blocks = torch.rand(2, 3, 3, 3) < 0.5
    return {
        "dense": BlockMask.from_dense(blocks, 70, 90, (32, 32)),
        "shared": BlockMask.from_dense(blocks[:1, :1], 70, 90, (32, 32)),
        "per head": BlockMask.from_dense(blocks[:1], 70, 90, (32, 32)),
        "per batch": BlockMask.from_dense(blocks[:, :1], 70, 90, (32, 32)),
        "scores": BlockMask.from_block_scores(torch.randn(2, 3, 3, 3), 1, 70, 90, (32, 32)),
        "none": BlockMask.from_block_scores(torch.randn(1, 1, 3, 3), 0, 70, 90, (32, 32)),
        "tokens": BlockMask.from_token_mask(token_mask(), (32, 32)),
        "rectangular": BlockMask.from_token_mask(token_mask(), (16, 48)),
        "keys": BlockMask.from_token_mask(torch.rand(2, 90) < 0.5, (32, 16), q_len=70),
        "window": BlockMask.window((7, 9), (2, 1), block_size=16, prefix=3),
        "union": BlockMask.from_token_mask(token_mask(), 32)
        | BlockMask.from_dense(blocks, 70, 90, 32),
    }


NAMES = list(our_masks())


def meaning(flex, batch, heads):
    """What FlexAttention computes: mask_mod on the partial blocks, all of the full ones."""
    q_len, k_len = flex.seq_lengths
    block_q, block_k = flex.BLOCK_SIZE

    def tokens(counts, indices):
        grid = torch.zeros(*counts.shape, -(-k_len // block_k), dtype=torch.bool)
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            grid[(*place, indices[tuple(place)][: counts[tuple(place)]].long())] = True
        grid = grid.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
        return grid[:, :, :q_len, :k_len]

    shown = create_mask(flex.mask_mod, batch, heads, q_len, k_len, device="cpu")
    visible = tokens(flex.kv_num_blocks, flex.kv_indices) & shown
    if flex.full_kv_num_blocks is not None:
        visible = visible | tokens(flex.full_kv_num_blocks, flex.full_kv_indices)
    return visible


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize(("mod", "batch", "heads"), MODS, ids=MOD_IDS)
def test_from_flex_means_its_mask_mod(mod, batch, heads, block_size):
    for q_len, k_len in ((70, 90), (1, 128), (197, 63)):
        flex = create_block_mask(mod, batch, heads, q_len, k_len, "cpu", BLOCK_SIZE=block_size)
        mask = BlockMask.from_flex(flex)
        mask.validate()
        assert (mask.q_len, mask.k_len, mask.block_size) == (q_len, k_len, block_size)
        assert (mask.batch, mask.heads) == (batch or 1, heads or 1)
        expected = create_mask(mod, batch, heads, q_len, k_len, device="cpu")
        assert torch.equal(mask.to_dense(), expected)


def test_from_flex_keeps_full_blocks_full():
    flex = create_block_mask(causal, None, None, 256, 256, "cpu", BLOCK_SIZE=32)
    mask = BlockMask.from_flex(flex)
    assert mask.rows.counts().flatten().tolist() == list(range(8))
    assert mask.partial_rows.counts().flatten().tolist() == [1] * 8
    assert mask.token_bits.shape[2] == 8


def test_from_flex_without_a_mask_mod():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    flex = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)
    expected = torch.tensor([[[[0, 1], [1, 1]]]]).bool()
    expected = expected.repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert torch.equal(BlockMask.from_flex(flex).to_dense(), expected)


def test_from_flex_hides_unlisted_blocks_whatever_mask_mod_says():
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    flex = FlexBlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=16, mask_mod=sliding, seq_lengths=(30, 25)
    )
    dense = BlockMask.from_flex(flex).to_dense()
    assert torch.equal(dense, meaning(flex, 1, 1))
    assert not dense[..., :16].any() and not dense[:, :, 16:].any()


@pytest.mark.parametrize("name", NAMES)
def test_to_flex_means_the_same(name):
    mask = our_masks()[name]
    flex = mask.to_flex()
    assert flex.seq_lengths == (mask.q_len, mask.k_len)
    assert tuple(flex.BLOCK_SIZE) == mask.block_size
    assert torch.equal(meaning(flex, mask.batch, mask.heads), mask.to_dense())
    alone = create_mask(flex.mask_mod, mask.batch, mask.heads, mask.q_len, mask.k_len, device="cpu")
    assert torch.equal(alone, mask.to_dense())


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    mask = our_masks()[name]
    back = BlockMask.from_flex(mask.to_flex())
    back.validate()
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert torch.equal(back.block_states().clamp(max=0), mask.block_states().clamp(max=0))


@pytest.mark.parametrize(("mod", "batch", "heads"), MODS, ids=MOD_IDS)
def test_back_and_there(mod, batch, heads):
    flex = create_block_mask(mod, batch, heads, 140, 200, "cpu", BLOCK_SIZE=(32, 64))
    again = BlockMask.from_flex(flex).to_flex()
    shape = (batch or 1, heads or 1)
    assert torch.equal(meaning(again, *shape), meaning(flex, *shape))


@pytest.mark.parametrize("name", NAMES)
def test_the_flex_mask_has_both_directions(name):
    flex = our_masks()[name].to_flex()
    sides = [(flex.kv_num_blocks, flex.q_num_blocks)]
    sides.append((flex.full_kv_num_blocks, flex.full_q_num_blocks))
    for by_row, by_column in sides:
        assert torch.equal(by_row.sum(-1), by_column.sum(-1))


@pytest.mark.parametrize("name", NAMES)
def test_flex_attention_agrees_with_sdpa(name):
    mask = our_masks()[name]
    q = torch.randn(2, 3, mask.q_len, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, mask.k_len, 16, dtype=torch.float64)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    sees = mask.to_dense().any(-1, keepdim=True)
    found = flex_attention(q, k, v, block_mask=mask.to_flex())
    torch.testing.assert_close(found, expected.where(sees, 0))


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 40), (40, 0)])
def test_no_tokens(q_len, k_len):
    blocks = torch.ones(1, 1, -(-q_len // 16), -(-k_len // 16), dtype=torch.bool)
    flex = BlockMask.from_dense(blocks, q_len, k_len, 16).to_flex()
    assert BlockMask.from_flex(flex).to_dense().shape == (1, 1, q_len, k_len)


def test_from_flex_wants_a_flex_mask():
    with pytest.raises(TypeError) as error:
        BlockMask.from_flex(3)
    assert str(error.value) == (
        "BlockMask.from_flex: mask is 3 (int); "
        "expected a torch.nn.attention.flex_attention.BlockMask"
    )


def test_from_flex_checks_the_block_size():
    flex = create_block_mask(causal, None, None, 64, 64, "cpu", BLOCK_SIZE=8)
    with pytest.raises(ValueError) as error:
        BlockMask.from_flex(flex)
    assert str(error.value) == (
        "BlockMask: block_size is (8, 8); expected one or two multiples of 16 from 16 to 256"
    )
