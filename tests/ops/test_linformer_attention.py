"""linformer_attention against its meaning, and against the linformer package's form."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import linformer_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import check, linformer

REFERENCE = partial(linformer_attention, impl="reference")
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "two-tokens": Spec(2, landmarks=8),
    "fewer-tokens-than-landmarks": Spec(20, landmarks=49),
    "n63": Spec(63),
    "n197": Spec(197, head_dim=64, landmarks=49, batch=1, key_mask="tail"),
    "n577": Spec(577, heads=1, batch=1, landmarks=64),
    "cross": Spec(70, 130, key_mask="random"),
    "one-query": Spec(1, 90, landmarks=17),
    "one-landmark": Spec(40, landmarks=1),
    "m256": Spec(100, landmarks=256, batch=1, heads=1),
    "d8": Spec(50, head_dim=8),
    "d40": Spec(50, head_dim=40),
    "d128": Spec(70, head_dim=128, batch=1, heads=1),
    "gqa": Spec(90, heads=4, key_heads=2, key_mask="random"),
    "permuted": Spec(70, layout="permuted", dout_layout="permuted"),
    "sliced": Spec(70, layout="sliced", dout_layout="sliced", key_mask="tail"),
    "expanded": Spec(70, heads=3, layout="expanded", dout_layout="scalar"),
    "strided": Spec(70, layout="strided", dout_layout="strided"),
    "no-keys-in-one-sample": Spec(70, key_mask="nothing"),
    "scale": Spec(70, scale=-0.5),
    "input-8": Spec(70, input_scale=8.0),
}
TRITON = [
    "fewer-tokens-than-landmarks", "n197", "cross", "one-query", "m256", "d40", "gqa", "sliced",
    "expanded", "no-keys-in-one-sample", "scale",
]  # fmt: skip
SHARINGS = ["headwise", "key-value", "none"]


def attend(impl):
    return partial(linformer_attention, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c != "one-landmark"])
def test_torch_path(case, dtype):
    check(attend("torch"), REFERENCE, linformer(CASES[case], dtype))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("case", ["cross", "gqa", "no-keys-in-one-sample"])
def test_sharing_of_projections(case, sharing):
    check(attend("torch"), REFERENCE, linformer(CASES[case], sharing=sharing))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["n197", "cross"])
def test_torch_path_in_half_precision(case, dtype):
    # projected keys are rounded to the dtype, as the reference rounds them
    check(attend("torch"), rounded(dtype), linformer(CASES[case], dtype))


def rounded(dtype):
    """The definition in which projected keys and values are rounded to `dtype`."""

    def through(x):
        return x + (x.to(dtype).to(x.dtype) - x).detach()

    def reference(q, k, v, key_projection, value_projection=None, key_mask=None, scale=None):
        if key_mask is not None:
            k, v = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (k, v))
        second = key_projection if value_projection is None else value_projection
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = through(key_projection @ k), through(second @ v)
        return (q @ k.mT * scale).softmax(-1) @ v

    return reference


@pytest.mark.parametrize("case", TRITON)
def test_triton_path(case):
    check(attend("triton"), REFERENCE, linformer(CASES[case], device=DEVICES["triton"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_path_in_half_precision(dtype):
    inputs = linformer(CASES["cross"], dtype, DEVICES["triton"])
    check(attend("triton"), rounded(dtype), inputs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_landmark_is_its_value(impl):
    """A single weight of 1: what q and k get cancels to 0, the rest is linear."""
    inputs = linformer(CASES["one-landmark"], sharing="key-value", device=DEVICES[impl])
    check(attend(impl), REFERENCE, replace(inputs, leaves=("v", "value_projection")))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_linformer_package(impl):
    """Keys and values [B, N, D] projected by [N, m] parameters, scores scaled by D ** -0.5."""

    def theirs(q, k, v, key_projection, value_projection, scale):
        keys = torch.einsum("bhnd,nm->bhmd", k, key_projection.mT)
        values = torch.einsum("bhnd,nm->bhmd", v, value_projection.mT)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, keys) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), values)

    inputs = linformer(Spec(80), sharing="key-value", device=DEVICES[impl])
    check(attend(impl), theirs, inputs)


def test_gradient_of_a_shared_projection_is_never_made_for_each_head():
    from sparseattn.testing.memory import peak_extra_bytes

    spec = Spec(4096, head_dim=16, batch=2, heads=8, landmarks=64)
    inputs = linformer(spec)
    leaf = inputs.arguments["key_projection"].requires_grad_()
    out = linformer_attention(**inputs.arguments, impl="torch")
    _, extra = peak_extra_bytes(lambda: torch.autograd.grad(out.sum(), leaf))
    per_head = 16 * leaf.numel() * 4
    assert extra < per_head
