"""newton_schulz against its recurrence in float64."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseattn.ops.newton_schulz import newton_schulz
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import check, require_close, run
from sparseattn.testing.landmarks import newton_schulz as make

DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = Spec(16, head_dim=16, batch=1, heads=1)
CASES = {  # q_len is m
    "m16": Spec(16, head_dim=24, batch=1),
    "m49": Spec(49, heads=1, correlated=True),
    "m49-iid": Spec(49, batch=1, heads=1, input_scale=0.3),
    "m64": Spec(64, head_dim=64, batch=1, correlated=True),
    "m70": Spec(70, head_dim=72, batch=1, heads=1, correlated=True),
    "masked": Spec(40, heads=1, key_mask="random", correlated=True),
    "nothing": Spec(20, heads=1, key_mask="nothing"),
    "d128": Spec(20, head_dim=128, batch=1, heads=1),
    "permuted": Spec(14, head_dim=16, batch=1, layout="permuted", dout_layout="scalar"),
    "scale": Spec(14, head_dim=16, batch=1, heads=1, scale=-0.5),
}
ALSO = {  # by torch's products alone
    "m129": Spec(129, batch=1, correlated=True),
    "m256": Spec(256, batch=1, heads=1, correlated=True),
    "d8": Spec(20, head_dim=8),
}
LEGACY = {"legacy_start": True}


def attend(impl, **options):
    return partial(newton_schulz, impl=impl, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES | ALSO)
def test_torch_path(case, dtype):
    check(attend("torch"), attend("reference"), make((CASES | ALSO)[case], dtype))


@pytest.mark.parametrize("case", ["m16", "m49", "masked", "nothing", "m129"])
def test_start_of_the_whole_batch(case):
    inputs = make((CASES | ALSO)[case])
    check(attend("torch", **LEGACY), attend("reference", **LEGACY), inputs)
    own = run(attend("torch"), inputs)
    if case == "m49":  # not yet converged
        assert not torch.equal(own["out"], run(attend("torch", **LEGACY), inputs)["out"])


HALVES = [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.bfloat16)]


@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
def test_products_of_half_precision_landmarks_are_float32(dtype, impl):
    """Landmarks keep their 16 bits; the recurrence, on which rounding grows, is float32."""
    inputs = make(CASES["m16"], dtype, DEVICES[impl])
    found = run(attend(impl), inputs)
    truth = run(attend("reference"), inputs.to(torch.float64))
    require_close("out", found["out"], truth["out"], truth["out"].norm(), torch.float32)
    for name in ("dqueries", "dkeys"):
        require_close(name, found[name], truth[name], truth[name].norm(), dtype)


@pytest.mark.parametrize("case", CASES)
def test_triton_path(case):
    check(attend("triton"), attend("reference"), make(CASES[case], device=DEVICES["triton"]))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_other_numbers_of_steps(impl, iterations):
    inputs = make(SMALL, device=DEVICES[impl]).changed(iterations=iterations)
    check(attend(impl), attend("reference"), inputs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_landmark_is_its_value(impl):
    inputs = make(Spec(1, head_dim=16, batch=1, heads=1), device=DEVICES[impl])
    found = run(attend(impl), inputs)
    values, dout = inputs.arguments["values"], inputs.dout
    require_close("out", found["out"], values.double(), values.norm(), torch.float32)
    require_close("dvalues", found["dvalues"], dout.double(), dout.norm(), torch.float32)


def test_it_inverts_what_can_be_inverted():
    keys, values = 2 * torch.randn(1, 2, 16, 64).double(), torch.randn(1, 2, 16, 64).double()
    weights = (keys @ keys.mT / 8).softmax(-1)
    expected = torch.linalg.solve(weights, values)
    found = newton_schulz(keys, keys, values, iterations=12)
    require_close("out", found, expected, expected.norm(), torch.float64)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_padding_changes_nothing(impl):
    """49 landmarks are 64 rows to a kernel; masked ones are as if they were not there."""
    inputs = make(Spec(12, head_dim=16, heads=1), device=DEVICES[impl]).changed(iterations=3)
    rest = (0, 0, 0, 8)
    pad = torch.nn.functional.pad
    longer = {n: pad(inputs.arguments[n], rest) for n in inputs.leaves}
    longer["landmark_mask"] = torch.arange(20, device=DEVICES[impl]).expand(2, -1) < 12
    expected = run(attend(impl), inputs)
    padded = inputs.changed(**longer)
    found = run(attend(impl), replace(padded, dout=pad(inputs.dout, rest)))
    for name, truth in expected.items():
        kept = found[name][:, :, :12]
        assert float((kept - truth).norm()) <= 1e-6 * float(truth.norm())
        assert (found[name][:, :, 12:] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_bits_and_no_word_of_batch_mates(impl):
    inputs = make(Spec(16, head_dim=16, heads=1), device=DEVICES[impl]).changed(iterations=2)
    first = run(attend(impl), inputs)
    changed = {n: inputs.arguments[n].clone() for n in inputs.leaves}
    for tensor in changed.values():
        tensor[1] = math.nan
    second, third = run(attend(impl), inputs), run(attend(impl), inputs.changed(**changed))
    for name, expected in first.items():
        assert torch.equal(second[name], expected) and torch.equal(third[name][0], expected[0])
        assert third[name][1].isnan().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_largest_columns_share_the_gradient_of_the_norm(impl):
    """Keys come in twins: so does the largest column."""
    inputs = make(replace(SMALL, batch=2), torch.float64 if impl == "torch" else torch.float32)
    twins = inputs.arguments["keys"][:1, :, :8].repeat(2, 1, 2, 1)
    same = inputs.arguments["queries"][:1].repeat(2, 1, 1, 1)
    inputs = inputs.changed(queries=same, keys=twins, iterations=1)
    check(attend(impl), attend("reference"), inputs)
    if impl == "torch":
        check(attend("torch", **LEGACY), attend("reference", **LEGACY), inputs)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl, legacy):
    inputs = make(Spec(6, head_dim=3, key_mask="random"), torch.float64)
    leaves = [inputs.arguments[n].requires_grad_() for n in inputs.leaves]
    options = {"landmark_mask": inputs.arguments["landmark_mask"], "legacy_start": legacy}
    function = partial(newton_schulz, impl=impl, **options)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("chunk", [1, 1 << 30])
def test_any_chunk_gives_the_same(chunk, monkeypatch):
    from sparseattn.ops.blocked import newton_schulz as blocked

    monkeypatch.setattr(blocked, "_CHUNK_WEIGHTS", chunk)
    check(attend("torch"), attend("reference"), make(CASES["masked"]))


def test_no_switch_rounds_its_products():
    """Products as TF32 on a GPU or bfloat16 on a CPU would break the recurrence."""
    inputs, before = make(CASES["m49"]), torch.get_float32_matmul_precision()
    truth = run(attend("reference"), inputs.to(torch.float64))
    torch.set_float32_matmul_precision("medium")
    try:
        found = run(attend("torch"), inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, expected in truth.items():
        error = float((found[name].double() - expected).norm() / expected.norm())
        assert error < 1e-7  # float64 products


@pytest.mark.parametrize("spec", [Spec(0), Spec(5, batch=0), Spec(5, heads=0)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_sizes_of_zero(impl, spec):
    found = run(attend(impl), make(spec, device=DEVICES.get(impl, "cpu")))
    assert found["out"].shape == (spec.batch, spec.heads, spec.q_len, spec.head_dim)


def test_second_derivative_is_refused():
    inputs = make(SMALL)
    leaf = inputs.arguments["queries"].requires_grad_()
    out = newton_schulz(**inputs.arguments)
    (found,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        found.sum().backward()


# -- as an operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl):
    inputs = make(Spec(20, head_dim=16, batch=1, heads=2, layout="permuted"), torch.float16)
    tensors = [inputs.arguments[n].to(DEVICES[impl]) for n in inputs.leaves]
    arguments = (*tensors, None, 2, 0.25, False, impl)
    ops = torch.ops.sparseattn
    torch.library.opcheck(ops.newton_schulz.default, arguments)
    dout = inputs.dout.to(DEVICES[impl])
    torch.library.opcheck(ops.newton_schulz_backward.default, (dout, *arguments))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_whole(impl):
    torch._dynamo.reset()
    counter = CompileCounter()
    inputs = make(SMALL, device=DEVICES[impl])
    compiled = torch.compile(attend(impl), fullgraph=True, backend=counter)
    expected, found = run(attend(impl), inputs), run(compiled, inputs)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert counter.frame_count == 1


def test_autocast_changes_nothing():
    inputs = make(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = newton_schulz(**inputs.arguments)
    assert torch.equal(found, newton_schulz(**inputs.arguments))


# -- errors --------------------------------------------------------------------------------------

ONES = torch.ones(2, 2, 16, 32)
ERRORS = [
    (TypeError, "queries is 3 (int)", {"queries": 3}),
    (TypeError, "queries has dtype torch.int64", {"queries": ONES.long()}),
    (ValueError, "keys has shape [2, 2, 15, 32]", {"keys": ONES[:, :, 1:]}),
    (TypeError, "keys has dtype torch.float16", {"keys": ONES.half()}),
    (ValueError, "values is on meta", {"values": ONES.to("meta")}),
    (TypeError, "landmark_mask has dtype torch.float32", {"landmark_mask": ONES[0, :, :, 0]}),
    (ValueError, "landmark_mask has shape [2, 3]", {"landmark_mask": torch.ones(2, 3).bool()}),
    (ValueError, "iterations is 0", {"iterations": 0}),
    (TypeError, "iterations is 2.0 (float)", {"iterations": 2.0}),
    (TypeError, "legacy_start is 1 (int)", {"legacy_start": 1}),
    (TypeError, "scale is 'no' (str)", {"scale": "no"}),
    (ValueError, "impl is 'cuda'", {"impl": "cuda"}),
]


@pytest.mark.parametrize(("error", "sentence", "wrong"), ERRORS)
def test_errors(error, sentence, wrong):
    arguments = make(Spec(16)).arguments | wrong
    with pytest.raises(error, match=re.escape(f"newton_schulz: {sentence}")):
        newton_schulz(**arguments)


def test_triton_refuses_what_it_cannot_run():
    inputs = make(Spec(129, head_dim=20, batch=1, heads=1), torch.float64)
    with pytest.raises(NotImplementedError, match=r"float64.*head dim is 20.*m is 129.*legacy"):
        newton_schulz(**inputs.arguments, legacy_start=True, impl="triton")
