"""What the linear attentions promise alike: independence, padding, layouts, gradients, compile."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparseattn import (
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
)
from sparseattn.ops import work
from sparseattn.testing import landmarks
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import require_close, run

DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
OPS = {  # name: (op, maker of its inputs, options)
    "performer": (performer_attention, landmarks.performer, {}),
    "performer-cosh": (performer_attention, landmarks.performer, {"kernel": "cosh"}),
    "performer-relu": (performer_attention, landmarks.performer, {"kernel": "relu"}),
    "performer-eps": (performer_attention, landmarks.performer, {"eps": 1e-4}),
    "linformer": (linformer_attention, landmarks.linformer, {}),
    "nystrom": (nystrom_attention, landmarks.nystrom, {}),
    "nystrom-residual": (nystrom_attention, partial(landmarks.nystrom, residual=(5,)), {}),
    "linear": (linear_attention, landmarks.make, {}),
    "linear-relu": (linear_attention, landmarks.make, {"feature_map": "relu"}),
}
PLAIN = ["performer", "performer-eps", "linformer", "nystrom", "nystrom-residual", "linear"]
BOTH = [(name, "torch") for name in OPS] + [("performer", "triton"), ("linear", "triton")]

both = pytest.mark.parametrize(("name", "impl"), BOTH)


def make(name, spec, dtype=torch.float32, impl="torch"):
    op, maker, options = OPS[name]
    return partial(op, impl=impl, **options), maker(spec, dtype, DEVICES.get(impl, "cpu"))


def same(first, second):
    return all(torch.equal(first[n].nan_to_num(9e9), second[n].nan_to_num(9e9)) for n in first)


@both
def test_equal_bits_on_every_call(name, impl):
    attend, inputs = make(name, Spec(60, key_mask="random"), impl=impl)
    assert same(run(attend, inputs), run(attend, inputs))


@both
def test_a_sample_does_not_depend_on_its_batch_mates(name, impl):
    attend, inputs = make(name, Spec(60, key_mask="tail"), impl=impl)
    inputs = replace(inputs, leaves=("q", "k", "v"))  # what they share has a gradient of both
    first = run(attend, inputs)
    for other in (-3.0, math.nan):
        changed = {n: inputs.arguments[n].clone() for n in "qkv"}
        for tensor in changed.values():
            tensor[1] *= other
        second = run(attend, inputs.changed(**changed))
        assert same({n: first[n][0] for n in first}, {n: second[n][0] for n in second})
        assert not same({n: first[n][1] for n in first}, {n: second[n][1] for n in second})


@both
def test_padded_equals_unpadded(name, impl):
    attend, short = make(name, Spec(50), impl=impl)
    rest = (0, 0, 0, 25)
    padded = {n: F.pad(short.arguments[n], rest) for n in "qkv"}
    for n in "kv":
        padded[n][:, :, 50:] = math.nan
    shown = torch.arange(75, device=padded["q"].device).expand(2, -1) < 50
    for n in short.arguments.keys() & {"key_projection", "value_projection"}:
        padded[n] = F.pad(short.arguments[n], (0, 25), value=7.0)
    long = replace(short.changed(**padded, key_mask=shown), dout=F.pad(short.dout, rest))
    expected, found = run(attend, short), run(attend, long)
    for n, truth in expected.items():
        kept = found[n]
        if n in ("out", "dq", "dk", "dv"):
            kept = kept[:, :, :50]
        elif n in ("dkey_projection", "dvalue_projection"):
            assert (kept[..., 50:] == 0).all()
            kept = kept[..., :50]
        assert float((kept - truth).norm()) <= 1e-6 * float(truth.norm())
    assert (found["dk"][:, :, 50:] == 0).all() and (found["dv"][:, :, 50:] == 0).all()


@both
def test_a_sample_without_keys_is_zero(name, impl):
    attend, inputs = make(name, Spec(60, key_mask="nothing"), impl=impl)
    found = run(attend, inputs)
    for n in ("out", "dq", "dk", "dv"):
        assert (found[n][0] == 0).all() and found[n][1].abs().sum() > 0
    assert all(bool(result.isfinite().all()) for result in found.values())


@both
@pytest.mark.parametrize(
    "spec",
    [Spec(5, batch=0), Spec(5, heads=0), Spec(0, 7), Spec(7, 0), Spec(0)],
    ids=["B=0", "H=0", "Nq=0", "Nk=0", "N=0"],
)
def test_sizes_of_zero(spec, name, impl):
    attend, inputs = make(name, spec, impl=impl)
    found = run(attend, inputs)
    assert found["out"].shape == inputs.arguments["q"].shape
    assert all(bool((result == 0).all()) for result in found.values())
    reference = run(partial(attend, impl="reference"), inputs)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in reference.items()}


@both
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_output_lies_in_memory_as_q_does(layout, name, impl):
    attend, inputs = make(name, Spec(40, layout=layout), impl=impl)
    out = attend(**inputs.arguments)
    assert out.stride() == inputs.arguments["q"].stride()
    if layout == "permuted":  # merging heads is free
        assert out.transpose(1, 2).reshape(2, 40, -1).data_ptr() == out.data_ptr()


# -- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, impl):
    spec = Spec(9, 7, head_dim=4, batch=1, heads=2, key_heads=1, landmarks=5, key_mask="random")
    attend, inputs = make(name, spec, torch.float64, impl)
    clean = {n: inputs.arguments[n].nan_to_num(0.0) for n in "kv"}
    inputs = inputs.changed(**clean)
    leaves = [inputs.arguments[n].detach().requires_grad_() for n in inputs.leaves]

    def function(*tensors):
        return attend(**inputs.arguments | dict(zip(inputs.leaves, tensors, strict=True)))

    if name == "performer-eps":  # the maxima are constants to autograd, not to differences
        expected = torch.autograd.grad(
            partial(attend, impl="reference")(
                **inputs.arguments | dict(zip(inputs.leaves, leaves, strict=True))
            ).sum(), leaves,
        )  # fmt: skip
        found = torch.autograd.grad(function(*leaves).sum(), leaves)
        for n, result, truth in zip(inputs.leaves, found, expected, strict=True):
            require_close(f"d{n}", result, truth, truth.norm(), torch.float64)
    else:
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@both
def test_second_derivative_is_refused(name, impl):
    attend, inputs = make(name, Spec(20), impl=impl)
    q = inputs.arguments["q"].requires_grad_()
    out = attend(**inputs.arguments)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dq.square().sum().backward()


@both
def test_gradients_of_one_input_alone(name, impl):
    attend, inputs = make(name, Spec(50, 40), impl=impl)
    everything = run(attend, inputs)
    for leaf in inputs.leaves:
        alone = run(attend, replace(inputs, leaves=(leaf,)))
        assert torch.equal(alone[f"d{leaf}"], everything[f"d{leaf}"])


@both
def test_activation_checkpointing(name, impl):
    attend, inputs = make(name, Spec(30), impl=impl)
    found = run(lambda **kw: checkpoint(attend, use_reentrant=False, **kw), inputs)
    assert same(found, run(attend, inputs))


# -- as an operator ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both
def test_compiles_whole_and_gives_the_same(name, impl):
    attend, inputs = make(name, Spec(40, layout="permuted", key_mask="tail"), impl=impl)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert same(run(compiled, inputs), run(attend, inputs))


@pytest.mark.parametrize("name", PLAIN)
def test_two_compiles_serve_twenty_lengths(name):
    counter = CompileCounter()
    compiled = torch.compile(make(name, Spec(1))[0], fullgraph=True, backend=counter)
    for length in range(20, 220, 10):
        attend, inputs = make(name, Spec(length, head_dim=16, landmarks=8))
        q = inputs.arguments["q"].requires_grad_()
        out = compiled(**inputs.arguments | {"q": q})
        assert torch.equal(out, attend(**inputs.arguments))
    assert counter.frame_count <= 2


@both
def test_autocast(name, impl, dtype=torch.bfloat16):
    """As SDPA: inputs are cast, out is in that dtype, gradients come back as float32."""
    attend, inputs = make(name, Spec(40), impl=impl)
    inputs = replace(inputs, dout=inputs.dout.to(dtype))
    device = inputs.arguments["q"].device.type

    def inside(**arguments):
        with torch.autocast(device, dtype):
            return attend(**arguments)

    def by_hand(**arguments):
        cast = {n: arguments[n].to(dtype) for n in inputs.leaves}
        return attend(**arguments | cast)

    found = run(inside, inputs)
    assert found["out"].dtype == dtype
    assert all(found[n].dtype == torch.float32 for n in found if n != "out")
    assert same(found, run(by_hand, inputs))


WORK = {  # of q, k and m
    "performer": lambda q, k, m: work.performer_work(q, k, m, 4),
    "linformer": lambda q, k, m: work.linformer_work(q, k, m, 4, is_trained=False),
    "nystrom": lambda q, k, m: work.nystrom_work(q, k, m, 6, 4),
    "linear": lambda q, k, m: work.linear_work(q, k, 4),
}


@pytest.mark.parametrize("name", WORK)
def test_flop_counter_counts_what_explain_says(name):
    attend, inputs = make(name, Spec(60, 50, heads=4, key_heads=2))
    leaves = [inputs.arguments[n].requires_grad_() for n in "qkv"]
    with FlopCounterMode(display=False) as forward:
        out = attend(**inputs.arguments)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    expected = WORK[name](leaves[0].shape, leaves[1].shape, 24)
    assert forward.get_total_flops() == expected.flops
    assert backward.get_total_flops() == expected.backward_flops


FIRST = (0.4, 0.08, False)
SPARSE = torch.ops.sparseattn


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck_of_both_stages(layout, impl):
    inputs = landmarks.performer(Spec(40, 30, layout=layout, landmarks=8, key_heads=1))
    q, k, v, w = (inputs.arguments[n].to(DEVICES[impl]) for n in ("q", "k", "v", "projection"))
    w, bias = w[None, None], torch.randn(2, 1, 30, device=q.device)
    ids = torch.randint(-1, 8, (2, 30), dtype=torch.int32, device=q.device)
    first = (w, k, v, bias, ids, *FIRST)
    values, lse, _, sums = SPARSE.landmark_stage1.default(*first, True, impl)
    second = (q, w, values, lse, *FIRST, False)
    out = SPARSE.landmark_stage2.default(*second, impl)
    torch.library.opcheck(SPARSE.landmark_stage1.default, (*first, True, impl))
    torch.library.opcheck(SPARSE.landmark_stage2.default, (*second, impl))
    for needs in (True, False):
        sent = (values, lse, sums, values, lse, *first, needs, needs, impl)
        torch.library.opcheck(SPARSE.landmark_stage1_backward.default, sent)
        sent = (out, *second, needs, impl)
        torch.library.opcheck(SPARSE.landmark_stage2_backward.default, sent)


# -- errors --------------------------------------------------------------------------------------


def refused(name, error, sentence, **wrong):
    op, maker, options = OPS[name]
    arguments = maker(Spec(12, landmarks=6)).arguments | options | wrong
    with pytest.raises(error, match=re.escape(f"{op.__name__}: {sentence}")):
        op(**arguments)


@pytest.mark.parametrize("name", OPS)
def test_arguments_are_checked(name):
    mask = torch.ones(2, 12, dtype=torch.bool)
    refused(name, TypeError, "key_mask has dtype torch.float32", key_mask=mask.float())
    refused(name, ValueError, "key_mask has shape [1, 12]", key_mask=mask[:1])
    refused(name, ValueError, "key_mask is on meta", key_mask=mask.to("meta"))
    refused(name, ValueError, "impl is 'cuda'", impl="cuda")
    refused(name, TypeError, "k is 3 (int)", k=3)


@pytest.mark.parametrize(
    ("error", "sentence", "wrong"),
    [
        (TypeError, "projection is 3 (int)", {"projection": 3}),
        (ValueError, "projection has shape [6, 31]", {"projection": torch.randn(6, 31)}),
        (ValueError, "projection has shape [0, 32]", {"projection": torch.randn(0, 32)}),
        (TypeError, "projection has dtype torch.int64", {"projection": torch.ones(6, 32).long()}),
        (ValueError, "scale is 0", {"scale": 0}),
        (ValueError, "scale is -1", {"scale": -1.0}),
        (ValueError, "kernel is 'exp'", {"kernel": "exp"}),
        (ValueError, "eps is -1", {"eps": -1.0}),
        (ValueError, "eps is 0.1; expected 0 with kernel='relu'", {"eps": 0.1, "kernel": "relu"}),
        (TypeError, "eps is 'no' (str)", {"eps": "no"}),
    ],
)
def test_performer_errors(error, sentence, wrong):
    refused("performer", error, sentence, **wrong)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck_of_linear_attention(layout, impl):
    inputs = landmarks.make(Spec(40, 30, layout=layout, key_heads=1, key_mask="random"))
    q, k, v, mask = (inputs.arguments[n].to(DEVICES[impl]) for n in ("q", "k", "v", "key_mask"))
    for key_mask in (mask, None):
        arguments = (q, k.nan_to_num(0.0), v.nan_to_num(0.0), key_mask)
        out, sums = SPARSE.linear_attention.default(*arguments, "elu", impl)
        torch.library.opcheck(SPARSE.linear_attention.default, (*arguments, "elu", impl))
        sent = (out, *arguments, sums, "elu", impl)
        torch.library.opcheck(SPARSE.linear_attention_backward.default, sent)


LINFORMER_ERRORS = [
    (TypeError, "key_projection is 3 (int)", {"key_projection": 3}),
    (ValueError, "key_projection has shape [6, 11]", {"key_projection": torch.randn(6, 11)}),
    (ValueError, "key_projection has shape [3, 6, 12]", {"key_projection": torch.randn(3, 6, 12)}),
    (ValueError, "key_projection has shape [0, 12]", {"key_projection": torch.randn(0, 12)}),
    (ValueError, "value_projection has shape [5, 12]", {"value_projection": torch.randn(5, 12)}),
    (TypeError, "scale is 'no' (str)", {"scale": "no"}),
]


@pytest.mark.parametrize(("error", "sentence", "wrong"), LINFORMER_ERRORS)
def test_linformer_errors(error, sentence, wrong):
    refused("linformer", error, sentence, **wrong)


def test_linear_errors():
    refused("linear", ValueError, "feature_map is 'exp'", feature_map="exp")


@pytest.mark.parametrize("name", OPS)
def test_triton_refuses_what_it_cannot_run(name):
    op, maker, options = OPS[name]
    inputs = maker(Spec(12, head_dim=20, landmarks=6), torch.float64)
    reasons = "float64; expected .* head dim is 20; expected a multiple of 8 from 16 to 128"
    with pytest.raises(NotImplementedError, match=reasons):
        op(**inputs.arguments, impl="triton", **options)
