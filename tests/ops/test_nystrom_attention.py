"""nystrom_attention against its meaning, and against other people's code."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import nystrom_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import check, nystrom, require_close, run

REFERENCE = partial(nystrom_attention, impl="reference")
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "two-tokens": Spec(2, landmarks=8),
    "fewer-tokens-than-landmarks": Spec(20, batch=1, heads=1, landmarks=49),
    "as-many": Spec(24, landmarks=24),
    "one-landmark-each-two": Spec(48, landmarks=24),
    "n197": Spec(197, head_dim=64, landmarks=49, batch=1, heads=1, key_mask="tail"),
    "n197-correlated": Spec(197, landmarks=49, correlated=True),
    "n577": Spec(577, heads=1, batch=1, landmarks=64),
    "n1025-iid": Spec(1025, heads=2, batch=1, landmarks=32),
    "n1025-correlated": Spec(1025, heads=2, batch=1, landmarks=32, correlated=True),
    "masked": Spec(90, heads=1, landmarks=16, key_mask="random"),
    "m256": Spec(300, landmarks=256, batch=1, heads=1),
    "d8": Spec(50, head_dim=8),
    "d40": Spec(50, head_dim=40, batch=1, heads=1),
    "d128": Spec(70, head_dim=128, batch=1, heads=1),
    "gqa": Spec(60, heads=2, key_heads=1, batch=1, landmarks=14),
    "mqa-masked": Spec(50, heads=3, key_heads=1, key_mask="tail", landmarks=10),
    "permuted": Spec(70, layout="permuted", dout_layout="permuted"),
    "sliced": Spec(
        40, heads=1, landmarks=10, layout="sliced", dout_layout="sliced", key_mask="tail"
    ),
    "expanded": Spec(70, heads=3, layout="expanded", dout_layout="scalar"),
    "strided": Spec(40, batch=1, heads=1, layout="strided", dout_layout="strided"),
    "nothing-in-one-sample": Spec(40, heads=1, landmarks=10, key_mask="nothing"),
    "scale": Spec(70, scale=-0.5),
}  # fmt: skip
TRITON = [
    "fewer-tokens-than-landmarks", "n197", "masked", "d40", "gqa", "sliced", "strided",
    "nothing-in-one-sample",
]  # fmt: skip
GRIDS = {
    "2d": (Spec(64, landmarks=16), {"grid": (8, 8)}),
    "class-tokens": (Spec(50, heads=1), {"grid": (6, 8), "num_landmarks": (2, 3)}),
    "3d": (Spec(61, landmarks=8, key_mask="random"), {"grid": (3, 4, 5)}),
}
RESIDUALS = {  # the filter of each head, and what it is of
    "one-tap": (Spec(20, heads=1, landmarks=8), (1,), {}),
    "33-taps": (Spec(60, landmarks=12), (33,), {}),
    "longer-than-the-tokens": (Spec(7, landmarks=4), (21,), {}),
    "gqa-masked": (Spec(40, heads=4, key_heads=2, landmarks=8, key_mask="random"), (5,), {}),
    "along-the-tokens-of-a-grid": (Spec(50, heads=1), (3,), {"grid": (6, 8)}),
    "2d": (Spec(50, landmarks=8, key_mask="random"), (3, 5), {"grid": (6, 8)}),
    "3d": (Spec(61, landmarks=8, layout="permuted"), (3, 1, 7), {"grid": (3, 4, 5)}),
}
LEGACY = {"legacy_start": True}


def attend(impl, **options):
    return partial(nystrom_attention, impl=impl, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torch_path(case, dtype):
    check(attend("torch"), REFERENCE, nystrom(CASES[case], dtype))


@pytest.mark.parametrize("case", ["masked", "gqa", "n1025-correlated"])
def test_start_of_the_whole_batch(case):
    reference = partial(REFERENCE, **LEGACY)
    check(attend("torch", **LEGACY), reference, nystrom(CASES[case]))


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_landmarks_of_a_grid(case, impl):
    spec, options = GRIDS[case]
    if impl == "triton":
        spec = replace(spec, heads=1, batch=1 if spec.key_mask is None else 2)
    check(attend(impl), REFERENCE, nystrom(spec, device=DEVICES[impl]).changed(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", RESIDUALS)
def test_residual(case, dtype):
    spec, taps, options = RESIDUALS[case]
    check(attend("torch"), REFERENCE, nystrom(spec, dtype, residual=taps).changed(**options))


def test_residual_beside_the_triton_path():
    spec, taps, options = RESIDUALS["gqa-masked"]
    spec = replace(spec, heads=2, key_heads=1, head_dim=16)
    inputs = nystrom(spec, device=DEVICES["triton"], residual=taps)
    check(attend("triton"), REFERENCE, inputs.changed(**options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_in_half_precision(dtype):
    """Its part of the result and its gradients: what another filter leaves as it is drops out."""
    inputs = nystrom(Spec(40, landmarks=8, correlated=True), dtype, residual=(5,))

    def part(residual, **arguments):
        return attend("torch")(**arguments, residual=residual) - attend("torch")(**arguments)

    def exact(v, residual, **_):
        weight = residual[:, None, :, None]
        return torch.nn.functional.conv2d(v, weight, padding=(2, 0), groups=2)

    check(part, exact, replace(inputs, leaves=("v", "residual")), limits_only=True)


@pytest.mark.parametrize("case", TRITON)
def test_triton_path(case):
    check(attend("triton"), REFERENCE, nystrom(CASES[case], device=DEVICES["triton"]))


def test_triton_path_where_torch_inverts():
    """More landmarks than a program holds, and the start value of the whole batch."""
    inputs = nystrom(Spec(140, batch=1, heads=1, head_dim=16, landmarks=132))
    check(attend("triton"), REFERENCE, inputs)
    inputs = nystrom(Spec(40, heads=1, head_dim=16, landmarks=8))
    check(attend("triton", **LEGACY), partial(REFERENCE, **LEGACY), inputs)


def rounded(dtype):
    """The definition in which landmarks are rounded to `dtype`, as the op holds them."""

    def through(x):
        return x + (x.to(dtype).to(x.dtype) - x).detach()

    def reference(q, k, v, num_landmarks, scale):
        scale = q.shape[-1] ** -0.5
        queries, keys = (through(x.unflatten(2, (num_landmarks, -1)).mean(3)) for x in (q, k))
        z = invert(queries, keys, scale, whole_batch=False)
        first, third = (attention_weights(a, b, scale) for a, b in ((q, keys), (queries, k)))
        return first @ (z @ (third @ v))

    return reference


def attention_weights(q, k, scale):
    return (scale * q @ k.mT).softmax(-1)


def invert(queries, keys, scale, whole_batch):
    """Six steps, as the paper's authors wrote them."""
    weights = attention_weights(queries, keys, scale)
    columns = weights.sum(-2)
    norm = columns.amax() if whole_batch else columns.amax(-1)[..., None, None]
    z, eye = weights.mT / norm, torch.eye(weights.shape[-1], dtype=weights.dtype)
    for _ in range(6):
        y = weights @ z
        z = 0.25 * z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y)))
    return z


HALVES = [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)]
HALVES += [("triton", torch.bfloat16)]


@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
def test_half_precision(impl, dtype):
    spec = Spec(96, batch=1, heads=1, landmarks=12, correlated=True)
    check(attend(impl), rounded(dtype), nystrom(spec, dtype, DEVICES[impl]), limits_only=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_token_is_its_value(impl):
    inputs = nystrom(Spec(1, batch=1, heads=1, landmarks=8), device=DEVICES[impl])
    found = run(attend(impl), inputs)
    v = inputs.arguments["v"]
    require_close("out", found["out"], v.double(), v.double().norm(), v.dtype)
    require_close("dv", found["dv"], inputs.dout.double(), inputs.dout.double().norm(), v.dtype)


def test_as_many_landmarks_as_tokens_is_attention():
    """F1 = F2 = F3: where F2 is inverted, that is softmax attention."""
    q = 3 * torch.randn(1, 2, 16, 64, dtype=torch.float64)
    v = torch.randn(1, 2, 16, 64, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v)
    for landmarks in (16, 24):
        found = nystrom_attention(q, q, v, landmarks, iterations=20)
        require_close("out", found, expected, expected.norm(), torch.float64)


def test_triton_path_gives_equal_bits_whatever_the_batch_mates():
    spec = Spec(30, heads=1, head_dim=16, landmarks=8, key_mask="tail")
    inputs = nystrom(spec, device=DEVICES["triton"]).changed(iterations=2)
    first, second = run(attend("triton"), inputs), run(attend("triton"), inputs)
    changed = {n: inputs.arguments[n].clone() for n in "qkv"}
    for tensor in changed.values():
        tensor[1] *= -3.0
    other = run(attend("triton"), inputs.changed(**changed))
    for name, expected in first.items():
        assert torch.equal(second[name], expected) and torch.equal(other[name][0], expected[0])
    assert not torch.equal(other["out"][1], first["out"][1])


# -- other people's code -------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nystrom_attention_package(impl):
    """Its formula for lengths that are multiples of m, without its convolution."""

    def theirs(q, k, v, num_landmarks, scale):
        each = q.shape[2] // num_landmarks
        q = q * q.shape[-1] ** -0.5
        queries, keys = (x.unflatten(2, (num_landmarks, each)).sum(3) / each for x in (q, k))
        first, third = (q @ keys.mT).softmax(-1), (queries @ k.mT).softmax(-1)
        return (first @ invert(queries, keys, 1.0, whole_batch=True)) @ (third @ v)

    spec = Spec(96, heads=1, head_dim=16, landmarks=12)
    inputs = nystrom(spec, device=DEVICES[impl])
    check(attend(impl, **LEGACY), theirs, inputs, limits_only=True)


def test_transformers_nystromformer():
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import (
        NystromformerSelfAttention,
    )

    config = NystromformerConfig(
        hidden_size=64, num_attention_heads=4, segment_means_seq_len=128, num_landmarks=16,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    host = NystromformerSelfAttention(config).double().eval()
    torch.nn.init.zeros_(host.conv.weight)  # the convolution beside the attention
    x = torch.randn(2, 128, 64, dtype=torch.float64)
    q, k, v = (
        project(x).unflatten(2, (4, 16)).transpose(1, 2)
        for project in (host.query, host.key, host.value)
    )
    found = nystrom_attention(q, k, v, 16, legacy_start=True).transpose(1, 2).flatten(2)
    expected = host(x)[0]
    require_close("out", found, expected, expected.norm(), torch.float64)


# -- sizes ---------------------------------------------------------------------------------------


def test_memory_grows_with_the_landmarks_and_not_with_tokens_times_landmarks():
    from sparseattn.testing.memory import peak_extra_bytes

    inputs = nystrom(Spec(8192, head_dim=16, batch=1, heads=8, landmarks=128))
    leaves = [inputs.arguments[n].requires_grad_() for n in "qkv"]
    out = nystrom_attention(**inputs.arguments)
    _, extra = peak_extra_bytes(lambda: torch.autograd.grad(out.sum(), leaves))
    assert extra < 8 * 8192 * 128 * 4  # one [N, m] of every head


@pytest.mark.parametrize("weights", [1, 1000, 1 << 30])
def test_any_chunk_of_the_torch_path_gives_the_same(weights, monkeypatch):
    from sparseattn.ops.blocked import landmark_attention, segment_means

    monkeypatch.setattr(landmark_attention, "_CHUNK_WEIGHTS", weights)
    monkeypatch.setattr(segment_means, "_CHUNK_TOKENS", max(7, weights // 10))
    check(attend("torch"), REFERENCE, nystrom(CASES["masked"]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_of_segment_means(impl):
    from sparseattn.structures.segments import Segments

    q = torch.randn(2, 30, 2, 16, device=DEVICES[impl]).transpose(1, 2)
    mask = torch.rand(2, 30, device=q.device) < 0.6
    for segments in (
        Segments.balanced(30, 7, mask, q.device),
        Segments.of_grid((5, 6), (2, 2), 0, None, q.device),
    ):
        lists = (segments.ids, segments.counts, segments.starts, segments.order)
        op = torch.ops.sparseattn.segment_means.default
        torch.library.opcheck(op, (q, *lists, impl))
        sent = (q, op(q, *lists, impl), *lists[:2], impl)
        torch.library.opcheck(torch.ops.sparseattn.segment_means_backward.default, sent)


# -- errors --------------------------------------------------------------------------------------

ERRORS = [
    (ValueError, "k has shape [2, 2, 11, 32]; expected [B, G, N, D]",
     {"k": torch.ones(2, 2, 11, 32), "v": torch.ones(2, 2, 11, 32)}),
    (TypeError, "num_landmarks is 2.0 (float)", {"num_landmarks": 2.0}),
    (TypeError, "num_landmarks is (2, 2) (tuple)", {"num_landmarks": (2, 2)}),
    (ValueError, "num_landmarks is 0", {"num_landmarks": 0}),
    (ValueError, "num_landmarks is (2, 5)", {"num_landmarks": (2, 5), "grid": (3, 4)}),
    (ValueError, "num_landmarks is (2,)", {"num_landmarks": (2,), "grid": (3, 4)}),
    (ValueError, "iterations is 0", {"iterations": 0}),
    (TypeError, "grid is 4 (int)", {"grid": 4}),
    (ValueError, "grid is (4,) (tuple); expected two or three", {"grid": (4,)}),
    (ValueError, "grid is (4, 4) (tuple); expected at most N", {"grid": (4, 4)}),
    (TypeError, "grid is 2.0 (float)", {"grid": (2.0, 2)}),
    (TypeError, "legacy_start is 1 (int)", {"legacy_start": 1}),
    (TypeError, "residual is 3 (int)", {"residual": 3}),
    (TypeError, "residual has dtype torch.int64", {"residual": torch.ones(2, 3).long()}),
    (ValueError, "residual has shape [2, 4]; expected [G, w] with odd w, G=2 (from v)",
     {"residual": torch.ones(2, 4)}),
    (ValueError, "residual has shape [3, 5]; expected [G, w]", {"residual": torch.ones(3, 5)}),
    (ValueError, "residual has shape [2, 3, 3]; expected [G, w] with odd",
     {"residual": torch.ones(2, 3, 3)}),
    (ValueError, "residual has shape [2, 3, 3, 3]; expected [G, w] or one for each axis of the "
     "grid, [G, w, w]", {"residual": torch.ones(2, 3, 3, 3), "grid": (3, 4)}),
    (ValueError, "residual is on meta", {"residual": torch.ones(2, 3, device="meta")}),
    (ValueError, f"scale is {math.inf}", {"scale": math.inf}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "sentence", "wrong"), ERRORS)
def test_errors(error, sentence, wrong):
    arguments = nystrom(Spec(12, landmarks=4)).arguments | wrong
    with pytest.raises(error, match=re.escape(f"nystrom_attention: {sentence}")):
        nystrom_attention(**arguments)
