"""saliency_attention as operators of torch: opcheck, compile, export, autocast, checkpoints."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparseattn import saliency_attention
from sparseattn.ops.token_selection import select_tokens
from sparseattn.testing.saliency import SaliencySpec as Spec
from sparseattn.testing.saliency import check, make, run

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
SMALL = Spec(
    37, keep=0.4, batch=2, heads=2, key_heads=1, head_dim=16, always=1, prune="passthrough",
    layout="permuted", dout_layout="permuted",
)  # fmt: skip
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
BACKENDS = [("eager", i) for i in IMPLS] + [("aot_eager", i) for i in IMPLS]
BACKENDS += [
    pytest.param(
        "inductor",
        "torch",
        marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler"),
    )
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("form", ["keys", "tokens", "filled"])
def test_opcheck(form, layout, impl):
    inputs = make(replace(SMALL, layout=layout), device=DEVICES[impl])
    tokens, slots = select_tokens(inputs.saliency[:, None], 9)
    bias = inputs.saliency[:, None].log()
    arguments = {
        "keys": (inputs.k, inputs.v, bias, None, tokens, -torch.inf),
        "tokens": (inputs.q, None, None, None, tokens, 0.0),
        "filled": (inputs.q[:, :, :9], None, None, inputs.passthrough, slots, 0.0),
    }
    torch.library.opcheck(torch.ops.sparseattn.token_gather.default, (*arguments[form], impl))


@pytest.mark.parametrize(("backend", "impl"), BACKENDS)
def test_compiles_whole_and_gives_the_same(backend, impl):
    inputs = make(SMALL, device=DEVICES[impl])
    attend = partial(saliency_attention, impl=impl)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(*args, **kwargs):
        return attend(*args, **kwargs)

    if backend == "inductor":  # it has a logarithm of its own
        check(compiled, partial(saliency_attention, impl="reference"), inputs)
        return
    expected, found = run(attend, inputs), run(compiled, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keep", [16, 0.4])
@pytest.mark.parametrize("options", [{}, {"always": 1, "prune_queries": True, "threshold": 0.2}])
def test_two_compiles_serve_twenty_lengths(options, keep):
    counter = CompileCounter()
    compiled = torch.compile(saliency_attention, fullgraph=True, backend=counter)
    for length in range(33, 33 + 20 * 17, 17):
        q, k, v = torch.randn(3, 1, 2, length, 16).unbind()
        saliency = torch.rand(1, length, requires_grad=True)
        key_mask = torch.arange(length)[None] < length - 5
        out = compiled(q.requires_grad_(), k, v, saliency, keep, key_mask=key_mask, **options)
        expected = saliency_attention(q, k, v, saliency, keep, key_mask=key_mask, **options)
        assert torch.equal(out, expected)
    assert counter.frame_count <= 2


class Layer(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep
        self.predictor = torch.nn.Linear(16, 1)

    def forward(self, q, k, v):
        saliency = self.predictor(k.mean(1)).squeeze(-1).sigmoid()
        return saliency_attention(q, k, v, saliency, self.keep, always=1, prune_queries=True)


@pytest.mark.parametrize("keep", [12, 0.4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, keep, tmp_path):
    layer = Layer(keep)
    q, k, v = torch.randn(3, 1, 2, 75, 16).unbind()
    shapes = {name: {2: torch.export.Dim.AUTO} for name in "qkv"} if dynamic else None
    program = torch.export.export(layer, (q, k, v), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    for n in (75, 128, 201) if dynamic else (75,):
        q, k, v = torch.randn(3, 1, 2, n, 16).unbind()
        assert torch.equal(loaded(q, k, v), layer(q, k, v))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, impl):
    """As SDPA: q, k and v are cast, out is in that dtype, gradients come back as float32."""
    inputs = make(SMALL, device=DEVICES.get(impl, "cpu"))
    attend, device = partial(saliency_attention, impl=impl), inputs.q.device.type

    def inside(*args, **kwargs):
        with torch.autocast(device, dtype):
            return attend(*args, **kwargs)

    def by_hand(q, k, v, saliency, keep, passthrough, **kwargs):
        cast = (t.to(dtype) for t in (q, k, v))
        return attend(*cast, saliency, keep, passthrough=passthrough.to(dtype), **kwargs)

    cast = replace(inputs, dout=inputs.dout.to(dtype))
    found, expected = run(inside, cast), run(by_hand, cast)
    assert found["out"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in found if name != "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    inputs = make(SMALL, device=DEVICES[impl])
    attend = partial(saliency_attention, impl=impl)
    expected = run(attend, inputs)
    found = run(lambda *a, **k: checkpoint(attend, *a, use_reentrant=False, **k), inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shapes_strides_and_dtypes_without_data():
    inputs = make(SMALL, torch.bfloat16)
    expected = run(saliency_attention, inputs)
    names = ("q", "k", "v", "saliency", "passthrough", "dout")
    moved = replace(inputs, **{n: getattr(inputs, n).to("meta") for n in names})
    found = run(saliency_attention, moved)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_flops_are_those_of_the_kept_tokens(impl):
    q, k, v = torch.randn(3, 1, 2, 256, 16, device=DEVICES[impl]).unbind()
    saliency = torch.rand(1, 256, device=DEVICES[impl])
    with FlopCounterMode(display=False) as counter:
        saliency_attention(q, k, v, saliency, 0.5, impl=impl)
    assert counter.get_total_flops() == 2 * 2 * 16 * 2 * 256 * 128
