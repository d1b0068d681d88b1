"""linear_attention against its meaning, and against the formula written out."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import linear_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import check, make, run

REFERENCE = partial(linear_attention, impl="reference")
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
MAPS = ["elu", "relu", "identity"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "two-tokens": Spec(2),
    "n63": Spec(63),
    "n197": Spec(197, head_dim=64, batch=1, key_mask="tail"),
    "n577": Spec(577, heads=1, batch=1),
    "cross": Spec(70, 130, key_mask="random"),
    "one-query": Spec(1, 90),
    "d8": Spec(50, head_dim=8),
    "d16": Spec(50, head_dim=16),
    "d40": Spec(50, head_dim=40),
    "d72": Spec(50, head_dim=72),
    "d128": Spec(70, head_dim=128, batch=1, heads=1),
    "gqa": Spec(90, heads=4, key_heads=2, key_mask="random"),
    "mqa": Spec(90, 50, heads=3, key_heads=1),
    "permuted": Spec(70, layout="permuted", dout_layout="permuted"),
    "sliced": Spec(70, layout="sliced", dout_layout="sliced", key_mask="tail"),
    "expanded": Spec(70, heads=3, layout="expanded", dout_layout="scalar"),
    "strided": Spec(70, layout="strided", dout_layout="strided"),
    "no-keys-in-one-sample": Spec(70, key_mask="nothing"),
    "input-tenth": Spec(70, input_scale=0.1),
    "input-8": Spec(70, input_scale=8.0),
}
TRITON = [
    "two-tokens", "n197", "cross", "one-query", "d16", "d40", "d72", "d128", "gqa", "permuted",
    "sliced", "expanded", "strided", "no-keys-in-one-sample", "input-8",
]  # fmt: skip


def made(case, feature_map, dtype=torch.float32, device="cpu"):
    inputs = make(CASES[case], dtype, device).changed(feature_map=feature_map)
    if feature_map == "identity":  # a map with positive values, applied before
        q, k = (inputs.arguments[n].abs() + 0.1 for n in "qk")
        inputs = inputs.changed(q=q, k=k)
    return inputs


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_path(case, dtype, feature_map):
    check(partial(linear_attention, impl="torch"), REFERENCE, made(case, feature_map, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["n197", "cross", "gqa", "no-keys-in-one-sample"])
def test_torch_path_in_half_precision(case, dtype):
    check(partial(linear_attention, impl="torch"), REFERENCE, made(case, "elu", dtype))


@pytest.mark.parametrize("case", TRITON)
def test_triton_path(case):
    inputs = made(case, "elu", device=DEVICES["triton"])
    check(partial(linear_attention, impl="triton"), REFERENCE, inputs)


@pytest.mark.parametrize("feature_map", ["relu", "identity"])
@pytest.mark.parametrize("case", ["cross", "gqa", "no-keys-in-one-sample"])
def test_triton_path_of_other_maps(case, feature_map):
    inputs = made(case, feature_map, device=DEVICES["triton"])
    check(partial(linear_attention, impl="triton"), REFERENCE, inputs)


@pytest.mark.parametrize("case", ["n197", "d72", "gqa"])
def test_triton_path_in_float16(case):
    inputs = made(case, "elu", torch.float16, DEVICES["triton"])
    check(partial(linear_attention, impl="triton"), REFERENCE, inputs)


@pytest.mark.parametrize("case", ["cross"])
def test_triton_path_in_bfloat16(case):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    inputs = made(case, "elu", torch.bfloat16, DEVICES["triton"])
    check(partial(linear_attention, impl="triton"), REFERENCE, inputs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_key_is_its_value(impl):
    """A single weight of 1: what q and k get cancels to 0."""
    inputs = make(Spec(60, 1), device=DEVICES[impl]).changed(feature_map="elu")
    inputs = replace(inputs, leaves=("v",))
    check(partial(linear_attention, impl=impl), REFERENCE, inputs, limits_only=True)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_weights_are_products_of_features(impl):
    """The quadratic form of the paper, each pair's weight by itself."""
    inputs = replace(made("cross", "elu", device=DEVICES.get(impl, "cpu")), leaves=("q", "v"))

    def pairs(q, k, v, feature_map, key_mask):
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (k, v))  # may hold NaN
        phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
        weights = (phi_q @ phi_k.mT).masked_fill(~key_mask[:, None, None], 0)
        return weights / weights.sum(-1, keepdim=True) @ v

    check(partial(linear_attention, impl=impl), pairs, inputs, limits_only=True)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_queries_without_a_feature_get_zero(impl):
    """relu of a negative query: its denominator is 0, and so are its output and gradients."""
    inputs = made("n63", "relu", device=DEVICES.get(impl, "cpu"))
    q = inputs.arguments["q"].clone()
    q[:, :, 5] = -q[:, :, 5].abs()
    found = run(partial(linear_attention, impl=impl), inputs.changed(q=q))
    assert (found["out"][:, :, 5] == 0).all() and (found["dq"][:, :, 5] == 0).all()
    assert all(bool(result.isfinite().all()) for result in found.values())


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("entry", [-30.0, -80.0])
def test_small_features_are_as_exact_as_large_ones(entry, impl):
    """Features of exp(-30) cancel in the ratio; expm1(-30) + 1 would be 0 in float32."""
    inputs = made("cross", "elu", device=DEVICES.get(impl, "cpu"))
    q = inputs.arguments["q"] + entry
    check(partial(linear_attention, impl=impl), REFERENCE, inputs.changed(q=q), limits_only=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_denominators_without_an_inverse_count_as_zero(impl):
    inputs = made("n63", "elu", device=DEVICES[impl])
    q = inputs.arguments["q"].clone()
    q[:, :, 5] = -100  # its features are no normal numbers, and 1 / (f(q).z) would be inf
    found = run(partial(linear_attention, impl=impl), inputs.changed(q=q))
    assert (found["out"][:, :, 5] == 0).all() and (found["dq"][:, :, 5] == 0).all()
    assert all(bool(result.isfinite().all()) for result in found.values())


def test_float16_sums_may_pass_the_range_of_float16():
    """4000 values of 40 make sums of 160000 and more; a half holds 65504 at most."""
    inputs = make(Spec(30, 4000, head_dim=16, batch=1, heads=1), torch.float16, DEVICES["triton"])
    v = torch.full_like(inputs.arguments["v"], 40) + inputs.arguments["v"]
    inputs = inputs.changed(v=v, feature_map="elu")
    check(partial(linear_attention, impl="triton"), REFERENCE_IN_FLOAT, inputs)


def REFERENCE_IN_FLOAT(q, k, v, feature_map):
    """The naive reference with float32 sums, as its own overflow."""
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype
    return REFERENCE(q.to(wide), k.to(wide), v.to(wide), feature_map).to(q.dtype)


@pytest.mark.parametrize("case", ["n197", "gqa"])
def test_any_cut_into_parts_gives_the_same(case, monkeypatch):
    from sparseattn.kernels.linear_attention import tuning

    inputs = made(case, "elu", device=DEVICES["triton"])
    for shortest in (32, 1024):
        monkeypatch.setattr(tuning, "SHORTEST_PART", shortest)
        check(partial(linear_attention, impl="triton"), REFERENCE, inputs)


@pytest.mark.parametrize("numbers", [1, 1 << 30])
def test_any_chunk_of_the_torch_path_gives_the_same(numbers, monkeypatch):
    from sparseattn.ops.blocked import linear_attention as blocked

    monkeypatch.setattr(blocked, "_CHUNK", numbers)
    check(partial(linear_attention, impl="torch"), REFERENCE, made("gqa", "elu"))
