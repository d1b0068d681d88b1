"""Faults found in other implementations, each a test here that names where it was found."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing.attention import check, run
from sparseattn.testing.inputs import AttentionSpec as Spec
from sparseattn.testing.inputs import make

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
REFERENCE = partial(block_sparse_attention, impl="reference")

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("impl", IMPLS)]


def hold(spec, impl, dtype=torch.float32):
    inputs = make(spec, dtype, DEVICES[impl])
    check(partial(block_sparse_attention, impl=impl), REFERENCE, inputs)


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
def test_flash_attention_2623_gradients_at_head_dim_64(impl, block_size):
    """Block-sparse forward exact, gradients off 150-700 times: row lists read as column lists."""
    spec = Spec(256, 192, head_dim=64, heads=1, block_size=block_size, seed=3)
    mask = make(spec).mask.to_dense()[0, 0]
    assert mask.any() and not mask.all() and not torch.equal(mask[:192, :192], mask[:192, :192].T)
    hold(spec, impl)


@pytest.mark.parametrize("head_dim", [72, 104])
def test_flash_attention_2896_dq_at_head_dims_between_powers_of_two(impl, head_dim):
    hold(Spec(100, head_dim=head_dim, heads=1, mask="mixed"), impl, torch.float16)


def test_fastvideo_1730_large_inputs(impl):
    """Input scale 16: logits of thousands, the softmax is a maximum and most weights are 0."""
    hold(Spec(130, head_dim=64, heads=1, mask="mixed", input_scale=16.0), impl, torch.bfloat16)


def test_fastvideo_925_rectangular_blocks_in_the_backward(impl):
    """The backward took the query block's size for the key block's; square blocks hid it."""
    hold(Spec(180, heads=1, block_size=(32, 96), mask="holes", seed=5), impl)


def test_fastvideo_1180_rows_past_the_end_do_not_reach_key_gradients(impl):
    """70 queries in a block of 128: the 58 rows that are not there add nothing to dk and dv."""
    hold(Spec(70, 130, heads=1, block_size=(128, 64), mask="all", input_scale=4.0), impl)


@pytest.mark.parametrize("length", [1, 3, 129])
def test_pytorch_136232_lengths_that_are_no_multiple_of_a_block(impl, length):
    hold(Spec(length, heads=1, block_size=(128, 128), mask="all"), impl)


@pytest.mark.parametrize("row", [0, 69])
def test_pytorch_41508_one_fully_masked_row(impl, row):
    """One row that sees nothing made the gradients of the whole batch NaN."""
    device, attend = DEVICES[impl], partial(block_sparse_attention, impl=impl)
    inputs = make(Spec(70, batch=2, heads=1, mask="all"), device=device)
    keep = torch.ones(2, 1, 70, 70, dtype=torch.bool, device=device)
    keep[0, 0, row] = False
    inputs = replace(inputs, mask=BlockMask.from_token_mask(keep))
    found = run(attend, inputs)
    assert all(found[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
    assert (found["out"][0, :, row] == 0).all() and (found["dq"][0, :, row] == 0).all()
    assert (found["lse"][0, :, row] == -math.inf).all()
    check(attend, REFERENCE, inputs)


@pytest.mark.parametrize("layout", ["scalar", "expanded", "permuted", "strided"])
def test_gradients_sent_in_any_layout(impl, layout):
    """out.sum() sends one number with strides of 0, which was read as if it were a tensor."""
    spec = Spec(70, mask="tokens", dout_layout=layout)
    hold(spec, impl)
    if layout == "scalar":
        inputs = make(spec, device=DEVICES[impl])
        q = inputs.q.requires_grad_()
        out = block_sparse_attention(q, inputs.k, inputs.v, inputs.mask, impl=impl)
        (found,) = torch.autograd.grad(out.sum(), q)
        out = block_sparse_attention(q, inputs.k, inputs.v, inputs.mask, impl=impl)
        (expected,) = torch.autograd.grad(out, q, torch.ones_like(out))
        assert torch.equal(found, expected)


def test_nsa_triton_27_heads_of_a_group_and_keys_that_nobody_reads(impl):
    """A wrong head map, and dk, dv left uninitialised where no query reads a key."""
    spec = Spec(130, heads=6, key_heads=2, head_dim=16, mask="holes", per_head=True)
    hold(spec, impl)
    inputs = make(spec, device=DEVICES[impl])
    found = run(partial(block_sparse_attention, impl=impl), inputs)
    for name in ("dk", "dv"):
        assert (found[name][:, :, :64] == 0).all() and (found[name][:, :, 64:] != 0).any()


@pytest.mark.parametrize("how", ["key_mask", "key_bias", "mask"])
def test_gradients_of_padded_keys_are_exactly_zero(impl, how):
    """NATTEN's NaN in dv "evaded nearly all" tests: padding holds NaN here, and dk, dv are 0."""
    device = DEVICES[impl]
    inputs = make(Spec(40, 90, batch=2, mask="all", poison_keys=False), device=device)
    real = torch.arange(90, device=device) < torch.tensor([[33], [64]], device=device)
    if how == "mask":
        inputs = replace(inputs, mask=BlockMask.from_token_mask(real, q_len=40))
    else:
        k, v = (t.masked_fill(~real[:, None, :, None], math.nan) for t in (inputs.k, inputs.v))
        bias = torch.zeros(2, 1, 90, device=device).masked_fill(~real[:, None], -math.inf)
        hiding = {"key_mask": real} if how == "key_mask" else {"key_bias": bias}
        inputs = replace(inputs, k=k, v=v, **hiding)
    found = run(partial(block_sparse_attention, impl=impl), inputs)
    hidden = ~real[:, None].expand(2, 2, 90)
    for name in ("dk", "dv"):
        assert (found[name][hidden] == 0).all() and (found[name][~hidden] != 0).any()
    if how == "key_bias":
        assert (found["dkey_bias"][:, 0][~real] == 0).all()
    check(partial(block_sparse_attention, impl=impl), REFERENCE, inputs)


def test_flash_attention_rows_that_see_nothing_in_their_first_tiles(impl):
    """exp(-inf - -inf) is NaN: a running maximum must survive tiles in which a row sees nothing."""
    device = DEVICES[impl]
    keep = torch.zeros(1, 1, 70, 200, dtype=torch.bool, device=device)
    keep[0, 0, :, 199] = True  # most rows see the very last key alone
    keep[0, 0, ::7, 64:80] = True
    keep[0, 0, 5] = False
    inputs = make(Spec(70, 200, mask="all"), device=device)
    inputs = replace(inputs, mask=BlockMask.from_token_mask(keep))
    check(partial(block_sparse_attention, impl=impl), REFERENCE, inputs)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_constant_added_to_all_logits_changes_lse_alone(impl, offset):
    """Softmax without its maximum subtracted overflows long before."""
    device, attend = DEVICES[impl], partial(block_sparse_attention, impl=impl)
    inputs = make(Spec(100, heads=1, mask="mixed"), device=device)
    plain = attend(inputs.q, inputs.k, inputs.v, inputs.mask)
    bias = torch.full((1, 1, 100), offset, device=device)
    gate = torch.full((1, 1, 2, 2), offset, device=device)
    for extra in ({"key_bias": bias}, {"block_gate": gate}):
        moved = replace(inputs, **extra)
        check(attend, REFERENCE, moved)
        out, lse = attend(inputs.q, inputs.k, inputs.v, inputs.mask, **extra, return_lse=True)
        assert (out - plain).abs().max() < 0.01 and (lse - offset).abs().max() < 20


def test_pytorch_137452_bias_gradients_without_atomics(impl):
    """Sums of many blocks into one bias or gate: equal bits on every launch."""
    spec = Spec(100, heads=2, mask="all", key_bias="shared", block_gate="shared")
    inputs, attend = make(spec, device=DEVICES[impl]), partial(block_sparse_attention, impl=impl)
    first = run(attend, inputs)
    for _ in range(2):
        again = run(attend, inputs)
        assert torch.equal(again["dkey_bias"], first["dkey_bias"])
        assert torch.equal(again["dblock_gate"], first["dblock_gate"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_visible_key(dtype, impl):
    # torch's fused attention on a CPU has an lse that is off by 5e-5; what should cancel did not
    spec = Spec(40, 1, head_dim=24, batch=3, heads=4, mask="all", scale=1.0, key_mask="nothing")
    hold(spec, impl, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_gates_and_a_last_block_that_is_not_full(dtype, impl):
    # exp(gate) of the places past the last query overflowed, and their products were NaN
    q, k, v = (torch.randn(1, 1, n, 16, dtype=dtype, requires_grad=True) for n in (20, 32, 32))
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 20, 32, (32, 32))
    gradients = []
    for gate in (0.0, 100.0):
        gates = torch.full((1, 1, 1, 1), gate)
        out = block_sparse_attention(q, k, v, mask, block_gate=gates, impl=impl)
        gradients.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for small, large in zip(*gradients, strict=True):
        assert large.isfinite().all() and small.any()
