"""BlockMask from token masks, and the packed bits of partial blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseattn import BlockMask
from sparseattn.constants import BITS_PER_WORD, EMPTY_BLOCK, FULL_BLOCK
from sparseattn.structures import token_bits

LENGTHS = [(0, 65), (1, 1), (63, 127), (65, 0), (127, 63), (197, 197), (577, 127)]
SIZES = [(16, 16), (64, 64), (64, 128), (128, 32), (48, 80), (96, 48), (256, 256), (16, 256)]
SHARED = [(1, 1), (1, 3), (2, 1), (2, 3)]


def mixed(batch, heads, q_len, k_len, block_size):
    """A token mask in which empty, full and partial blocks all occur."""
    keep = torch.rand(batch, heads, q_len, k_len) < 0.5
    kind = torch.randint(0, 3, (batch, heads, 1 + q_len // 16, 1 + k_len // 16))
    rows, columns = torch.arange(q_len) // block_size[0], torch.arange(k_len) // block_size[1]
    kind = kind[:, :, rows[:, None], columns]
    return torch.where(kind == 0, False, torch.where(kind == 1, True, keep))


def naive_states(keep, block_size):
    """-1 empty, -2 full, 0 partial: a ragged block at an end is full when all it has is kept."""
    belongs = []
    for length, size in zip(keep.shape[2:], block_size, strict=True):
        blocks = torch.arange(-(-length // size))
        belongs.append((blocks[:, None] == torch.arange(length) // size).double())
    kept = belongs[0] @ keep.double() @ belongs[1].T
    there = belongs[0] @ torch.ones_like(keep).double() @ belongs[1].T
    states = torch.where(kept == 0, EMPTY_BLOCK, torch.where(kept == there, FULL_BLOCK, 0))
    return states.int()


def check(keep, mask, block_size):
    mask.validate()
    assert torch.equal(mask.to_dense(), keep)
    states = naive_states(keep, block_size)
    assert torch.equal(mask.block_states().clamp(max=0), states)


def bits_past_the_end(mask, block_size):
    """Whether a partial block has a bit of a query or key that does not exist."""
    if mask.token_bits is None:
        return False
    states = mask.block_states()
    every = token_bits.unpack(
        token_bits.fetch(mask.token_bits, states), 32 * -(-block_size[1] // 32)
    )
    query = torch.arange(states.shape[2])[:, None] * block_size[0] + torch.arange(block_size[0])
    bit = torch.arange(every.shape[-1])
    key = torch.arange(states.shape[3])[:, None] * block_size[1] + bit
    key_ok = (key < mask.k_len) & (bit < block_size[1])  # [C, bits]
    ok = (query < mask.q_len)[:, None, :, None] & key_ok[None, :, None, :]
    return bool((every & ~ok).any())


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_means_its_tokens(q_len, k_len, block_size):
    for batch, heads in [(1, 1), (2, 3)]:
        keep = mixed(batch, heads, q_len, k_len, block_size)
        mask = BlockMask.from_token_mask(keep, block_size)
        check(keep, mask, block_size)
        assert not bits_past_the_end(mask, block_size)


def test_default_block_size():
    assert BlockMask.from_token_mask(torch.ones(1, 1, 5, 5).bool()).block_size == (64, 64)


@pytest.mark.parametrize("value", [False, True])
def test_all_alike(value, poisoned_memory):
    keep = torch.full((1, 2, 65, 47), value)
    mask = BlockMask.from_token_mask(keep, (32, 16))
    check(keep, mask, (32, 16))
    assert int(mask.partial_rows.counts().sum()) == 0


@pytest.mark.parametrize("place", [(0, 0), (64, 46), (31, 16), (33, 15)])
@pytest.mark.parametrize("value", [False, True])
def test_one_odd_token(place, value, poisoned_memory):
    keep = torch.full((1, 1, 65, 47), not value)
    keep[0, 0, place[0], place[1]] = value
    mask = BlockMask.from_token_mask(keep, (32, 16))
    check(keep, mask, (32, 16))
    assert int(mask.partial_rows.counts().sum()) == 1


def test_a_ragged_tail_that_is_all_kept_is_full():
    mask = BlockMask.from_token_mask(torch.ones(1, 1, 65, 97).bool(), (64, 48))
    assert (mask.block_states() == FULL_BLOCK).all()


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_key_form(q_len, k_len, block_size):
    keep = torch.rand(3, k_len) < 0.7
    keep[1:, : k_len // 2] = True
    keep[2:, k_len // 2 :] = False
    mask = BlockMask.from_token_mask(keep, block_size, q_len=q_len)
    assert (mask.batch, mask.heads, mask.q_len, mask.k_len) == (3, 1, q_len, k_len)
    mask.validate()
    assert torch.equal(mask.to_dense(), keep[:, None, None].expand(3, 1, q_len, k_len))
    share = mask.to_dense().double().mean().item() if q_len * k_len else 0.0
    assert mask.density().item() == pytest.approx(share, abs=1e-12)


def test_key_form_has_as_many_queries_as_keys_by_default():
    mask = BlockMask.from_token_mask(torch.rand(2, 45) < 0.5, 16)
    assert (mask.q_len, mask.k_len) == (45, 45)


def test_key_form_shares_bits_between_rows():
    keep = torch.rand(2, 4096) < 0.5
    mask = BlockMask.from_token_mask(keep)
    assert mask.token_bits.untyped_storage().nbytes() <= keep.numel()


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.mT.contiguous().mT,
        lambda k: k[:, :, :1].expand(k.shape),
        lambda k: k[..., :1].expand(k.shape),
        lambda k: k[:1, :1].expand(k.shape),
        lambda k: k.permute(1, 0, 2, 3),
        lambda k: torch.stack([k, ~k], -1)[..., 1],
        lambda k: k.flip(-1),
    ],
    ids=["transposed", "rows", "columns", "shared", "permuted", "strided", "flipped"],
)
def test_tokens_of_any_strides(change):
    keep = change(torch.rand(2, 2, 70, 50) < 0.5)
    before = keep.clone()
    mask = BlockMask.from_token_mask(keep, (32, 16))
    check(before, mask, (32, 16))
    assert torch.equal(keep, before)


def test_key_form_of_any_strides():
    keep = (torch.rand(50, 3) < 0.5).mT
    mask = BlockMask.from_token_mask(keep, 16)
    assert torch.equal(mask.to_dense(), keep[:, None, None].expand(3, 1, 50, 50))
    keep = (torch.rand(1, 50) < 0.5).expand(3, 50)
    mask = BlockMask.from_token_mask(keep, 16)
    assert torch.equal(mask.to_dense(), keep[:, None, None].expand(3, 1, 50, 50))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    lengths=st.tuples(st.integers(0, 150), st.integers(0, 150)),
    size=st.tuples(st.integers(1, 16), st.integers(1, 16)).map(lambda p: (16 * p[0], 16 * p[1])),
    shared=st.sampled_from([(0, 1), (1, 0), *SHARED]),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
)
def test_any_token_mask(lengths, size, shared, share):
    keep = torch.rand(*shared, *lengths) < share
    mask = BlockMask.from_token_mask(keep, size)
    check(keep, mask, size)
    assert not bits_past_the_end(mask, size)


@pytest.mark.parametrize("block_k", [16, 32, 48, 64, 80, 96, 256])
def test_pack_and_unpack(block_k):
    keep = torch.rand(3, 5, block_k) < 0.5
    bits = token_bits.pack(keep)
    assert bits.dtype == torch.int32 and bits.is_contiguous()
    assert bits.shape == (3, 5, token_bits.words_per_row(block_k))
    assert token_bits.words_per_row(block_k) == -(-block_k // BITS_PER_WORD)
    assert torch.equal(token_bits.unpack(bits, block_k), keep)
    for place in ((0, 0), (2, 4), (1, 3)):
        words = [word % 2**32 for word in bits[place].tolist()]
        expected = [sum(int(v) << i for i, v in enumerate(part)) for part in keep[place].split(32)]
        assert words == expected
    assert torch.equal(token_bits.popcount(bits).sum(-1), keep.sum(-1).int())


def test_pack_takes_any_strides():
    keep = (torch.rand(48, 6, 5) < 0.5).permute(2, 1, 0)
    assert torch.equal(token_bits.unpack(token_bits.pack(keep), 48), keep)
    keep = (torch.rand(5, 1) < 0.5).expand(5, 64)
    assert torch.equal(token_bits.unpack(token_bits.pack(keep), 64), keep)
    words = token_bits.pack(torch.rand(4, 6, 64) < 0.5).transpose(0, 2)
    assert torch.equal(token_bits.pack(token_bits.unpack(words, 128)), words)


def test_pack_of_nothing():
    assert token_bits.pack(torch.zeros(0, 16, 48).bool()).shape == (0, 16, 2)
    assert token_bits.unpack(torch.zeros(0, 16, 2, dtype=torch.int32), 48).shape == (0, 16, 48)


def test_popcount_of_every_kind_of_word():
    edges = [0, 1, -1, 2**31 - 1, -(2**31), 0x55555555, 0x0F0F0F0F, -0x55555556, 0x7F7F7F7F]
    single = [1 << i for i in range(31)]
    words = torch.tensor(edges + single + [~w for w in single], dtype=torch.int32)
    random = torch.randint(-(2**31), 2**31, (5000,), dtype=torch.int64).int()
    for bits in (words, random):
        expected = [bin(word % 2**32).count("1") for word in bits.tolist()]
        assert token_bits.popcount(bits).tolist() == expected
        assert token_bits.popcount(bits).dtype == torch.int32


def test_density_memory_follows_the_partial_blocks():
    """A window shows 0.1 % of its million block pairs; the other bits need not exist."""
    mask = BlockMask.window(16384, 8, block_size=16)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            largest.extend(tensor.numel() * tensor.element_size() for tensor in made)
            return out

    with Watch():
        density = mask.density()
    visible = 16384 * 17 - 8 * 9
    assert density.item() == pytest.approx(visible / 16384**2, rel=1e-12)
    blocks = mask.num_q_blocks * mask.num_k_blocks
    assert max(largest) <= 8 * blocks  # an int64 per block pair, not the bits of every pair
