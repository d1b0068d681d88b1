"""BlockMask from block booleans, and what the value itself promises."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseattn import BlockMask
from sparseattn.constants import EMPTY_BLOCK, FULL_BLOCK

LENGTHS = [(0, 65), (1, 1), (63, 127), (65, 0), (127, 577), (197, 197), (577, 63)]
SIZES = [(16, 16), (64, 64), (64, 128), (128, 32), (48, 80), (96, 48), (256, 256), (16, 256)]
SHARED = [(1, 1), (1, 3), (2, 1), (2, 3)]


def num_blocks(q_len, k_len, block_size):
    return -(-q_len // block_size[0]), -(-k_len // block_size[1])


def spread(blocks, q_len, k_len, block_size):
    """The definition of from_dense: pair (i, j) looks its block up."""
    rows = torch.arange(q_len) // block_size[0]
    columns = torch.arange(k_len) // block_size[1]
    return blocks[:, :, rows[:, None], columns]


def token_mask(batch=2, heads=3, q_len=65, k_len=77):
    """Full, partial and empty blocks of 16 x 16 and 16 x 32."""
    keep = torch.rand(batch, heads, q_len, k_len) < 0.5
    keep[:, :, :32, :32] = True
    keep[:, :, 32:, :32] = False
    return keep


def tensors(mask):
    found = []
    mask.map(lambda tensor: found.append(tensor) or tensor)
    return found


def assert_same(mask, other):
    assert (mask.q_len, mask.k_len, mask.block_size) == (
        other.q_len,
        other.k_len,
        other.block_size,
    )
    pairs = list(zip(tensors(mask), tensors(other), strict=True))
    assert pairs and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_from_dense_means_its_blocks(q_len, k_len, block_size):
    for batch, heads in SHARED:
        blocks = torch.rand(batch, heads, *num_blocks(q_len, k_len, block_size)) < 0.4
        mask = BlockMask.from_dense(blocks, q_len, k_len, block_size)
        mask.validate()
        expected = spread(blocks, q_len, k_len, block_size)
        assert mask.to_dense().dtype == torch.bool
        assert torch.equal(mask.to_dense(), expected)
        states = torch.where(blocks, FULL_BLOCK, EMPTY_BLOCK).to(torch.int32)
        assert torch.equal(mask.block_states(), states)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    size=st.tuples(st.integers(1, 16), st.integers(1, 16)).map(lambda p: (16 * p[0], 16 * p[1])),
    shared=st.sampled_from([(0, 1), (1, 0), *SHARED]),
    share=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
)
def test_from_dense_of_anything(lengths, size, shared, share):
    blocks = torch.rand(*shared, *num_blocks(*lengths, size)) < share
    mask = BlockMask.from_dense(blocks, *lengths, size)
    mask.validate()
    assert torch.equal(mask.to_dense(), spread(blocks, *lengths, size))


@pytest.mark.parametrize("share", ["none", "one", "all", "empty row", "empty column"])
def test_extreme_blocks(share, poisoned_memory):
    blocks = torch.full((2, 1, 5, 4), share in ("all", "empty row", "empty column"))
    if share == "one":
        blocks[1, 0, 2, 3] = True
    elif share == "empty row":
        blocks[:, :, 2] = False
    elif share == "empty column":
        blocks[..., 1] = False
    mask = BlockMask.from_dense(blocks, 77, 64, 16)
    mask.validate()
    assert torch.equal(mask.to_dense(), spread(blocks, 77, 64, (16, 16)))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.mT.contiguous().mT,
        lambda b: b.flip(-1).flip(-1),
        lambda b: torch.cat([b, b], -1)[..., ::2][..., :1].expand(b.shape),
        lambda b: b[:, :, :, :1].expand(b.shape),
        lambda b: b[:1, :1].expand(b.shape),
        lambda b: b.permute(1, 0, 2, 3),
        lambda b: torch.stack([b, ~b], -1)[..., 1],
    ],
    ids=["transposed", "flipped", "stepped", "columns", "shared", "permuted", "strided"],
)
def test_blocks_of_any_strides(change):
    blocks = change(torch.rand(2, 2, 6, 5) < 0.5)
    before = blocks.clone()
    mask = BlockMask.from_dense(blocks, 96, 80, 16)
    assert torch.equal(mask.to_dense(), spread(before, 96, 80, (16, 16)))
    assert torch.equal(blocks, before)


def test_the_mask_does_not_alias_its_source():
    blocks = torch.rand(1, 1, 6, 5) < 0.5
    mask = BlockMask.from_dense(blocks, 96, 80, 16)
    before = mask.to_dense()
    blocks.logical_not_()
    assert torch.equal(mask.to_dense(), before)


def test_properties():
    blocks = torch.ones(2, 3, 4, 2, dtype=torch.bool)
    mask = BlockMask.from_dense(blocks, 100, 101, (32, 64))
    assert (mask.q_len, mask.k_len, mask.block_size) == (100, 101, (32, 64))
    assert (mask.batch, mask.heads) == (2, 3)
    assert (mask.num_q_blocks, mask.num_k_blocks) == (4, 2)
    assert mask.device == torch.device("cpu")


@pytest.mark.parametrize("block_size", [32, [32, 32], (32, 32)])
def test_block_size_becomes_a_pair(block_size):
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask = BlockMask.from_dense(blocks, 64, 64, block_size)
    assert mask.block_size == (32, 32)
    assert isinstance(mask.block_size, tuple)
    by_hand = BlockMask(64, 64, block_size, mask.rows, mask.columns)
    assert by_hand.block_size == (32, 32)
    assert torch.equal((by_hand | mask).to_dense(), mask.to_dense())


def test_default_block_size():
    assert BlockMask.from_dense(torch.ones(1, 1, 2, 3).bool(), 128, 129).block_size == (64, 64)


@pytest.mark.parametrize("block_size", [(16, 16), (16, 32), (48, 80)])
def test_density_is_the_visible_share(block_size):
    keep = token_mask()
    mask = BlockMask.from_token_mask(keep, block_size)
    assert mask.density().dtype == torch.float64 and mask.density().shape == ()
    assert mask.density().item() == keep.double().mean().item()


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_density_counts_tokens_not_blocks(q_len, k_len):
    blocks = torch.rand(2, 3, *num_blocks(q_len, k_len, (64, 32))) < 0.5
    mask = BlockMask.from_dense(blocks, q_len, k_len, (64, 32))
    seen = spread(blocks, q_len, k_len, (64, 32)).double()
    expected = seen.mean().item() if seen.numel() else 0.0
    assert mask.density().item() == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: BlockMask.from_dense(torch.rand(2, 3, 5, 7) < 0.5, 80, 112, 16),
        lambda: BlockMask.from_token_mask(torch.rand(2, 3, 40, 50) < 0.5, (16, 32)),
        lambda: BlockMask.from_token_mask(torch.rand(2, 50) < 0.5, (16, 32), q_len=20),
        lambda: BlockMask.window((5, 7), 2, block_size=16, prefix=1),
        lambda: BlockMask.from_dense(torch.zeros(1, 1, 0, 0).bool(), 0, 0),
    ],
    ids=["full", "partial", "keys", "window", "empty"],
)
def test_copies_mean_the_same(build):
    mask = build()
    assert_same(mask, copy.copy(mask))
    assert_same(mask, copy.deepcopy(mask))
    assert_same(mask, pickle.loads(pickle.dumps(mask)))
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    assert_same(mask, torch.load(file, weights_only=False))
    assert_same(mask, mask.map(torch.clone))
    assert_same(mask, mask.to("cpu"))
    if tensors(mask)[0].numel():
        assert copy.deepcopy(mask).rows.offsets.data_ptr() != mask.rows.offsets.data_ptr()


def test_to_moves_every_tensor():
    mask = BlockMask.from_token_mask(token_mask(), (16, 32))
    moved = mask.to("meta")
    assert moved.device == torch.device("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors(moved))
    assert all(tensor.device.type == "cpu" for tensor in tensors(mask))
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(mask)]


def test_to_does_not_change_dtypes():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2).bool(), 128, 128)
    with pytest.raises((TypeError, RuntimeError)):
        mask.to(torch.float16)


def test_map_reaches_every_tensor_once():
    seen = []
    mask = BlockMask.from_token_mask(token_mask(), (16, 32))
    mask.map(lambda tensor: seen.append(tensor.data_ptr()) or tensor)
    parts = [mask.rows, mask.columns, mask.partial_rows, mask.partial_columns]
    expected = [getattr(part, name) for part in parts for name in ("offsets", "indices", "slots")]
    expected = [t.data_ptr() for t in [*expected, mask.token_bits] if t is not None]
    assert sorted(seen) == sorted(expected)


def test_frozen():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2).bool(), 128, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.q_len = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.rows.indices = None
    assert mask == mask and mask != copy.copy(mask)  # identity: tensors have no cheap equality
    assert {mask: 1}[mask] == 1


def test_repr():
    mask = BlockMask.from_dense(torch.ones(2, 3, 2, 2).bool(), 100, 128)
    assert repr(mask) == (
        "BlockMask(q_len=100, k_len=128, block_size=(64, 64), batch=2, heads=3, "
        "no partial blocks, device='cpu')"
    )
    mask = BlockMask.from_token_mask(torch.ones(1, 1, 20, 20).bool(), 16).to("meta")
    assert repr(mask) == (
        "BlockMask(q_len=20, k_len=20, block_size=(16, 16), batch=1, heads=1, "
        "with partial blocks, device='meta')"
    )


def test_docstring_example():
    mask = BlockMask.from_dense(torch.tensor([[[[1, 0, 0, 1], [0, 1, 0, 0]]]]).bool(), 128, 256)
    assert mask.rows.offsets.tolist() == [[[0, 2, 3]]]
    assert mask.rows.indices.tolist() == [[[0, 3, 1, -1, -1, -1, -1, -1]]]
    assert mask.columns.indices.tolist() == [[[0, 1, 0, -1, -1, -1, -1, -1]]]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_built_under_any_grad_mode(context):
    keep = token_mask()
    with context():
        mask = BlockMask.from_token_mask(keep, 16) | BlockMask.from_dense(
            torch.zeros(1, 1, 5, 5).bool(), 65, 77, 16
        )
        assert torch.equal(mask.to_dense(), keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    scores = torch.randn(2, 3, 5, 40)
    keep = token_mask()
    plain = BlockMask.from_block_scores(scores, 7, 80, 640, 16)
    tokens = BlockMask.from_token_mask(keep, 16)
    with torch.autocast("cpu", dtype):
        assert_same(plain, BlockMask.from_block_scores(scores, 7, 80, 640, 16))
        assert_same(tokens, BlockMask.from_token_mask(keep, 16))
        assert tokens.density().dtype == torch.float64
        assert tokens.density().item() == keep.double().mean().item()
