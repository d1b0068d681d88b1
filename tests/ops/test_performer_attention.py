"""performer_attention against its meaning, float64 features, and against other people's code."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import orthogonal_features, performer_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import check, performer, require_close, run

REFERENCE = partial(performer_attention, impl="reference")
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "two-tokens": Spec(2, landmarks=8),
    "fewer-tokens-than-features": Spec(20, landmarks=49),
    "n63": Spec(63),
    "n197": Spec(197, head_dim=64, landmarks=49, batch=1, key_mask="tail"),
    "n577": Spec(577, heads=1, batch=1, landmarks=64),
    "cross": Spec(70, 130, key_mask="random"),
    "one-query": Spec(1, 90, landmarks=17),
    "m256": Spec(100, landmarks=256, batch=1, heads=1),
    "m266": Spec(70, landmarks=266, batch=1, heads=1),
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
    "scale": Spec(70, scale=0.5),
}
TRITON = [
    "two-tokens", "fewer-tokens-than-features", "n197", "cross", "one-query", "m256", "d16", "d72",
    "d128", "gqa", "sliced", "expanded", "strided", "no-keys-in-one-sample",
]  # fmt: skip
KERNELS = {
    "softmax": {},
    "cosh": {"kernel": "cosh"},
    "relu": {"kernel": "relu"},
    "eps": {"eps": 1e-4},
}


def attend(impl, kernel="softmax"):
    return partial(performer_attention, impl=impl, **KERNELS[kernel])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_path(case, dtype):
    check(attend("torch"), REFERENCE, performer(CASES[case], dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["n197", "cross", "gqa", "no-keys-in-one-sample"])
def test_torch_path_in_half_precision(case, dtype):
    check(attend("torch"), REFERENCE, performer(CASES[case], dtype))


@pytest.mark.parametrize("kernel", ["cosh", "relu", "eps"])
@pytest.mark.parametrize("case", ["two-tokens", "n197", "cross", "gqa", "no-keys-in-one-sample"])
def test_torch_path_of_other_kernels(case, kernel):
    reference = partial(REFERENCE, **KERNELS[kernel])
    check(attend("torch", kernel), reference, performer(CASES[case]))


@pytest.mark.parametrize("case", TRITON)
def test_triton_path(case):
    check(attend("triton"), REFERENCE, performer(CASES[case], device=DEVICES["triton"]))


@pytest.mark.parametrize("kernel", ["cosh", "relu", "eps"])
@pytest.mark.parametrize("case", ["cross", "gqa"])
def test_triton_path_of_other_kernels(case, kernel):
    reference = partial(REFERENCE, **KERNELS[kernel])
    inputs = performer(CASES[case], device=DEVICES["triton"])
    check(attend("triton", kernel), reference, inputs)


@pytest.mark.parametrize("case", ["d72", "gqa"])
def test_triton_path_in_float16(case):
    check(attend("triton"), REFERENCE, performer(CASES[case], torch.float16, DEVICES["triton"]))


@pytest.mark.parametrize("case", ["cross"])
def test_triton_path_in_bfloat16(case):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    check(attend("triton"), REFERENCE, performer(CASES[case], torch.bfloat16, DEVICES["triton"]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token_is_its_value(kernel, impl):
    inputs = performer(Spec(1, landmarks=8), device=DEVICES[impl])
    found = run(attend(impl, kernel), inputs)
    v = inputs.arguments["v"]
    require_close("out", found["out"], v.double(), v.double().norm(), v.dtype)
    require_close("dv", found["dv"], inputs.dout.double(), inputs.dout.double().norm(), v.dtype)
    for name in ("dq", "dk", "dprojection"):  # of a single weight of 1: sums that cancel to 0
        terms = (inputs.dout.double() * v).norm() * inputs.arguments["q"].double().norm()
        require_close(name, found[name], torch.zeros_like(found[name]).double(), terms, v.dtype)


ANY_SIZE = [(k, "torch", s) for k in ("softmax", "cosh", "relu") for s in (0.1, 1.0, 3.0, 8.0)]
ANY_SIZE += [("softmax", "triton", 0.1), ("softmax", "triton", 8.0), ("relu", "triton", 8.0)]


@pytest.mark.parametrize(("kernel", "impl", "size"), ANY_SIZE)
def test_inputs_of_any_size(kernel, impl, size):
    """At 8 the exponents of single features reach hundreds; two softmaxes stay within limits."""
    spec = Spec(120, head_dim=64, landmarks=64, batch=1, input_scale=size)
    inputs = performer(spec, device=DEVICES[impl])
    reference = partial(REFERENCE, **KERNELS[kernel])
    check(attend(impl, kernel), reference, inputs, limits_only=size > 1)


def test_float16_gradients_of_many_queries_do_not_overflow():
    """A feature's gradient is summed over all queries: 400 terms of 300 are more than float16."""
    spec = Spec(400, 64, head_dim=16, landmarks=8, batch=1, heads=1)
    inputs = performer(spec, torch.float16, DEVICES["triton"])
    inputs = replace(inputs, dout=(300 + inputs.dout).half(), leaves=("q", "v"))
    assert run(REFERENCE, inputs.to(torch.float64))["dv"].abs().max() < torch.finfo(torch.half).max
    check(attend("triton"), REFERENCE, inputs, limits_only=True)


# -- the meaning, and other people's code, written out -------------------------------------------


def features(x, projection, scale):
    """exp(w.x' - |x'|^2 / 2), the definition of the paper."""
    x = x * math.sqrt(scale)
    return (x @ projection.mT - x.square().sum(-1, keepdim=True) / 2).exp()


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_two_softmaxes_are_the_ratio_of_features(impl):
    inputs = performer(Spec(50, 70, head_dim=16), torch.float64)
    q, k, v, projection = (inputs.arguments[name] for name in ("q", "k", "v", "projection"))
    phi_q, phi_k = (features(x, projection, 0.25) for x in (q, k))
    expected = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(2)[..., None])
    narrow = inputs.to(torch.float32 if impl == "triton" else torch.float64)
    check(attend(impl), lambda **_: expected, replace(narrow, leaves=()), limits_only=True)


def shifted(x, projection, is_query, eps):
    """Features as performer-pytorch and the JAX original make them, with their maxima."""
    normaliser, ratio = x.shape[-1] ** -0.25, projection.shape[0] ** -0.5
    dash = torch.einsum("bhnd,md->bhnm", normaliser * x, projection)
    diagonal = (x.square().sum(-1) / 2 * normaliser**2)[..., None]
    peak = dash.amax(-1, keepdim=True) if is_query else dash.amax((-1, -2), keepdim=True)
    return ratio * ((dash - diagonal - peak.detach()).exp() + eps)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("eps", "size"), [(1e-4, 1.0), (1e-6, 1.0), (1e-4, 3.0), (1e-2, 0.3)])
def test_performer_pytorch_and_jax_with_their_eps(eps, size, impl):
    def theirs(q, k, v, projection, scale):
        phi_q, phi_k = shifted(q, projection, True, eps), shifted(k, projection, False, eps)
        inverse = 1 / torch.einsum("bhnm,bhm->bhn", phi_q, phi_k.sum(-2))
        context = torch.einsum("bhnm,bhnd->bhmd", phi_k, v)
        return torch.einsum("bhmd,bhnm,bhn->bhnd", context, phi_q, inverse)

    inputs = performer(Spec(80, landmarks=40, input_scale=size), device=DEVICES[impl])
    if size == 3.0:  # eps outweighs every feature: the layer pools, and other gradients vanish
        inputs = replace(inputs, leaves=("v",))
    check(partial(performer_attention, eps=eps, impl=impl), theirs, inputs, limits_only=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_performer_pytorch_with_its_generalized_kernel(impl):
    def theirs(q, k, v, projection, scale):
        normaliser = q.shape[-1] ** -0.25
        phi_q, phi_k = ((normaliser * x @ projection.mT).relu() + 1e-3 for x in (q, k))
        inverse = 1 / torch.einsum("bhnm,bhm->bhn", phi_q, phi_k.sum(-2))
        context = torch.einsum("bhnm,bhnd->bhmd", phi_k, v)
        return torch.einsum("bhmd,bhnm,bhn->bhnd", context, phi_q, inverse)

    inputs = performer(Spec(80, landmarks=40), device=DEVICES[impl])
    check(attend(impl, "relu"), theirs, inputs, limits_only=True)


def test_many_features_approach_softmax_attention():
    """Not a test of closeness, but of what is estimated: the error must fall with m."""
    q, k, v = torch.randn(3, 1, 2, 64, 16, dtype=torch.float64).unbind()
    q, k = q / 2, k / 2
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for m in (16, 4096):
        projection = orthogonal_features(m, 16, generator=generator, dtype=torch.float64)
        errors.append((performer_attention(q, k, v, projection) - exact).norm() / exact.norm())
    assert errors[1] < errors[0] / 4 and errors[1] < 0.1


# -- the parts of the long side ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cross", "gqa"])
def test_any_cut_into_parts_gives_the_same(case, monkeypatch):
    from sparseattn.kernels.landmark_attention import tuning

    inputs = performer(CASES[case], device=DEVICES["triton"])
    for shortest in (32, 1024):
        monkeypatch.setattr(tuning, "SHORTEST_PART", shortest)
        check(attend("triton"), REFERENCE, inputs)


def test_parts_follow_from_sizes_alone():
    from sparseattn.kernels.landmark_attention.tuning import part_length

    assert part_length(1 << 20, 96, 256) == 4096
    assert part_length(16384, 8, 256) == 512
    assert part_length(100, 1, 16) == 128
    assert part_length(0, 0, 1) == 128


@pytest.mark.parametrize("weights", [1, 1000, 1 << 30])
def test_any_chunk_of_the_torch_path_gives_the_same(weights, monkeypatch):
    from sparseattn.ops.blocked import landmark_attention

    monkeypatch.setattr(landmark_attention, "_CHUNK_WEIGHTS", weights)
    check(attend("torch"), REFERENCE, performer(CASES["gqa"]))
    check(attend("torch", "eps"), partial(REFERENCE, eps=1e-4), performer(CASES["n197"]))


# -- random features -----------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "D"), [(64, 64), (256, 64), (49, 16), (7, 32), (1, 1)])
def test_features_are_orthogonal_within_blocks(m, D):
    features = orthogonal_features(m, D, norms="sqrt", dtype=torch.float64)
    assert features.shape == (m, D)
    for block in features.split(D):
        gram = block @ block.mT
        expected = D * torch.eye(len(block), dtype=torch.float64)
        assert (gram - expected).norm() <= 1e-5 * expected.norm()


def test_lengths_are_those_of_normal_vectors():
    features = orthogonal_features(4096, 16, generator=torch.Generator().manual_seed(1))
    squared = features.square().sum(1)
    assert abs(float(squared.mean()) / 16 - 1) < 0.05 and 24 < float(squared.var()) < 40
    assert features.mean(0).abs().max() < 0.1  # directions have no preferred sign


def test_features_follow_the_generator():
    def draw(seed, **options):
        return orthogonal_features(40, 16, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    torch.manual_seed(5)
    first = orthogonal_features(8, 8)
    torch.manual_seed(5)
    assert torch.equal(first, orthogonal_features(8, 8))
    assert draw(3, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_features_are_redrawn_in_place():
    buffer = torch.nn.Parameter(torch.zeros(40, 16))
    before = buffer.data_ptr()
    generator = torch.Generator().manual_seed(0)
    drawn = orthogonal_features(40, 16, generator=generator, out=buffer)
    assert drawn.data_ptr() == before and buffer.requires_grad
    again = orthogonal_features(40, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(buffer.detach(), again)
