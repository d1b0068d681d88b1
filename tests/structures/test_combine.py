"""Union and intersection against boolean algebra on token masks."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn import BlockMask

Q_LEN, K_LEN, SIZE = 70, 93, (32, 48)  # 3 x 2 blocks, both ends ragged
SHARED = [(1, 1), (1, 3), (2, 1), (2, 3)]
OPERATORS = [operator.or_, operator.and_]


def dense(batch, heads):
    return BlockMask.from_dense(torch.rand(batch, heads, 3, 2) < 0.5, Q_LEN, K_LEN, SIZE)


def scores(batch, heads):
    return BlockMask.from_block_scores(torch.randn(batch, heads, 3, 2), 1, Q_LEN, K_LEN, SIZE)


def tokens(batch, heads):
    keep = torch.rand(batch, heads, Q_LEN, K_LEN) < 0.5
    keep[:, :, :32, :48] = True
    keep[:, :, 32:, :48] &= (torch.rand(batch, heads) < 0.5)[..., None, None]
    return BlockMask.from_token_mask(keep, SIZE)


def keys(batch, heads):
    keep = torch.rand(batch, K_LEN) < 0.5
    keep[0, :48] = True
    return BlockMask.from_token_mask(keep, SIZE, q_len=Q_LEN)


def none(batch, heads):
    return BlockMask.from_dense(torch.zeros(batch, heads, 3, 2).bool(), Q_LEN, K_LEN, SIZE)


def everything(batch, heads):
    return BlockMask.from_token_mask(torch.ones(batch, heads, Q_LEN, K_LEN).bool(), SIZE)


KINDS = [dense, scores, tokens, keys, none, everything]


def combined(join, left, right):
    both = join(left, right)
    both.validate()
    assert torch.equal(both.to_dense(), join(left.to_dense(), right.to_dense()))
    pairs = both.to_dense().double()
    assert both.density().item() == pytest.approx(pairs.mean().item() if pairs.numel() else 0)
    return both


def check_pair(join, left_kind, right_kind, left_shape, right_shape):
    left, right = left_kind(*left_shape), right_kind(*right_shape)
    both = combined(join, left, right)
    assert both.batch == max(left.batch, right.batch)
    assert both.heads == max(left.heads, right.heads)


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("left", KINDS)
def test_all_kinds(left, right, join):
    check_pair(join, left, right, (2, 1), (1, 3))


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
@pytest.mark.parametrize("kinds", [(dense, dense), (tokens, dense), (keys, tokens)])
@pytest.mark.parametrize("right", SHARED)
@pytest.mark.parametrize("left", SHARED)
def test_all_shapes(left, right, kinds, join):
    check_pair(join, *kinds, left, right)


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
def test_new_memory_is_written_before_it_is_read(join, poisoned_memory):
    check_pair(join, tokens, keys, (1, 3), (2, 1))
    check_pair(join, dense, tokens, (2, 3), (1, 1))


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
def test_operands_stay_as_they_are(join):
    left, right = tokens(2, 3), keys(2, 1)
    before = left.to_dense(), right.to_dense()
    join(left, right)
    assert torch.equal(left.to_dense(), before[0]) and torch.equal(right.to_dense(), before[1])


@pytest.mark.parametrize("block_size", [(16, 16), (16, 256), (80, 48)], ids=str)
def test_windows_with_block_masks(block_size):
    window = BlockMask.window((8, 9), 2, block_size=block_size, prefix=2)
    shape = (2, 3, window.num_q_blocks, window.num_k_blocks)
    blocks = BlockMask.from_dense(torch.rand(shape) < 0.5, 74, 74, block_size)
    padding = BlockMask.from_token_mask(torch.rand(2, 74) < 0.8, block_size)
    for join in OPERATORS:
        combined(join, combined(join, window, blocks), padding)
        combined(join, padding, combined(join, blocks, window))


def test_three_in_any_order():
    a, b, c = tokens(2, 1), dense(1, 3), keys(2, 1)
    assert torch.equal(((a | b) & c).to_dense(), ((a & c) | (b & c)).to_dense())
    assert torch.equal(((a & b) | c).to_dense(), ((a | c) & (b | c)).to_dense())


def test_with_itself():
    for kind in KINDS:
        mask = kind(2, 3)
        assert torch.equal((mask | mask).to_dense(), mask.to_dense())
        assert torch.equal((mask & mask).to_dense(), mask.to_dense())


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
@pytest.mark.parametrize("shape", [(0, 1, 3, 2), (1, 0, 3, 2)], ids=str)
def test_no_batch_or_no_heads(shape, join):
    nothing = BlockMask.from_dense(torch.zeros(shape).bool(), Q_LEN, K_LEN, SIZE)
    for other in (tokens(1, 1), dense(1, 1)):
        combined(join, nothing, other)
        combined(join, other, nothing)


@pytest.mark.parametrize("join", OPERATORS, ids=["or", "and"])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_no_tokens(q_len, k_len, join):
    keep = torch.rand(1, 1, q_len, k_len) < 0.5
    left = BlockMask.from_token_mask(keep, 16)
    combined(join, left, left)
    blocks = torch.ones(1, 1, -(-q_len // 16), -(-k_len // 16), dtype=torch.bool)
    right = BlockMask.from_dense(blocks, q_len, k_len, 16)
    combined(join, left, right)


def test_disjoint_capacities_do_not_lose_entries():
    """Each operand has room for its own partial blocks only; the union has both."""
    left = BlockMask.window(160, 2, block_size=16)
    shifted = BlockMask.from_token_mask(torch.ones(1, 1, 160, 160).bool().triu(40).tril(50), 16)
    combined(operator.or_, left, shifted)
    combined(operator.or_, left, left)
    exact = BlockMask.from_states(
        shifted.block_states(), shifted.token_bits, 160, 160, (16, 16), (0, 30)
    )
    combined(operator.or_, left, exact)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    lengths=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    size=st.sampled_from([(16, 16), (32, 16), (48, 80), (256, 32)]),
    shapes=st.tuples(st.sampled_from(SHARED), st.sampled_from(SHARED)),
    shares=st.tuples(*[st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])] * 2),
    join=st.sampled_from(OPERATORS),
)
def test_any_two_masks(lengths, size, shapes, shares, join):
    left, right = (
        BlockMask.from_token_mask(torch.rand(*shape, *lengths) < share, size)
        for shape, share in zip(shapes, shares, strict=True)
    )
    combined(join, left, right)
