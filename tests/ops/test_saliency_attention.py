"""saliency_attention against its meaning, and what it promises."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sparseattn import saliency_attention
from sparseattn.testing.saliency import SaliencySpec as Spec
from sparseattn.testing.saliency import check, make, run
from sparseattn.testing.tolerance import judge, require

REFERENCE = partial(saliency_attention, impl="reference")
IMPLS = ["torch", "triton"]
ATTEND = {impl: partial(saliency_attention, impl=impl) for impl in IMPLS}
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    # lengths and head dims
    "one-token": Spec(1, keep=1),
    "n63": Spec(63, keep=0.3),
    "n65": Spec(65, keep=0.5, head_dim=16),
    "n127": Spec(127, keep=7, head_dim=40),
    "n197": Spec(197, keep=0.6, always=1, head_dim=64),
    "d72": Spec(90, head_dim=72),
    "d128": Spec(70, head_dim=128),
    "d256": Spec(40, head_dim=256),
    "few-queries": Spec(150, q_len=5),
    "many-queries": Spec(20, q_len=150),
    # how many are kept
    "none": Spec(70, keep=0),
    "one": Spec(70, keep=1, batch=2),
    "all": Spec(70, keep=1.0),
    "more-than-all": Spec(70, keep=1000),
    "ties": Spec(130, keep=0.4, batch=2, saliency="ties"),
    "holes": Spec(130, keep=0.8, batch=2, saliency="holes"),
    "nothing": Spec(60, batch=2, saliency="nothing"),
    "threshold": Spec(130, keep=1.0, batch=3, threshold=0.55),
    "threshold-and-count": Spec(130, keep=20, batch=2, threshold=0.8, always=2),
    "threshold-over-all": Spec(60, keep=1.0, threshold=1.5),
    "always": Spec(100, keep=0.1, batch=2, always=5, saliency="holes"),
    "always-anywhere": Spec(100, keep=0.3, batch=2, always="mask"),
    "always-too-many": Spec(100, keep=3, batch=2, always="mask"),
    "always-more-than-there-are": Spec(3, q_len=9, keep=1.0, batch=2, always=5),
    "always-without-keys": Spec(0, q_len=9, keep=0.25, batch=2, always=5),
    # padding
    "padded": Spec(100, keep=0.25, batch=3, key_mask="tail"),
    "padded-count": Spec(60, keep=50, batch=2, key_mask="tail"),
    "padded-anywhere": Spec(100, keep=0.5, batch=2, key_mask="random", always="mask"),
    "all-padding": Spec(70, batch=2, key_mask="nothing", always=1),
    # heads
    "gqa": Spec(90, batch=2, heads=4, key_heads=2),
    "mqa": Spec(90, heads=3, key_heads=1, key_mask="random"),
    "per-head": Spec(90, batch=2, heads=3, per_head=True),
    "gqa-per-head": Spec(90, batch=2, heads=4, key_heads=2, per_head=True, saliency="holes"),
    "many-heads": Spec(40, batch=3, heads=8),
    # queries
    "prune": Spec(90, batch=2, prune="queries"),
    "prune-through": Spec(90, batch=2, prune="passthrough", always=1),
    "prune-none": Spec(50, keep=0, prune="passthrough"),
    "prune-all": Spec(50, keep=1.0, prune="passthrough"),
    "prune-padded": Spec(90, batch=2, prune="queries", key_mask="random"),
    "prune-per-head": Spec(
        80, keep=0.4, batch=2, heads=4, key_heads=2, per_head=True, prune="passthrough",
        key_mask="tail", threshold=0.3,
    ),
    # values and memory
    "no-bias": Spec(90, batch=2, log_bias=False, prune="queries"),
    "input-tenth": Spec(90, input_scale=0.1),
    "input-16": Spec(90, input_scale=16.0),
    "scale": Spec(90, scale=-0.4),
    "permuted": Spec(
        90, batch=2, layout="permuted", dout_layout="permuted", prune="passthrough", always=1
    ),
    "sliced": Spec(90, layout="sliced", dout_layout="sliced"),
    "strided": Spec(90, layout="strided", dout_layout="scalar", prune="queries"),
    "expanded": Spec(60, heads=3, layout="expanded"),
}  # fmt: skip

LARGE = {
    "n577": Spec(577, keep=0.25, head_dim=64, heads=1),
    "n1025": Spec(1025, keep=0.25, heads=1, always=1),
}

# In the interpreter a case earns its place by a branch of the kernels.
TRITON_CASES = [
    "one-token", "n127", "d72", "none", "ties", "holes", "padded", "all-padding", "gqa-per-head",
    "prune-through", "prune-none", "prune-padded", "prune-per-head", "permuted", "strided",
]  # fmt: skip


OTHER_DTYPES = [
    pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
]


@pytest.mark.parametrize("dtype", [torch.float32, *OTHER_DTYPES])
@pytest.mark.parametrize("case", CASES)
def test_torch_path(case, dtype):
    check(ATTEND["torch"], REFERENCE, make(CASES[case], dtype))


@pytest.mark.parametrize("case", LARGE)
def test_torch_path_on_many_tokens(case):
    check(ATTEND["torch"], REFERENCE, make(LARGE[case]))


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case):
    check(ATTEND["triton"], REFERENCE, make(CASES[case], device=DEVICES["triton"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["n127", "prune-per-head"])
def test_triton_path_in_half_precision(case, dtype):
    check(ATTEND["triton"], REFERENCE, make(CASES[case], dtype, DEVICES["triton"]))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("kept_all", ["fraction", "count"])
def test_everything_kept_without_bias_is_dense_attention(kept_all, impl):
    spec = Spec(100, keep=1.0 if kept_all == "fraction" else 100, batch=2, log_bias=False)
    inputs = make(spec, device=DEVICES.get(impl, "cpu"))

    def dense(q, k, v, saliency, keep, **_):
        return F.scaled_dot_product_attention(q, k, v) + 0 * saliency.sum()

    truth, naive = run(dense, inputs.to(torch.float64)), run(dense, inputs)
    result = run(partial(saliency_attention, impl=impl), inputs)
    require(*(judge(n, result[n], naive[n], truth[n]) for n in ("out", "dq", "dk", "dv")))
    assert (result["dsaliency"] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_saliency_of_one_is_attention_over_the_kept_tokens(impl):
    inputs = make(Spec(100, keep=30), device=DEVICES[impl])
    inputs = replace(inputs, saliency=torch.where(inputs.saliency > 0.5, 1.0, 0.0))
    kept = inputs.kept()[0, 0]

    def dense(q, k, v, saliency, keep, **_):
        k, v = k[:, :, kept], v[:, :, kept]
        return F.scaled_dot_product_attention(q, k, v) + 0 * saliency.sum()

    truth, naive = run(dense, inputs.to(torch.float64)), run(dense, inputs)
    result = run(ATTEND[impl], inputs)
    require(*(judge(n, result[n], naive[n], truth[n]) for n in ("out", "dq", "dk", "dv")))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_returns_the_kept_tokens(impl):
    inputs = make(CASES["prune-per-head"], device=DEVICES.get(impl, "cpu"))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.saliency, inputs.keep)
    options = {**inputs.options, "passthrough": inputs.passthrough, "impl": impl}
    out, tokens = saliency_attention(*arguments, **options, return_indices=True)
    kept = inputs.kept()
    assert torch.equal(out, saliency_attention(*arguments, **options))
    assert tokens.dtype == torch.int32 and tokens.shape == (2, 2, 32)  # 0.4 of 80
    for b in range(2):
        for s in range(2):
            expected = kept[b, s].nonzero().flatten()
            found = tokens[b, s]
            assert torch.equal(found[: len(expected)].long(), expected)
            assert (found[len(expected) :] == -1).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("through", [False, True])
def test_dropped_queries_pass_through_unchanged(through, impl):
    spec = Spec(60, batch=2, prune="passthrough" if through else "queries", per_head=True)
    inputs = make(spec, device=DEVICES.get(impl, "cpu"))
    found = run(partial(saliency_attention, impl=impl), inputs)
    dropped = ~inputs.kept()
    expected = inputs.passthrough if through else torch.zeros_like(inputs.q)
    assert torch.equal(found["out"][dropped], expected[dropped])
    assert (found["dq"][dropped] == 0).all()
    if through:
        assert torch.equal(found["dpassthrough"][dropped], inputs.dout[dropped])
        assert (found["dpassthrough"][~dropped] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saliency_has_any_floating_dtype_and_gets_its_gradient_in_it(dtype, impl):
    inputs = make(Spec(60, batch=2), device=DEVICES[impl])
    inputs = replace(inputs, saliency=inputs.saliency.to(dtype))
    found, plain = run(ATTEND[impl], inputs), run(ATTEND[impl], inputs.to(torch.float32))
    assert found["dsaliency"].dtype == dtype
    assert torch.equal(found["dsaliency"].float(), plain["dsaliency"].to(dtype).float())
    assert torch.equal(found["out"], plain["out"])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 5), (2, 0, 5, 5), (1, 2, 0, 70), (1, 2, 70, 0), (1, 2, 0, 0)]
)
def test_sizes_of_zero(shape, impl):
    batch, heads, q_len, k_len = shape
    device = DEVICES.get(impl, "cpu")
    q, k, v = (
        torch.randn(batch, heads, n, 16, device=device, requires_grad=True)
        for n in (q_len, k_len, k_len)
    )
    saliency = torch.rand(batch, k_len, device=device, requires_grad=True)
    prune = q_len == k_len
    out = saliency_attention(q, k, v, saliency, 0.5, prune_queries=prune, impl=impl)
    assert out.shape == q.shape and (out == 0).all()
    leaves = (q, k, v, saliency)
    grads = torch.autograd.grad(out, leaves, out, allow_unused=True, materialize_grads=True)
    assert all(g.shape == x.shape and (g == 0).all() for g, x in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prune", [None, "passthrough"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_output_lies_in_memory_as_q_does(layout, prune, impl):
    inputs = make(Spec(70, batch=2, layout=layout, prune=prune), device=DEVICES[impl])
    out = saliency_attention(
        inputs.q, inputs.k, inputs.v, inputs.saliency, 0.5, prune_queries=prune is not None,
        passthrough=inputs.passthrough, impl=impl,
    )  # fmt: skip
    assert out.stride() == inputs.q.stride()


BUSY = Spec(
    100, keep=0.4, batch=2, heads=2, key_heads=1, saliency="ties", prune="passthrough", always=1
)


def equal(first, second):
    return first.dtype == second.dtype and torch.equal(
        first.nan_to_num(-1e9), second.nan_to_num(-1e9)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_two_equal_runs_give_equal_bits(impl):
    inputs = make(BUSY, device=DEVICES[impl])
    first, second = run(ATTEND[impl], inputs), run(ATTEND[impl], inputs)
    assert all(equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("other", ["values", "nan", "nothing"])
def test_a_sample_does_not_depend_on_its_batch_mates(other, impl):
    inputs = make(BUSY, device=DEVICES[impl])
    changed = {n: t.clone() for n, t in (inputs.tensors | {"dout": inputs.dout}).items()}
    for name, tensor in changed.items():
        if other == "nan":
            tensor[1] = math.nan
        elif name == "saliency":
            tensor[1] = 0 if other == "nothing" else tensor[1].flip(-1)
        else:
            tensor[1] = -3 * tensor[1]
    first, second = run(ATTEND[impl], inputs), run(ATTEND[impl], replace(inputs, **changed))
    assert all(equal(first[n][0], second[n][0]) for n in first)
    assert not equal(first["out"][1], second["out"][1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keep", [20, 0.3])
def test_padded_equals_unpadded(keep, impl):
    """70 tokens padded to 130 keep the same tokens and give the same as by themselves."""
    short = make(Spec(70, keep=keep, prune="passthrough"), device=DEVICES[impl])
    wide = {}
    for name, tensor in (short.tensors | {"dout": short.dout}).items():
        axis = (0, 60) if name == "saliency" else (0, 0, 0, 60)
        wide[name] = F.pad(tensor, axis, value=math.nan if name in "qkv saliency" else 0.0)
    real = (torch.arange(130, device=short.q.device) < 70)[None]
    padded = replace(short, **wide, options=short.options | {"key_mask": real})
    assert torch.equal(padded.kept()[..., :70], short.kept()) and not padded.kept()[..., 70:].any()
    expected, found = run(ATTEND[impl], short), run(ATTEND[impl], padded)
    truth = run(REFERENCE, short.to(torch.float64))
    for name in expected:
        cut = (..., slice(70)) if name == "dsaliency" else (slice(None), slice(None), slice(70))
        require(judge(name, found[name][cut], expected[name], truth[name]))
    for name in ("dq", "dk", "dv"):
        assert (found[name][:, :, 70:] == 0).all()
    assert (found["dsaliency"][..., 70:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_as_they_are(impl):
    inputs = make(CASES["prune-per-head"], device=DEVICES[impl])
    given = inputs.tensors | {"dout": inputs.dout, "key_mask": inputs.options["key_mask"]}
    before = {name: tensor.clone() for name, tensor in given.items()}
    run(ATTEND[impl], inputs)
    assert all(equal(given[name], before[name]) for name in before)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("case", ["prune-per-head", "threshold", "gqa", "all-padding"])
def test_gradcheck(case, impl):
    spec = replace(CASES[case], tokens=23, head_dim=3, batch=2, layout="contiguous")
    inputs = make(spec, torch.float64)
    inputs = replace(inputs, **{n: t.nan_to_num(0.5) for n, t in inputs.tensors.items()})

    def function(*leaves):
        given = dict(zip(inputs.tensors, leaves, strict=True))
        through = {n: given.pop(n) for n in list(given) if n == "passthrough"}
        return saliency_attention(
            *given.values(), inputs.keep, **through, **inputs.options, impl=impl
        )

    leaves = [t.clone().requires_grad_() for t in inputs.tensors.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_is_refused(impl):
    inputs = make(Spec(20, prune="queries"), device=DEVICES[impl])
    q = inputs.q.requires_grad_()
    out = saliency_attention(q, inputs.k, inputs.v, inputs.saliency, 0.5, impl=impl)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dq.sum().backward()


def test_automatic_choice_is_the_torch_path_on_a_cpu():
    inputs = make(CASES["prune-through"])
    auto, chosen = run(saliency_attention, inputs), run(ATTEND["torch"], inputs)
    assert all(torch.equal(auto[n], chosen[n]) for n in chosen)


def test_a_predictor_learns_through_the_bias():
    """Descent on the saliency alone raises the weight of the keys whose values are wanted."""
    q, k = torch.randn(2, 1, 1, 40, 16).unbind()
    v = torch.zeros_like(k)
    v[:, :, :10] = 1
    logits = torch.zeros(1, 40, requires_grad=True)
    losses = []
    for _ in range(20):
        out = saliency_attention(q, k, v, logits.sigmoid(), 1.0)
        losses.append((1 - out).square().mean())
        logits.data -= 20 * torch.autograd.grad(losses[-1], logits)[0]
    assert losses[-1] < 0.5 * losses[0]
    assert logits[0, :10].min() > logits[0, 10:].max()
