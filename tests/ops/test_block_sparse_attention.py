"""block_sparse_attention against its meaning: every result and gradient, by the tolerance rule."""

from dataclasses import replace
from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.ops.blocked import dense
from sparseattn.testing.attention import check, judge_all, run
from sparseattn.testing.inputs import AttentionSpec as Spec
from sparseattn.testing.inputs import make
from sparseattn.testing.tolerance import judge, require

REFERENCE = partial(block_sparse_attention, impl="reference")
TORCH = partial(block_sparse_attention, impl="torch")
TRITON = partial(block_sparse_attention, impl="triton")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"torch": "cpu", "triton": TRITON_DEVICE}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDE = Spec(130, heads=1, mask="mixed")  # three blocks a side, the last one two tokens short

CASES = {
    # lengths
    "one-token": Spec(1),
    "two-tokens": Spec(2, heads=3, mask="all", key_bias="shared"),
    "n63": Spec(63, mask="tokens"),
    "n65": Spec(65, mask="all"),
    "n127": Spec(127, mask="rows", key_bias="heads"),
    "n197": Spec(197, head_dim=64, mask="mixed", key_mask="tail", block_gate="heads"),
    "n577": Spec(577, head_dim=64, heads=1, mask="window"),
    "n1025": Spec(1025, heads=1, mask="topk", key_mask="random"),
    "whole-blocks": Spec(192, mask="blocks", per_head=True),
    "one-query": Spec(1, 300, mask="all", head_dim=40),
    "one-key": Spec(150, 1, mask="tokens"),
    "few-queries": Spec(33, 197, mask="holes"),
    "few-keys": Spec(197, 33, mask="tokens", key_bias="hidden"),
    # head dims
    "d16": replace(WIDE, head_dim=16),
    "d24": replace(WIDE, head_dim=24),
    "d40": replace(WIDE, head_dim=40),
    "d72": replace(WIDE, head_dim=72),
    "d80": replace(WIDE, head_dim=80),
    "d96": replace(WIDE, head_dim=96),
    "d104": replace(WIDE, head_dim=104, block_gate="shared"),
    "d128": replace(WIDE, head_dim=128, key_bias="hidden"),
    "d192": replace(WIDE, head_dim=192),
    "d256": replace(WIDE, head_dim=256, q_len=70, mask="all"),
    # heads and batch
    "gqa": Spec(70, batch=2, heads=4, key_heads=2, mask="tokens", per_batch=True, per_head=True),
    "mqa": Spec(100, heads=4, key_heads=1, mask="blocks", per_head=True, key_bias="heads"),
    "gqa-gate": Spec(100, heads=4, key_heads=2, key_mask="random", block_gate="heads"),
    "gqa-hidden": Spec(
        70, heads=4, key_heads=2, mask="all", key_bias="hidden-heads", block_gate="hidden-heads"
    ),
    "mask-per-batch": Spec(150, batch=3, heads=1, per_batch=True, block_gate="shared"),
    "mask-per-head": Spec(150, batch=2, mask="tokens", per_head=True),
    "many-heads": Spec(70, batch=3, heads=8, mask="mixed", key_bias="shared"),
    # memory
    "permuted": Spec(100, layout="permuted", dout_layout="permuted", mask="mixed"),
    "sliced": Spec(100, batch=2, layout="sliced", dout_layout="sliced", mask="mixed"),
    "expanded": Spec(100, heads=3, layout="expanded", dout_layout="expanded"),
    "strided": Spec(100, layout="strided", dout_layout="strided", key_mask="random"),
    "strided-all": Spec(100, mask="all", layout="strided", dout_layout="strided"),
    # masks
    "none": Spec(130, mask="none"),
    "one-block": Spec(200, mask="one", per_head=True),
    "all": Spec(200, mask="all"),
    "holes": Spec(200, batch=2, mask="holes", per_batch=True, per_head=True, block_gate="hidden"),
    "rows": Spec(130, mask="rows", key_mask="random"),
    "keys": Spec(130, 90, batch=2, mask="keys", per_batch=True),
    # input and logit scale
    "input-tenth": Spec(130, mask="mixed", input_scale=0.1),
    "input-4": Spec(130, mask="mixed", input_scale=4.0),
    "input-16": Spec(130, mask="mixed", input_scale=16.0),
    "scale-negative": Spec(100, mask="mixed", scale=-0.3, key_bias="shared", block_gate="shared"),
    "scale-zero": Spec(100, mask="mixed", scale=0.0),
    "scale-large": Spec(100, mask="mixed", scale=3.0),
    "scale-tiny-all": Spec(100, mask="all", scale=1e-6, key_bias="shared"),
    # keys and gates
    "no-keys-in-one-sample": Spec(90, batch=2, key_mask="nothing", key_bias="hidden", mask="all"),
    "gate-hidden": Spec(130, batch=2, mask="mixed", block_gate="hidden"),
    "everything": Spec(
        130, 150, head_dim=40, batch=2, key_heads=1, mask="tokens", per_head=True,
        layout="permuted", key_mask="tail", key_bias="heads", block_gate="hidden",
    ),
    # block sizes
    "block-16": Spec(100, mask="blocks", block_size=(16, 16), block_gate="heads"),
    "block-32x128": Spec(200, mask="mixed", block_size=(32, 128)),
    "block-128x32": Spec(200, mask="mixed", block_size=(128, 32), block_gate="shared"),
    "block-48x80": Spec(150, heads=1, mask="mixed", block_size=(48, 80), key_mask="tail"),
    "block-96x48": Spec(150, heads=1, mask="tokens", block_size=(96, 48), block_gate="heads"),
    "block-256": Spec(260, heads=1, mask="mixed", block_size=(256, 256)),
    # tall blocks: torch's fused attention, forward and backward
    "tall": Spec(
        600, heads=4, key_heads=2, block_size=(192, 64), per_head=True, poison_queries=True
    ),
    "tall-holes": Spec(
        577, 300, head_dim=40, batch=2, mask="holes", per_batch=True, block_size=(256, 32),
        layout="permuted", scale=-0.3, use="out",
    ),
    "tall-one-block": Spec(512, mask="one", per_head=True, block_size=(256, 256)),
    "tall-few": Spec(5, 700, mask="topk", per_head=True, block_size=(208, 48), use="out"),
    "tall-input-16": Spec(400, mask="topk", per_head=True, block_size=(256, 16), input_scale=16.0),
    "tall-scale-zero": Spec(400, mask="topk", block_size=(192, 16), scale=0.0),
    "tall-strided": Spec(400, mask="topk", block_size=(208, 80), layout="strided", use="lse"),
    # which results the loss reads
    "only-lse": Spec(130, mask="mixed", use="lse", key_bias="shared", block_gate="shared"),
    "only-out": Spec(130, mask="tokens", use="out", key_bias="shared"),
}  # fmt: skip

HIDING = ["n127", "none", "holes", "rows", "no-keys-in-one-sample", "gate-hidden", "everything"]

# In the interpreter: at most 260 tokens, and a case earns its place by a branch of the kernels.
TRITON_CASES = [
    "one-token", "n65", "n127", "n197", "one-query", "few-queries", "few-keys", "d24", "d72",
    "d104", "d128", "d256", "gqa", "mqa", "gqa-hidden", "mask-per-batch", "sliced", "expanded",
    "strided", "none", "one-block", "holes", "rows", "keys", "input-tenth", "input-16",
    "scale-negative", "scale-zero", "no-keys-in-one-sample", "gate-hidden", "everything",
    "block-16", "block-32x128", "block-48x80", "block-96x48", "block-256", "only-lse",
]  # fmt: skip
TRITON_HALF_CASES = ["n65", "d72", "d80", "gqa", "input-16", "everything", "block-256", "only-lse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_torch_path(case, dtype):
    check(TORCH, REFERENCE, make(CASES[case], dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["one-token", "n65"])
def test_torch_path_has_a_float32_lse_in_half_precision(case, dtype):
    # torch's fused attention takes a fast exponential in 16 bits, exact to about 2**-15: far finer
    # than the dtype, though not as fine as float32
    inputs = make(CASES[case], dtype)
    lse = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, return_lse=True)[1]
    wide = inputs.to(torch.float64)
    truth = run(REFERENCE, wide)["lse"]
    seen = truth.isfinite()
    assert lse.dtype == torch.float32
    assert (lse.double() - truth)[seen].abs().max() <= 2**-14 * truth[seen].abs().max()


@pytest.mark.parametrize("block_q", [64, 256])
@pytest.mark.parametrize("mask", ["one", "all"])
def test_gradients_of_lse_may_be_larger_than_float16_holds(mask, block_q):
    # as a loss multiplied by 2**16 sends them; all of them times 8 are gradients times 8
    spec = Spec(300, mask=mask, block_size=(block_q, 64), input_scale=0.3, use="lse")
    inputs = make(spec, torch.float16)
    small, large = (run(TORCH, replace(inputs, dlse=inputs.dlse * f)) for f in (2**13, 2**16))
    assert (inputs.dlse * 2**16).abs().max() > torch.finfo(torch.float16).max
    assert all(torch.equal(large[name], 8 * small[name]) for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("mask, seed", [("topk", 5), ("topk", 7), ("all", 3), ("all", 5)])
def test_large_logits_are_those_of_lse_though_the_scale_is_no_power_of_two(mask, seed):
    spec = Spec(5, 400, heads=4, head_dim=80, mask=mask, per_head=True, block_size=(208, 16))
    check(TORCH, REFERENCE, make(replace(spec, input_scale=16.0, use="out", seed=seed)))


@pytest.mark.parametrize("shown", [[True, True], [True, False]])
def test_a_scale_as_large_as_floats_are_is_taken(shown):
    mask = BlockMask.from_dense(torch.tensor([[[shown]]]), 192, 128, (192, 64))
    q, k = (1e-160 * torch.randn(1, 1, n, 16, dtype=torch.float64) for n in (192, 128))
    v = torch.randn(1, 1, 128, 16, dtype=torch.float64)
    out, expected = (attend(q, k, v, mask, scale=1.7e308) for attend in (TORCH, REFERENCE))
    torch.testing.assert_close(out, expected)


def test_tall_blocks_with_long_lists_share_a_backward_among_threads(monkeypatch):
    run_fused, given = dense._fused_backward, []

    def spy(dout, *rest, **options):
        given.append(dout.shape[0])
        return run_fused(dout, *rest, **options)

    monkeypatch.setattr(dense, "_fused_backward", spy)
    blocks = torch.ones(1, 1, 4, 400, dtype=torch.bool)
    blocks[..., 0] = False
    mask = BlockMask.from_dense(blocks, 4 * 192, 6400, (192, 16))
    q, k = (torch.randn(1, 1, length, 16, requires_grad=True) for length in (4 * 192, 6400))
    block_sparse_attention(q, k, k, mask).sum().backward()
    assert sum(given) == 4 and given[0] == min(4, torch.get_num_threads())


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_path(case):
    check(TRITON, REFERENCE, make(CASES[case], device=TRITON_DEVICE))


@pytest.mark.parametrize("case", TRITON_HALF_CASES)
def test_triton_path_in_float16(case):
    inputs = make(CASES[case], torch.float16, TRITON_DEVICE)
    check(TRITON, REFERENCE, inputs, exact_lse=True)


@pytest.mark.parametrize("case", ["n65", "d72", "gqa"])
def test_triton_path_in_bfloat16(case):
    # the interpreter's own bfloat16 arithmetic is wrong; the launcher raises inputs to float32
    inputs = make(CASES[case], torch.bfloat16, TRITON_DEVICE)
    check(TRITON, REFERENCE, inputs, exact_lse=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", HIDING)
def test_queries_that_see_nothing_may_hold_nan(case, impl):
    inputs = make(replace(CASES[case], poison_queries=True), device=DEVICES[impl])
    check(partial(block_sparse_attention, impl=impl), REFERENCE, inputs)


@pytest.mark.parametrize(
    ("case", "num_splits"),
    [("n197", 3), ("few-queries", 2), ("few-queries", 40), ("rows", 3), ("holes", 3), ("none", 2)],
)
def test_key_lists_cut_into_splits(case, num_splits):
    from sparseattn.kernels.block_attention import forward
    from sparseattn.kernels.launch import IndexLists

    def split(q, k, v, mask, key_mask, key_bias, block_gate, scale, return_lse):
        partial_rows = mask.partial_rows or mask.rows.map(lambda _: None)
        lists = (mask.rows.offsets, mask.rows.indices, *vars(partial_rows).values())
        if key_mask is not None:
            bias = torch.zeros(()) if key_bias is None else key_bias
            key_bias = torch.where(key_mask[:, None], bias, -torch.inf)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return forward.forward(
            q, k, v, key_bias, block_gate, IndexLists(*lists), mask.token_bits, mask.block_size,
            scale, num_splits=num_splits,
        )  # fmt: skip

    # the splits change the forward only, so gradients are left out
    inputs = make(CASES[case], device=TRITON_DEVICE)
    with torch.no_grad():
        results = split(
            inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options, return_lse=True
        )
    naive, truth = run(REFERENCE, inputs), run(REFERENCE, inputs.to(torch.float64))
    names = ("out", "lse")
    require(*(judge(n, r, naive[n], truth[n]) for n, r in zip(names, results, strict=True)))


def test_automatic_choice_is_the_torch_path_on_a_cpu():
    inputs = make(CASES["everything"])
    auto, chosen = run(block_sparse_attention, inputs), run(TORCH, inputs)
    assert all(torch.equal(auto[name], chosen[name]) for name in chosen)


@st.composite
def specs(draw, longest, widest):
    heads = draw(st.sampled_from([1, 2, 4]))
    block = st.sampled_from([16, 32, 48, 64, 80, 128])
    extra = st.sampled_from([None, None, "shared", "heads", "hidden", "hidden-heads"])
    mask = draw(
        st.sampled_from(["all", "none", "topk", "blocks", "holes", "tokens", "rows", "keys"])
    )
    return Spec(
        q_len=draw(st.integers(1, longest)),
        k_len=draw(st.integers(1, longest)),
        head_dim=8 * draw(st.integers(2, widest // 8)),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        key_heads=draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        block_size=(draw(block), draw(block)),
        mask=mask,
        per_batch=draw(st.booleans()),
        per_head=draw(st.booleans()) and mask != "keys",
        layout=draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "strided"])),
        dout_layout=draw(st.sampled_from(["contiguous", "permuted", "scalar"])),
        input_scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        scale=draw(st.sampled_from([None, -0.5, 1.0])),
        key_mask=draw(st.sampled_from([None, "tail", "random", "nothing"])),
        key_bias=draw(extra),
        block_gate=draw(extra),
        use=draw(st.sampled_from(["both", "out", "lse"])),
        seed=draw(st.integers(0, 99)),
    )


# A spec is short enough to read: shrinking one takes minutes.
QUICK = hypothesis.settings(
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.mark.parametrize("is_tall", [False, True])
@hypothesis.settings(QUICK, max_examples=30)
@hypothesis.given(specs(250, 80), st.sampled_from([torch.float32, torch.bfloat16]))
def test_torch_path_on_random_inputs(is_tall, spec, dtype):
    if is_tall:  # query blocks for torch's fused attention, which nothing else may keep away
        tall = 192, spec.block_size[1]
        spec = replace(spec, block_size=tall, key_mask=None, key_bias=None, block_gate=None)
    judgements = judge_all(TORCH, REFERENCE, make(spec, dtype))
    if dtype == torch.bfloat16:  # its lse has a test of its own
        judgements = [j for j in judgements if j.name != "lse"]
    require(*judgements)


@hypothesis.settings(QUICK, max_examples=10)
@hypothesis.given(specs(90, 40))
def test_triton_path_on_random_inputs(spec):
    spec = replace(spec, batch=min(spec.batch, 2), heads=min(spec.heads, 2), key_heads=1)
    check(TRITON, REFERENCE, make(spec, device=TRITON_DEVICE))
