"""topk_attention against its meaning: chosen blocks, result and gradients, on every path."""

from dataclasses import replace
from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from sparseattn import topk_attention
from sparseattn.testing.inputs import AttentionSpec
from sparseattn.testing.topk_attention import TopkSpec, check, make, run

REFERENCE = partial(topk_attention, impl="reference")
TORCH = partial(topk_attention, impl="torch")
TRITON = partial(topk_attention, impl="triton")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

poisoned = pytest.mark.usefixtures("poisoned_memory")  # only kernels write into empty tensors here


def spec(q_len, k_len=None, *, keep=0.4, mode="top_k", pooling="mean", gate=None, always=False,
         query_mask=False, weights=False, block=16, **attention):  # fmt: skip
    sizes = block if isinstance(block, tuple) else (block, block)
    base = {"head_dim": 16, "block_size": sizes} | attention
    return TopkSpec(
        AttentionSpec(q_len, k_len, **base), keep, mode, pooling, gate, always, query_mask, weights
    )


CASES = {
    # lengths
    "one-token": spec(1, keep=1, gate=1.0),
    "n63": spec(63, keep=2),
    "n65": spec(65, keep=3, gate="scalar"),
    "n127": spec(127, block=64, keep=1, gate=0.5),
    "n197": spec(197, block=64, keep=0.5, head_dim=64),
    "n577": spec(577, block=64, keep=0.25, heads=1, gate=1.0),
    "n1025": spec(1025, block=64, keep=4, heads=1, key_mask="random"),
    "one-query": spec(1, 150, keep=3, gate=1.0),
    "one-key": spec(50, 1, keep=1, gate="heads"),
    "cross": spec(33, 97, keep=2, batch=2),
    # head dims
    "d24": spec(70, keep=2, head_dim=24, gate=1.0),
    "d72": spec(70, keep=2, head_dim=72, gate=1.0),
    "d128": spec(70, keep=2, head_dim=128, pooling="max"),
    "d256": spec(40, keep=2, head_dim=256, gate=1.0, heads=1),
    # heads and batch
    "gqa": spec(70, keep=2, batch=2, heads=4, key_heads=2, gate="heads"),
    "mqa": spec(50, 70, keep=3, heads=4, key_heads=1, gate=0.3, pooling="max"),
    "many-heads": spec(40, keep=2, batch=3, heads=8),
    # memory
    "permuted": spec(70, keep=2, layout="permuted", dout_layout="permuted", gate=1.0),
    "sliced": spec(70, keep=2, layout="sliced", dout_layout="sliced", gate=1.0, pooling="max"),
    "expanded": spec(70, keep=2, heads=3, layout="expanded", gate=1.0),
    "strided": spec(70, keep=2, layout="strided", dout_layout="scalar", gate=1.0, key_mask="tail"),
    # how much is kept
    "none": spec(70, keep=0, gate="scalar"),
    "one": spec(70, keep=1),
    "all": spec(70, keep=99, gate=1.0),
    "everything-at-once": spec(70, keep=1.0),
    "fraction-one": spec(70, keep=1.0, gate="heads"),
    "rows": spec(70, keep="rows", batch=2, gate=1.0),
    "top-p": spec(100, keep=0.6, mode="top_p", batch=2),
    "top-p-all": spec(70, keep=1.0, mode="top_p", gate=1.0),
    "threshold": spec(100, keep=0.2, mode="threshold", gate=1.0),
    "threshold-one": spec(70, keep=1.0, mode="threshold", key_mask="nothing", batch=2),
    "always": spec(100, keep=2, always=True, gate=1.0),
    "always-only": spec(100, keep=0, always=True, query_mask=True),
    # scale
    "input-tenth": spec(70, keep=2, input_scale=0.1, gate=1.0),
    "input-16": spec(70, keep=2, input_scale=16.0),
    "scale-negative": spec(70, keep=2, scale=-0.3, gate=1.0),
    "scale-zero": spec(70, keep=2, scale=0.0, gate="scalar"),
    "gate-negative": spec(70, keep=2, gate=-2.0),
    "gate-zero": spec(70, keep=2, gate=0.0),
    # masks and weights
    "tail": spec(100, keep=3, batch=2, key_mask="tail", gate=1.0),
    "nothing": spec(70, keep=2, batch=2, key_mask="nothing", gate="scalar"),
    "query-mask": spec(70, keep=2, batch=2, query_mask=True, gate=1.0),
    "weights": spec(70, keep=2, batch=2, weights=True, gate="heads"),
    "weights-max": spec(70, keep=2, batch=2, weights=True, gate=1.0, pooling="max"),
    "max": spec(100, keep=2, pooling="max", gate="scalar"),
    "everything": spec(
        70, 101, keep=2, batch=2, heads=4, key_heads=2, head_dim=24, always=True, query_mask=True,
        weights=True, key_mask="random", gate="heads", layout="permuted",
    ),
    "everything-max": spec(
        70, 101, keep=0.7, mode="top_p", pooling="max", batch=2, heads=4, key_heads=2, always=True,
        query_mask=True, weights=True, key_mask="tail", gate="heads", layout="sliced",
    ),
    # blocks
    "block-32x16": spec(100, keep=2, block=(32, 16), gate=1.0),
    "block-48x80": spec(150, keep=1, block=(48, 80), gate=1.0, heads=1),
    "block-256": spec(300, keep=1, block=256, gate=1.0, heads=1),
}  # fmt: skip

OTHER_DTYPES = [
    "n63", "n197", "gqa", "sliced", "rows", "top-p", "threshold", "scale-negative", "everything",
    "everything-max",
]  # fmt: skip
# In the interpreter a case earns its place by a branch of the kernels.
TRITON_CASES = [
    "one-token", "n65", "d72", "gqa", "sliced", "strided", "none", "rows", "top-p", "threshold-one",
    "always", "everything", "everything-max", "max", "block-48x80",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_torch_path(case):
    check(TORCH, REFERENCE, make(CASES[case]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", OTHER_DTYPES)
def test_torch_path_in_other_dtypes(case, dtype):
    check(TORCH, REFERENCE, make(CASES[case], dtype))


@poisoned
@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case):
    check(TRITON, REFERENCE, make(CASES[case], device=TRITON_DEVICE))


@poisoned
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["n65", "everything-max"])
def test_triton_path_in_half_precision(case, dtype):
    check(TRITON, REFERENCE, make(CASES[case], dtype, TRITON_DEVICE))


def test_automatic_choice_is_the_torch_path_on_a_cpu():
    inputs = make(CASES["everything"])
    (auto, mask), (chosen, other) = run(topk_attention, inputs), run(TORCH, inputs)
    assert all(torch.equal(auto[name], chosen[name]) for name in chosen)
    assert torch.equal(mask.block_states(), other.block_states())


@st.composite
def specs(draw, longest):
    heads = draw(st.sampled_from([1, 2, 4]))
    block = st.sampled_from([16, 32, 48, 64])
    mode = draw(st.sampled_from(["top_k", "top_p", "threshold"]))
    keep = st.floats(0.05, 0.95)
    if mode == "top_k":
        keep = st.one_of(keep, st.integers(0, 9), st.just("rows"))
    return spec(
        draw(st.integers(1, longest)),
        draw(st.integers(1, longest)),
        keep=draw(keep),
        mode=mode,
        pooling=draw(st.sampled_from(["mean", "max"])),
        gate=draw(st.sampled_from([None, 0.5, "scalar", "heads"])),
        always=draw(st.booleans()),
        query_mask=draw(st.booleans()),
        weights=draw(st.booleans()),
        block=(draw(block), draw(block)),
        head_dim=8 * draw(st.integers(2, 5)),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        key_heads=draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        layout=draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "strided"])),
        dout_layout=draw(st.sampled_from(["contiguous", "permuted", "scalar"])),
        input_scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        scale=draw(st.sampled_from([None, -0.5, 1.0])),
        key_mask=draw(st.sampled_from([None, "tail", "random", "nothing"])),
        seed=draw(st.integers(0, 99)),
    )


QUICK = hypothesis.settings(
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@hypothesis.settings(QUICK, max_examples=25)
@hypothesis.given(specs(130), st.sampled_from([torch.float32, torch.float64]))
def test_torch_path_on_random_inputs(spec, dtype):
    check(TORCH, REFERENCE, make(spec, dtype))


@hypothesis.settings(QUICK, max_examples=6)
@hypothesis.given(specs(60))
def test_triton_path_on_random_inputs(spec):
    base = replace(spec.attention, batch=min(spec.attention.batch, 2), heads=1, key_heads=1)
    check(TRITON, REFERENCE, make(replace(spec, attention=base), device=TRITON_DEVICE))
