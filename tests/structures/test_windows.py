"""BlockMask.window against every pair tried."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn import BlockMask
from sparseattn.constants import EMPTY_BLOCK, FULL_BLOCK


def brute_force(shape, radius, prefix):
    """Visible when every axis is within reach; a prefix token sees and is seen by all."""
    places = torch.tensor(list(itertools.product(*map(range, shape)))).view(-1, len(shape))
    near = (places[:, None] - places[None]).abs() <= torch.tensor(radius)
    visible = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    visible[prefix:, prefix:] = near.all(-1)
    return visible[None, None]


def check(shape, radius, block_size=(16, 16), prefix=0):
    mask = BlockMask.window(shape, radius, block_size=block_size, prefix=prefix)
    grid = (shape,) if isinstance(shape, int) else tuple(shape)
    reach = (radius,) * len(grid) if isinstance(radius, int) else tuple(radius)
    expected = brute_force(grid, reach, prefix)
    mask.validate()
    assert (mask.batch, mask.heads) == (1, 1)
    assert mask.q_len == mask.k_len == expected.shape[-1]
    assert torch.equal(mask.to_dense(), expected)
    block_q, block_k = mask.block_size
    states = mask.block_states()[0, 0]
    for row, column in itertools.product(*map(range, states.shape)):
        block = expected[0, 0, row * block_q :, column * block_k :][:block_q, :block_k]
        kind = FULL_BLOCK if block.all() else 0 if block.any() else EMPTY_BLOCK
        assert states[row, column].clamp(max=0) == kind
    return mask


@pytest.mark.parametrize("block_size", [(16, 16), (64, 32), (48, 80), (256, 16)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5, 17, 64])
@pytest.mark.parametrize(
    ("shape", "radius"),
    [
        (100, 3),
        ((9, 13), 2),
        ((13, 9), (1, 4)),
        ((4, 5, 7), 1),
        ((6, 3, 8), (2, 0, 3)),
    ],
    ids=str,
)
def test_every_pair(shape, radius, prefix, block_size):
    check(shape, radius, block_size, prefix)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 127, 197])
@pytest.mark.parametrize("radius", [0, 1, 16, 40, 1000])
def test_odd_lengths(length, radius):
    check(length, radius, (32, 48))


@pytest.mark.parametrize("shape", [7, (7,), (7, 6), (3, 7, 6)], ids=str)
def test_radius_zero_sees_itself(shape):
    mask = check(shape, 0)
    assert torch.equal(mask.to_dense()[0, 0], torch.eye(mask.q_len).bool())


@pytest.mark.parametrize("shape", [70, (7, 10), (3, 7, 6)], ids=str)
@pytest.mark.parametrize("radius", [10, 69, 10**6])
@pytest.mark.parametrize("prefix", [0, 3])
def test_radius_beyond_the_grid_sees_all(shape, radius, prefix):
    mask = check(shape, radius, prefix=prefix)
    if shape != 70 or radius >= 69:
        assert mask.to_dense().all() and mask.token_bits is None


@pytest.mark.parametrize(
    ("shape", "radius"),
    [
        ((1, 40), 2),
        ((40, 1), 2),
        ((1, 1), 3),
        ((1, 1, 40), 2),
        ((1, 40, 1), (0, 2, 0)),
        ((40, 1, 1), 2),
        ((5, 1, 9), (1, 7, 2)),
        ((1,), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_axes_of_size_one(shape, radius, prefix):
    check(shape, radius, prefix=prefix)


def test_a_size_one_axis_changes_nothing():
    flat = BlockMask.window(50, 3, block_size=16).to_dense()
    for shape in ((1, 50), (50, 1), (1, 50, 1), (1, 1, 50)):
        assert torch.equal(BlockMask.window(shape, 3, block_size=16).to_dense(), flat)


@pytest.mark.parametrize("shape", [0, (0, 5), (5, 0), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 20])
def test_empty_grid(shape, prefix):
    mask = BlockMask.window(shape, 2, block_size=16, prefix=prefix)
    mask.validate()
    assert mask.to_dense().shape == (1, 1, prefix, prefix)
    assert mask.to_dense().all()


def test_no_token_bits_without_partial_blocks():
    assert BlockMask.window(64, 100, block_size=16).token_bits is None
    assert BlockMask.window(64, 0, block_size=16).token_bits is not None


def test_lists_hold_nothing_but_the_window():
    mask = BlockMask.window(4096, 64)
    kept = int(mask.rows.counts().sum()), int(mask.partial_rows.counts().sum())
    assert (mask.rows.capacity, mask.partial_rows.capacity) == kept
    assert mask.token_bits.shape[2] == kept[1]


def test_shape_as_list_and_size():
    expected = BlockMask.window((6, 7), (1, 2), block_size=16).to_dense()
    for shape in ([6, 7], torch.Size([6, 7])):
        assert torch.equal(BlockMask.window(shape, [1, 2], block_size=16).to_dense(), expected)


def test_device():
    mask = BlockMask.window(50, 3, device="meta")
    assert mask.device == torch.device("meta")
    assert BlockMask.window(50, 3, device="cpu").device == torch.device("cpu")


def test_symmetric():
    dense = BlockMask.window((7, 9), (2, 1), block_size=16, prefix=3).to_dense()
    assert torch.equal(dense, dense.mT)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    radius=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    prefix=st.integers(0, 20),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda p: (16 * p[0], 16 * p[1])),
)
def test_any_window(shape, radius, prefix, size):
    check(tuple(shape), tuple(radius[: len(shape)]), size, prefix)
