"""Tiles loaded by descriptor (TMA) give the same bits as tiles loaded by pointer."""

import pytest
import torch

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.kernels import launch
from sparseattn.kernels.block_attention import tuning

NAMES = ("FORWARD", "BACKWARD_DKV", "BACKWARD_DQ")


@pytest.fixture
def described(monkeypatch):
    """Record what a launch describes: (tokens, tile)."""
    made = []
    describe = launch.describe

    def record(tensor, rows, columns):
        made.append((tensor.shape[2], rows))
        return describe(tensor, rows, columns)

    monkeypatch.setattr(launch, "describe", record)
    return made


def by_pointer(monkeypatch):
    for name in NAMES:
        table = tuple(row._replace(tma=False) for row in getattr(tuning, name))
        monkeypatch.setattr(tuning, name, table)


def inputs(q_len=90, k_len=75, heads=4, key_heads=2, head_dim=32, dtype=torch.float16):
    q = torch.randn(2, heads, q_len, head_dim)
    k, v = torch.randn(2, 2, key_heads, k_len, head_dim)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def mask_of(q_len, k_len, tokens=False):
    blocks = (-(-q_len // 32), -(-k_len // 32))
    if tokens:
        return BlockMask.from_token_mask(torch.rand(1, 4, q_len, k_len) < 0.5, (32, 32))
    keep = torch.rand(2, 4, *blocks) < 0.6
    keep[..., 0] = True
    return BlockMask.from_dense(keep, q_len, k_len, (32, 32))


def results(qkv, mask, **extras):
    out, lse = block_sparse_attention(*qkv, mask, return_lse=True, impl="triton", **extras)
    gradients = torch.autograd.grad((out.float() ** 2).sum() + lse.sum(), qkv)
    return out, lse, *gradients


CASES = {  # what the inputs are, and how many of k and v (twice), q and dout are described
    "plain": ({}, {}, 6),
    "one query and key": ({"q_len": 1, "k_len": 1}, {}, 6),
    "spare columns": ({"head_dim": 24}, {}, 6),
    "partial blocks": ({}, {"tokens": True}, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_descriptors_give_the_bits_of_pointers(name, monkeypatch, described, poisoned_memory):
    sizes, mask_options, count = CASES[name]
    qkv = inputs(**sizes)
    mask = mask_of(qkv[0].shape[2], qkv[1].shape[2], **mask_options)
    by_descriptor = results(qkv, mask)
    assert len(described) == count
    by_pointer(monkeypatch)
    for found, expected in zip(by_descriptor, results(qkv, mask), strict=True):
        assert torch.equal(found, expected)
    assert len(described) == count


def test_gates_leave_queries_to_pointers(monkeypatch, described):
    # a gate of -inf can leave a query with nothing, and then it may hold NaN
    qkv, mask = inputs(), mask_of(90, 75)
    gate = torch.randn(2, 4, 3, 3)
    by_descriptor = results(qkv, mask, block_gate=gate)
    assert [tokens for tokens, _ in described] == [75] * 4
    by_pointer(monkeypatch)
    for found, expected in zip(by_descriptor, results(qkv, mask, block_gate=gate), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "why", ["hidden keys", "two chunks", "unaligned rows", "unaligned start", "expanded", "float32"]
)
def test_what_a_descriptor_cannot_read_goes_by_pointer(why, described):
    extras = {"key_mask": torch.ones(2, 75, dtype=torch.bool)} if why == "hidden keys" else {}
    head_dim = 40 if why == "two chunks" else 32
    dtype = torch.float32 if why == "float32" else torch.float16
    qkv = [x.detach() for x in inputs(heads=2, head_dim=head_dim, dtype=dtype)]
    if why == "unaligned rows":
        qkv = [torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in qkv]
    if why == "unaligned start":
        qkv = [torch.nn.functional.pad(x, (1, 7))[..., 1:-7] for x in qkv]
    if why == "expanded":
        qkv = [x[:, :1].expand(-1, 2, -1, -1) for x in qkv]
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 90, 75, (32, 32))
    with torch.no_grad():
        block_sparse_attention(*qkv, mask, impl="triton", **extras)
    assert described == []
    if why != "float32":
        plain = [x.contiguous() for x in inputs(heads=2)]
        with torch.no_grad():
            block_sparse_attention(*plain, mask, impl="triton")
        assert described == [(75, 32), (75, 32)]


def test_an_empty_key_list_is_not_described(described):
    q, k, v = (x.detach() for x in inputs(k_len=0))
    mask = BlockMask.from_dense(torch.ones(1, 1, 3, 0, dtype=torch.bool), 90, 0, (32, 32))
    assert not block_sparse_attention(q, k, v, mask, impl="triton").any()
    assert described == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_of_64_have_a_row_of_four_warps(name, head_dim):
    row = tuning.pick(getattr(tuning, name), 90, 2, head_dim, (64, 64))
    assert max(row.launch.tile_q, row.launch.tile_k) == 64
    wide = tuning.pick(getattr(tuning, name), 90, 2, head_dim, (128, 128))
    assert wide.launch.num_warps == 8
