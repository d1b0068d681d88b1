"""BlockMask.from_block_scores against a top-k written out in Python."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn import BlockMask
from sparseattn.constants import FULL_BLOCK

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def naive(scores, count, always=None):
    """Each row keeps its `count` highest; equal scores go to the lowest block."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row = scores[tuple(place)].tolist()
        usable = [c for c, score in enumerate(row) if not math.isnan(score) and score > -math.inf]
        usable.sort(key=lambda c: (-row[c], c))
        kept[(*place, usable[:count])] = True
    return kept if always is None else kept | always.expand(scores.shape)


def kept_blocks(scores, keep, always=None, size=16):
    q_len, k_len = scores.shape[2] * size, scores.shape[3] * size
    mask = BlockMask.from_block_scores(scores, keep, q_len, k_len, size, always)
    mask.validate()
    assert mask.partial_rows is None
    return mask.block_states() == FULL_BLOCK


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keep", [0, 1, 2, 6, 7])
def test_keeps_the_highest(keep, dtype):
    scores = torch.randn(2, 3, 5, 7).to(dtype)
    assert torch.equal(kept_blocks(scores, keep), naive(scores, keep))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keep", [1, 3, 8, 20])
def test_ties_go_to_the_lowest_block(keep, dtype):
    scores = torch.randint(0, 3, (2, 2, 16, 20)).to(dtype)
    assert torch.equal(kept_blocks(scores, keep), naive(scores, keep))
    constant = torch.zeros(1, 1, 4, 20, dtype=dtype)
    expected = (torch.arange(20) < keep).expand(1, 1, 4, 20)
    assert torch.equal(kept_blocks(constant, keep), expected)


def test_positive_and_negative_zero_tie():
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0]).view(1, 1, 1, 4)
    assert kept_blocks(scores, 2).flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_unusable_scores_are_never_kept(value):
    scores = torch.randn(1, 2, 6, 9)
    scores[torch.rand(scores.shape) < 0.6] = value
    scores[:, :, 0] = value  # an empty row
    for keep in (1, 4, 9):
        kept = kept_blocks(scores, keep)
        assert torch.equal(kept, naive(scores, keep))
        assert not kept[:, :, 0].any()


def test_infinite_scores_are_kept_first():
    inf, nan = math.inf, math.nan
    scores = torch.tensor([nan, 1.0, inf, -inf, inf, 3.4e38, nan, -3.4e38]).view(1, 1, 1, 8)
    kept = [kept_blocks(scores, keep).flatten().nonzero().flatten().tolist() for keep in range(9)]
    assert kept[1:] == [
        [2],
        [2, 4],
        [2, 4, 5],
        [1, 2, 4, 5],
        [1, 2, 4, 5, 7],
        [1, 2, 4, 5, 7],
        [1, 2, 4, 5, 7],
        [1, 2, 4, 5, 7],
    ]


def test_a_nan_does_not_reach_other_rows():
    scores = torch.randn(2, 2, 4, 6)
    dirty = scores.clone()
    dirty[0, 0, 0] = math.nan
    clean, kept = kept_blocks(scores, 3), kept_blocks(dirty, 3)
    clean[0, 0, 0] = False
    assert torch.equal(kept, clean)


def test_keep_above_the_number_of_blocks_keeps_all():
    scores = torch.randn(1, 1, 3, 5)
    assert kept_blocks(scores, 6).all() and kept_blocks(scores, 10**9).all()
    mask = BlockMask.from_block_scores(scores, 10**9, 48, 80, 16)
    assert mask.rows.capacity == 15


def test_keep_nothing(poisoned_memory):
    mask = BlockMask.from_block_scores(torch.randn(2, 3, 4, 5), 0, 64, 80, 16)
    mask.validate()
    assert not mask.to_dense().any()
    assert mask.rows.capacity == 0 and mask.density().item() == 0


def counts_for(keep, columns):
    mask = BlockMask.from_block_scores(torch.randn(1, 1, 1, columns), keep, 16, 16 * columns, 16)
    return mask.rows.counts().item()


@pytest.mark.parametrize(
    ("keep", "columns", "expected"),
    [(0.5, 7, 4), (0.1, 10, 1), (1e-9, 10, 1), (1.0, 7, 7), (0.999, 7, 7), (0.25, 8, 2)],
)
def test_a_fraction_rounds_up(keep, columns, expected):
    assert counts_for(keep, columns) == expected


@pytest.mark.parametrize("columns", [25, 50, 100, 200])
def test_a_fraction_as_written(columns):
    # 0.07 * 100 is 7.000000000000001 in floating point; seven blocks of a hundred are meant
    wrong = {}
    for percent in range(1, 101):
        expected = math.ceil(Fraction(percent, 100) * columns)
        found = counts_for(percent / 100, columns)
        if found != expected:
            wrong[percent / 100] = (found, expected)
    assert wrong == {}


def test_an_int_one_is_a_count_and_a_float_one_is_all():
    assert counts_for(1, 8) == 1 and counts_for(1.0, 8) == 8


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (5, 7), (7,), (5, 1), ()], ids=str
)
def test_always_is_added(shape):
    scores = torch.randn(2, 3, 5, 7)
    scores[0, 0, 0] = -math.inf  # kept by `always` even so
    always = torch.rand(shape) < 0.3
    for keep in (0, 2, 7):
        assert torch.equal(kept_blocks(scores, keep, always), naive(scores, keep, always))


def test_always_does_not_displace_the_top():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0]).view(1, 1, 1, 4)
    always = torch.tensor([True, False, False, True])
    assert kept_blocks(scores, 2, always).flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize("length", [0, 1, 63, 65, 127, 197, 577])
def test_odd_lengths(length):
    scores = torch.randn(1, 2, -(-length // 48), -(-length // 80))
    mask = BlockMask.from_block_scores(scores, 2, length, length, (48, 80))
    mask.validate()
    tokens = naive(scores, 2)[:, :, torch.arange(length)[:, None] // 48, torch.arange(length) // 80]
    assert torch.equal(mask.to_dense(), tokens)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 0, 4), (1, 1, 3, 0)], ids=str)
def test_empty_dimensions(shape):
    for keep in (0, 2, 0.5):
        assert kept_blocks(torch.randn(shape), keep).shape == shape


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.mT.contiguous().mT,
        lambda s: s[:, :, :, :1].expand(s.shape),
        lambda s: s[:1, :1].expand(s.shape),
        lambda s: s.permute(1, 0, 2, 3),
        lambda s: torch.stack([s, -s], -1)[..., 1],
        lambda s: s.clone().requires_grad_(),
        lambda s: s.clone().requires_grad_() * 2,
    ],
    ids=["transposed", "columns", "shared", "permuted", "strided", "leaf", "graph"],
)
def test_scores_of_any_kind(change):
    scores = change(torch.randn(2, 2, 6, 5))
    before = scores.detach().clone()
    assert torch.equal(kept_blocks(scores, 2), naive(before, 2))
    assert torch.equal(scores, before)


def test_the_mask_carries_no_graph():
    scores = torch.randn(1, 1, 4, 5, requires_grad=True)
    mask = BlockMask.from_block_scores(scores * 2, 2, 64, 80, 16)
    tensors = []
    mask.map(lambda tensor: tensors.append(tensor) or tensor)
    assert not any(tensor.requires_grad for tensor in tensors)


def test_equal_bits_every_time(poisoned_memory):
    scores = torch.randint(0, 4, (2, 2, 32, 40)).float()
    first = BlockMask.from_block_scores(scores, 7, 512, 640, 16)
    for _ in range(5):
        again = BlockMask.from_block_scores(scores.clone(), 7, 512, 640, 16)
        assert torch.equal(first.rows.indices, again.rows.indices)
        assert torch.equal(first.columns.indices, again.columns.indices)


def test_a_sample_does_not_depend_on_its_batch_mates():
    scores = torch.randn(3, 2, 8, 9)
    other = scores.clone()
    other[1:] = torch.randn(2, 2, 8, 9) * 100
    first, second = (BlockMask.from_block_scores(s, 3, 128, 144, 16) for s in (scores, other))
    assert torch.equal(first.rows.indices[0], second.rows.indices[0])
    assert torch.equal(first.columns.indices[0], second.columns.indices[0])


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    rows=st.integers(0, 6),
    columns=st.integers(0, 20),
    keep=st.one_of(st.integers(0, 25), st.sampled_from([0.01, 0.125, 0.5, 0.75, 1.0])),
    levels=st.integers(1, 30),
    unusable=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(FLOATS),
)
def test_any_scores(rows, columns, keep, levels, unusable, dtype):
    scores = torch.randint(0, levels, (2, 1, rows, columns)).to(dtype) - levels // 2
    bad = torch.rand(scores.shape) < unusable
    scores[bad] = torch.tensor([math.nan, -math.inf, math.inf]).to(dtype)[
        torch.randint(0, 3, (int(bad.sum()),))
    ]
    count = math.ceil(keep * columns) if isinstance(keep, float) else keep
    assert torch.equal(kept_blocks(scores, keep), naive(scores, count))
