"""topk_attention as operators of torch: opcheck, compile, export, autocast, checkpoints."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from sparseattn import topk_attention
from sparseattn.testing.inputs import AttentionSpec
from sparseattn.testing.topk_attention import TopkSpec, make, run

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
BASE = AttentionSpec(37, 50, heads=2, key_heads=1, head_dim=16, block_size=(16, 16))


def qkv(length=75):
    return torch.randn(3, 1, 2, length, 16).unbind()


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_pooling(kind, weighted):
    x = torch.randn(2, 37, 3, 16, device=DEVICES["triton"]).transpose(1, 2)
    weights = torch.rand(2, 37, device=x.device) if weighted else None
    ops = torch.ops.sparseattn
    pooled = ops.block_pool(x, weights, 16, kind)
    torch.library.opcheck(ops.block_pool.default, (x, weights, 16, kind))
    arguments = (torch.randn_like(pooled), x, weights, pooled, 16, kind)
    torch.library.opcheck(ops.block_pool_backward.default, arguments)


def test_opcheck_of_selection():
    scores = torch.randn(1, 2, 3, 5, device=DEVICES["triton"])
    budgets = torch.ones(1, 2, 3, dtype=torch.int32, device=scores.device)
    for arguments in ((2, None, None, None), (0, budgets, None, scores[:, :1] > 1)):
        torch.library.opcheck(torch.ops.sparseattn.select_blocks.default, (scores, *arguments))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_and_gives_the_same(impl, backend):
    spec = TopkSpec(BASE, 0.5, gate="heads", always=True, query_mask=True, weights=True)
    inputs = make(spec, device=DEVICES[impl])
    attend = partial(topk_attention, impl=impl)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    (expected, mask), (found, other) = run(attend, inputs), run(compiled, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(mask.to_dense(), other.to_dense())


OPTIONS = [
    {"keep": 2, "gate": 1.0},
    {"keep": 0.3},
    {"keep": 0.7, "mode": "top_p"},
    {"keep": 0.2, "mode": "threshold", "pooling": "max"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("fresh_compiler")
def test_two_compiles_serve_twenty_lengths(options):
    counter = CompileCounter()
    compiled = torch.compile(topk_attention, fullgraph=True, backend=counter)
    for length in (33 + 17 * step for step in range(20)):
        q, k, v = qkv(length)
        mask = torch.rand(1, length) < 0.8
        arguments = dict(options, block_size=16, key_mask=mask, query_mask=mask)
        out = compiled(q.requires_grad_(), k, v, **arguments)
        assert torch.equal(out, topk_attention(q, k, v, **arguments))
    assert counter.frame_count <= 2


class Attend(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return topk_attention(q, k, v, **self.options, block_size=16)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, options):
    shapes = {name: {2: torch.export.Dim.AUTO} for name in "qkv"} if dynamic else None
    program = torch.export.export(Attend(options), qkv(), dynamic_shapes=shapes).module()
    for length in (75, 128, 201) if dynamic else (75,):
        arguments = qkv(length)
        assert torch.equal(program(*arguments), Attend(options)(*arguments))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_autocast(impl):
    q, k, v = (t.to(DEVICES.get(impl, "cpu")).requires_grad_() for t in qkv())
    attend = partial(topk_attention, keep=2, block_size=16, gate=1.0, impl=impl)
    with torch.autocast(q.device.type, torch.bfloat16):
        out, mask = attend(q, k, v, return_mask=True)
    expected, same = attend(*(t.bfloat16() for t in (q, k, v)), return_mask=True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert torch.equal(mask.block_states(), same.block_states())
    (found,), (wanted,) = (torch.autograd.grad(o.float().sum(), q) for o in (out, expected))
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    inputs = make(TopkSpec(BASE, 2, gate="heads"), device=DEVICES[impl])
    attend = partial(topk_attention, impl=impl)
    expected = run(attend, inputs)[0]
    found = run(lambda *a, **k: checkpoint(attend, *a, use_reentrant=False, **k), inputs)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
