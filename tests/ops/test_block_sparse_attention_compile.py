"""block_sparse_attention as an operator: opcheck, compile, export, autocast, checkpoints, FLOPs."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing.attention import check, run
from sparseattn.testing.inputs import AttentionSpec as Spec
from sparseattn.testing.inputs import make

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
SMALL = Spec(
    37, 50, heads=2, key_heads=1, head_dim=16, block_size=(16, 32), mask="tokens", per_head=True,
    key_bias="shared", block_gate="heads", poison_keys=False,
)  # fmt: skip
REFERENCE = partial(block_sparse_attention, impl="reference")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- the registered operators ------------------------------------------------------------------


def flat(full, partial_lists):
    if partial_lists is None:
        return full.offsets, full.indices, None, None, None
    return full.offsets, full.indices, *vars(partial_lists).values()


def operator_arguments(inputs, impl):
    """Arguments of the forward and of the backward operator."""
    mask = inputs.mask
    tensors = (inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.block_gate)
    rows, columns = flat(mask.rows, mask.partial_rows), flat(mask.columns, mask.partial_columns)
    extras = (mask.token_bits, *mask.block_size, 0.25, impl)
    forward = (*tensors, *rows, *extras)
    out, lse = torch.ops.sparseattn.block_sparse_attention.default(*forward)
    needs = (inputs.key_bias is not None, inputs.block_gate is not None)
    sent = (inputs.dout, inputs.dlse, out, lse)
    return forward, (*sent, *tensors, *rows, *columns, *extras, *needs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_opcheck(layout, impl):
    spec = replace(SMALL, layout=layout, dout_layout=layout)
    forward, backward = operator_arguments(make(spec, device=DEVICES[impl]), impl)
    torch.library.opcheck(torch.ops.sparseattn.block_sparse_attention.default, forward)
    torch.library.opcheck(torch.ops.sparseattn.block_sparse_attention_backward.default, backward)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_without_optional_arguments(impl):
    spec = replace(SMALL, mask="blocks", key_bias=None, block_gate=None, use="out")
    inputs = make(replace(spec, dout_layout="scalar"), torch.float16, DEVICES[impl])
    forward, backward = operator_arguments(inputs, impl)
    torch.library.opcheck(torch.ops.sparseattn.block_sparse_attention.default, forward)
    torch.library.opcheck(torch.ops.sparseattn.block_sparse_attention_backward.default, backward)


def described(tensor):
    """Shape, dtype, and the strides that are ever stepped along."""
    steps = [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.shape, steps, tensor.dtype


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_shapes_strides_and_dtypes_without_data(layout, device):
    inputs = make(replace(SMALL, layout=layout), torch.bfloat16)
    mode = FakeTensorMode() if device == "fake" else nullcontext()
    move = mode.from_tensor if device == "fake" else lambda tensor: tensor.to("meta")
    names = ("q", "k", "v", "key_bias", "block_gate", "dout", "dlse")
    moved = {name: move(getattr(inputs, name)) for name in names}
    moved["mask"] = inputs.mask.map(move)
    with mode:
        found = run(block_sparse_attention, replace(inputs, **moved))
    expected = run(block_sparse_attention, inputs)
    assert {n: described(t) for n, t in found.items()} == {
        n: described(t) for n, t in expected.items()
    }


# -- torch.compile and torch.export ------------------------------------------------------------

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
BACKENDS = [("eager", i) for i in IMPLS] + [("aot_eager", i) for i in IMPLS]
BACKENDS += [
    pytest.param(
        "inductor",
        "torch",
        marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler"),
    )
]


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_compiles_whole_and_gives_the_same(backend, impl):
    inputs = make(replace(SMALL, layout="permuted"), device=DEVICES[impl])
    attend = partial(block_sparse_attention, impl=impl)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*args, **kwargs):
        out, lse = attend(*args, **kwargs)
        return out.transpose(1, 2).flatten(2).unflatten(2, (2, -1)).transpose(1, 2) * 1.0, lse

    expected, found = run(attend, inputs), run(compiled, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def scored(q, k, v, impl="torch", keep=0.5):
    """Attention whose mask is chosen from pooled scores, as a layer would do it."""
    q_len, k_len, block = q.shape[2], k.shape[2], 16

    def pooled(x):
        blocks = -(-x.shape[2] // block)
        x = torch.nn.functional.pad(x, (0, 0, 0, blocks * block - x.shape[2]))
        return x.view(*x.shape[:2], blocks, block, x.shape[3]).mean(3)

    scores = (pooled(q) @ pooled(k).mT).detach()
    mask = BlockMask.from_block_scores(scores, keep, q_len, k_len, (block, block))
    return block_sparse_attention(q, k, v, mask, impl=impl)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", IMPLS)
def test_mask_is_built_inside_the_graph(impl, backend):
    inputs = make(replace(SMALL, key_heads=2), device=DEVICES[impl])
    q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    compiled = torch.compile(scored, fullgraph=True, backend=backend)
    out, expected = compiled(q, k, v, impl), scored(q, k, v, impl)
    assert torch.equal(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


# Aligned and ragged. Every step changes the number of blocks too, so that the second compile makes
# it dynamic; lengths of equally many blocks in front would cost a third, as for any input shape.
LENGTHS = [33 + 17 * step for step in range(20)]


@pytest.mark.parametrize("mask", ["blocks", "tokens"])
def test_two_compiles_serve_twenty_lengths(mask):
    counter = CompileCounter()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend=counter)
    for length in LENGTHS:
        spec = Spec(length, head_dim=16, block_size=(16, 16), mask=mask, use="out")
        inputs = make(spec)
        q = inputs.q.requires_grad_()
        out = compiled(q, inputs.k, inputs.v, inputs.mask)
        expected = block_sparse_attention(q, inputs.k, inputs.v, inputs.mask)
        assert torch.equal(out, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keep", [2, 0.5])
def test_two_compiles_serve_twenty_lengths_with_the_mask_inside(keep):
    counter = CompileCounter()
    compiled = torch.compile(scored, fullgraph=True, backend=counter)
    for length in LENGTHS:
        q, k, v = torch.randn(3, 1, 2, length, 16).unbind()
        out = compiled(q.requires_grad_(), k, v, keep=keep)
        assert torch.equal(out, scored(q, k, v, keep=keep))
    assert counter.frame_count <= 2


def test_one_graph_serves_other_masks_and_scores():
    counter = CompileCounter()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend=counter)
    for seed in range(4):
        inputs = make(replace(SMALL, seed=seed))
        arguments = (inputs.q, inputs.k, inputs.v, inputs.mask)
        out = compiled(*arguments, key_bias=inputs.key_bias)
        assert torch.equal(out, block_sparse_attention(*arguments, key_bias=inputs.key_bias))
    assert counter.frame_count == 1


class Scored(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, q, k, v):
        return scored(q, k, v, keep=self.keep)


@pytest.mark.parametrize("keep", [2, 0.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, keep, tmp_path):
    q, k, v = torch.randn(3, 1, 2, 75, 16).unbind()
    # torch cannot prove for a named dimension that a fraction of the blocks is at most all of them
    length = torch.export.Dim("length", min=33) if keep == 2 else torch.export.Dim.AUTO
    shapes = {name: {2: length} for name in "qkv"} if dynamic else None
    program = torch.export.export(Scored(keep), (q, k, v), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    for n in (75, 128, 201) if dynamic else (75,):
        q, k, v = torch.randn(3, 1, 2, n, 16).unbind()
        assert torch.equal(loaded(q, k, v), scored(q, k, v, keep=keep))


# -- autocast, checkpoints, FLOPs --------------------------------------------------------------


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, impl):
    """As SDPA: q, k and v are cast, out is in that dtype, gradients come back as float32."""
    inputs = make(replace(SMALL, use="out"), device=DEVICES.get(impl, "cpu"))
    attend, device = partial(block_sparse_attention, impl=impl), inputs.q.device.type

    def inside(*args, **kwargs):
        with torch.autocast(device, dtype):
            return attend(*args, **kwargs)

    def by_hand(q, k, v, *args, **kwargs):
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs)

    cast = replace(inputs, dout=inputs.dout.to(dtype))
    found, expected = run(inside, cast), run(by_hand, cast)
    assert found["out"].dtype == dtype and found["lse"].dtype == torch.float32
    assert all(found[name].dtype == torch.float32 for name in found if name != "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_autocast_takes_mixed_dtypes_and_leaves_float64():
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind()
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(q, k.half(), v.bfloat16(), mask)
        wide = block_sparse_attention(q.double(), k.double(), v.double(), mask)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16):
        assert out.dtype == sdpa(q, k.half(), v.bfloat16()).dtype == torch.bfloat16
        assert wide.dtype == sdpa(q.double(), k.double(), v.double()).dtype == torch.float64


def test_autocast_inside_a_compiled_function():
    inputs = make(replace(SMALL, key_bias=None, block_gate=None, use="out"))

    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return block_sparse_attention(q, k, v, inputs.mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out, expected = compiled(q, k, v), attend(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    (found,) = torch.autograd.grad(out.float().sum(), q)
    (wanted,) = torch.autograd.grad(expected.float().sum(), q)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    inputs = make(SMALL, device=DEVICES[impl])
    attend = partial(block_sparse_attention, impl=impl)
    expected = run(attend, inputs)
    found = run(lambda *a, **k: checkpoint(attend, *a, use_reentrant=False, **k), inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_flop_counter_counts_kept_blocks(impl):
    batch, heads, head_dim, block = 2, 2, 16, (16, 32)
    scores = torch.randn(1, 1, 4, 3)
    mask = BlockMask.from_block_scores(scores, 2, 64, 96, block)
    q = torch.randn(batch, heads, 64, head_dim, requires_grad=True)
    k = torch.randn(batch, heads, 96, head_dim)
    mask, q, k = (x.to(DEVICES[impl]) for x in (mask, q, k))
    pairs = batch * heads * 4 * 2 * block[0] * block[1]
    with FlopCounterMode(display=False) as forward:
        out = block_sparse_attention(q, k, k, mask, impl=impl)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * head_dim * pairs  # s and o
    assert backward.get_total_flops() == 5 * 2 * head_dim * pairs  # s, dp, dv, dk, dq


def test_saved_tensors_may_be_moved_by_hooks():
    inputs = make(SMALL)

    def offloaded(*args, **kwargs):
        with torch.autograd.graph.save_on_cpu():
            return block_sparse_attention(*args, **kwargs)

    check(offloaded, REFERENCE, inputs)
