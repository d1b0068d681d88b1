"""Kernels of block selection: the same sets as the torch path, and pooled blocks."""

import math

import pytest
import torch

from sparseattn.kernels.block_select import lists, pool, select, tuning
from sparseattn.structures import selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def hostile_scores(columns):
    """Rows of many ties, signed zeros, hidden and undefined blocks, and the ends of the range."""
    rows = torch.randn(6, columns)
    rows[1] = rows[1].round()
    rows[2] = torch.where(rows[2] > 0, 0.0, -0.0)
    rows[3, ::2] = -math.inf
    rows[4, 1::3] = math.nan
    rows[5] = torch.tensor([math.inf, 3e38, -3e38, 1e-45, -1e-45]).repeat(columns // 5 + 1)[
        :columns
    ]
    return rows[None, None].to(DEVICE)


def kept(scores, *arguments):
    return torch.ops.sparseattn.select_blocks.default(scores, *arguments)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("columns", [1, 5, 37, 256, 2500])  # the last in chunks
def test_counts_are_those_of_the_torch_path(columns):
    scores = hostile_scores(columns)
    for count in {0, 1, columns // 3, columns}:
        expected = selection.top_blocks(scores, count)
        assert torch.equal(kept(scores, count, None, None, None), expected)
        counts = torch.full((1, 1, 6), count, dtype=torch.int32, device=DEVICE)
        assert torch.equal(selection.select_blocks(scores, 0, counts), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("columns", [7, 300, 2100])
def test_budgets_and_weights_are_those_of_the_torch_path(columns):
    scores = hostile_scores(columns)
    always = torch.rand(columns, device=DEVICE) < 0.1
    budgets = torch.tensor([[[0, 1, 3, columns, 2 * columns, columns // 2]]], device=DEVICE).int()
    weights = torch.randint(0, 9, scores.shape, device=DEVICE).int()
    for given in (None, weights):
        expected = selection.select_blocks(scores, 0, budgets, given, always)
        found = selection.select_blocks(scores, 0, budgets, given, always, "triton")
        assert torch.equal(found, expected)


def test_shares_are_those_of_the_sorted_row():
    scores = torch.randn(2, 3, 4, 50, device=DEVICE)
    budgets, weights = selection.share_budgets(scores, 0.7)
    found = selection.select_blocks(scores, 0, budgets, weights, impl="triton")
    shares = scores.double().softmax(-1)
    held = (shares * found).sum(-1)
    least = shares.masked_fill(~found, 2).amin(-1)
    assert (held >= 0.7 - 1e-6).all() and (held - least < 0.7 + 1e-6).all()


def test_scores_may_be_strided_and_shared():
    scores = torch.randn(3, 50, 4, 2, device=DEVICE).permute(3, 0, 2, 1)
    assert torch.equal(select.select(scores, 7), selection.top_blocks(scores, 7))
    shared = torch.randn(1, 1, 4, 50, device=DEVICE).expand(2, 3, -1, -1)
    assert torch.equal(select.select(shared, 7), selection.top_blocks(shared, 7))


def test_lists_follow_from_what_is_kept():
    blocks = select.select(torch.randn(1, 2, 5, 40, device=DEVICE), 3)
    offsets, indices = lists.build(blocks, 15)
    assert torch.equal(offsets.diff(), torch.full_like(offsets[..., 1:], 3))
    assert torch.equal(indices.long().view(1, 2, 5, 3), blocks.nonzero()[:, 3].view(1, 2, 5, 3))


def test_the_first_of_equal_tokens_gets_the_gradient_of_a_maximum():
    x = torch.tensor([1.0, 2.0, 2.0, 0.0]).repeat(24)[:, None].expand(-1, 16).to(DEVICE)[None, None]
    pooled = pool.pool(x, None, 48, "max")
    dx = pool.pool_backward(torch.ones_like(pooled), x, None, pooled, 48, "max")
    assert dx[0, 0, :, 0].nonzero()[:, 0].tolist() == [1, 49]


def test_every_head_dim_and_row_length_has_a_row():
    for head_dim in range(16, 257, 8):
        assert head_dim <= tuning.pick_pool(head_dim).head_dim
    for num_ids in (1, 1024, 1025, 2048, 2049, 10**6):
        row = tuning.pick_select(num_ids)
        assert row.num_ids is None or num_ids <= row.num_ids <= row.chunk
    assert tuning.pick_select(2049).num_ids is None
    with pytest.raises(NotImplementedError, match="no launch row for head dim 257"):
        tuning.pick_pool(257)
