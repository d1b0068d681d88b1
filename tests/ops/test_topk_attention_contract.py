"""What topk_attention promises: witnesses, padding, independence, derivatives, errors."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sparseattn import BlockMask, block_sparse_attention, topk_attention
from sparseattn.testing.inputs import AttentionSpec
from sparseattn.testing.tolerance import judge, require
from sparseattn.testing.topk_attention import TopkSpec, magnitudes, make, run

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
BASE = AttentionSpec(37, 50, heads=2, key_heads=1, head_dim=16, block_size=(16, 16))
SMALL = TopkSpec(BASE, keep=2, gate="heads")


def qkv(length=75, batch=1, heads=2, head_dim=16, dtype=torch.float32):
    return torch.randn(3, batch, heads, length, head_dim).to(dtype).unbind()


# -- witnesses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 99])
@pytest.mark.parametrize("impl", IMPLS)
def test_everything_kept_is_sdpa(impl, keep):
    leaves = [t.to(DEVICES[impl]).requires_grad_() for t in qkv(70)]
    dout = torch.randn(leaves[0].shape).to(DEVICES[impl])

    def results(attend, tensors, sent):
        out = attend(*tensors)
        return dict(
            zip(
                ("out", "dq", "dk", "dv"),
                (out, *torch.autograd.grad(out, tensors, sent)),
                strict=False,
            )
        )

    found = results(partial(topk_attention, keep=keep, block_size=32, impl=impl), leaves, dout)
    naive = results(F.scaled_dot_product_attention, leaves, dout)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(F.scaled_dot_product_attention, wide, dout.double())
    require(*(judge(n, found[n], naive[n], truth[n]) for n in truth))


def test_mask_is_that_of_the_pooled_scores():
    q, k, v = qkv(128, heads=3)
    out, mask = topk_attention(q, k, v, 3, block_size=16, return_mask=True)
    scores = (q.unflatten(2, (8, 16)).mean(3)) @ (k.unflatten(2, (8, 16)).mean(3)).mT
    expected = BlockMask.from_block_scores(scores, 3, 128, 128, 16)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(out, block_sparse_attention(q, k, v, expected))
    mask.validate()


def test_gate_is_a_bias_of_whole_blocks():
    q, k, v = qkv(64)
    scores = q.unflatten(2, (4, 16)).mean(3) @ k.unflatten(2, (4, 16)).mean(3).mT / 4
    bias = 0.7 * scores.repeat_interleave(16, 2).repeat_interleave(16, 3)
    arguments = [(t, bias.to(t.dtype)) for t in (q, q.double())]
    naive, truth = (
        F.scaled_dot_product_attention(t, k.to(t), v.to(t), attn_mask=b) for t, b in arguments
    )
    out = topk_attention(q, k, v, 1.0, block_size=16, gate=0.7)
    require(judge("out", out, naive, truth))


def test_gate_changes_what_is_learned():
    q, k, v = (t.requires_grad_() for t in qkv(64))
    without, with_gate = (
        torch.autograd.grad(topk_attention(q, k, v, 2, block_size=16, gate=g).square().sum(), q)[0]
        for g in (None, 1.0)
    )
    assert not torch.equal(without, with_gate)


# -- padding, batch mates, repetition ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pooling": "max", "gate": 1.0}, {"mode": "top_p"}])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_changes_nothing(impl, options):
    length, padding = 41, (0, 0, 0, 10)
    keep = 0.5 if "mode" in options else 2
    inputs = make(TopkSpec(replace(BASE, q_len=length, k_len=length), keep, **options))
    padded = {n: F.pad(getattr(inputs, n), padding, value=math.nan) for n in "qkv"}
    mask = torch.arange(length + 10)[None] < length
    more = {"query_mask": mask, "key_mask": mask}
    dout = F.pad(inputs.dout, padding)
    padded = replace(inputs, **padded, dout=dout, options=inputs.options | more)
    found = run(partial(topk_attention, impl=impl), padded)[0]
    wide, reference = inputs.to(torch.float64), partial(topk_attention, impl="reference")
    naive, (truth, chosen) = run(reference, inputs)[0], run(reference, wide)
    sizes = magnitudes(wide, chosen, truth, torch.float32)
    assert all(not found[f"d{n}"][:, :, length:].any() for n in "qkv")
    cut = {name: result[:, :, :length] for name, result in found.items()}
    require(*(judge(n, cut[n], naive[n], truth[n], sizes[n]) for n in truth))


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_mates_and_repetition(impl):
    spec = TopkSpec(replace(BASE, batch=2), 2, gate=0.5, always=True, weights=True, pooling="max")
    inputs = make(spec, device=DEVICES[impl])
    attend = partial(topk_attention, impl=impl)
    first, again = run(attend, inputs)[0], run(attend, inputs)[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = {n: getattr(inputs, n).clone() for n in ("q", "k", "v", "dout")}
    for tensor in others.values():
        tensor[1] = torch.randn(tensor[1].shape)
    found = run(attend, replace(inputs, **others))[0]
    assert all(torch.equal(first[n][0], found[n][0]) for n in ("out", "dq", "dk", "dv"))


def test_nan_and_infinity_rank_like_numbers():
    q, k, v = qkv(64)
    k[0, 0, 20] = math.nan  # a key block that ranks last
    q[0, 1, 40] = math.inf
    out, mask = topk_attention(q, k, v, 3, block_size=16, return_mask=True)
    assert torch.equal(mask.rows.counts(), torch.full((1, 2, 4), 3, dtype=torch.int32))
    assert not mask.block_states()[0, 0, :, 1].ne(-1).any() and out[0, 0].isfinite().all()
    assert out[0, 1, 40].isnan().all()  # seen where it is, as with dense attention
    assert out[0, 1, :40].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 20, 20), (1, 0, 20, 20), (1, 2, 0, 20), (1, 2, 20, 0)])
def test_sizes_of_zero(shape, impl):
    batch, heads, q_len, k_len = shape
    q = torch.randn(batch, heads, q_len, 16, device=DEVICES[impl], requires_grad=True)
    k = torch.randn(batch, heads, k_len, 16, device=DEVICES[impl], requires_grad=True)
    for keep, mode in ((2, "top_k"), (0.5, "top_k"), (0.5, "top_p"), (0.5, "threshold")):
        out = topk_attention(q, k, k, keep, mode=mode, block_size=16, gate=1.0, impl=impl)
        gradients = torch.autograd.grad(out.sum(), (q, k))
        assert out.shape == q.shape and not any(g.any() for g in (out, *gradients))


# -- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_gradcheck(pooling, impl):
    base = AttentionSpec(17, 18, heads=2, key_heads=1, head_dim=2, block_size=(16, 16))
    spec = TopkSpec(base, 1, pooling=pooling, gate="heads", weights=True, always=True)
    inputs = make(spec, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.options["gate"])]

    def function(q, k, v, gate):
        return topk_attention(q, k, v, 1, **inputs.options | {"gate": gate}, impl=impl)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_is_refused(impl):
    inputs = make(SMALL, device=DEVICES[impl])
    q = inputs.q.requires_grad_()
    out = topk_attention(q, inputs.k, inputs.v, 2, **inputs.options, impl=impl)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dq.square().sum().backward()


# -- errors ------------------------------------------------------------------------------------

Q, K, V = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
WRONG = [
    ("q", Q[0], ValueError, "has shape [4, 70, 16]; expected [B, H, Nq, D]"),
    ("keep", -1, ValueError, "is -1; expected an int >= 0 or a float in (0, 1]"),
    ("keep", 1.5, ValueError, "is 1.5; expected an int >= 0 or a float in (0, 1]"),
    ("keep", "2", TypeError, "is '2' (str); expected an int >= 0 or a float in (0, 1]"),
    ("keep", torch.ones(2, 4, 5), TypeError,
     "has dtype torch.float32; expected torch.int32 or torch.int64"),
    ("keep", torch.ones(2, 4, 3).int(), ValueError,
     "has shape [2, 4, 3]; expected [1 or B, 1 or H, R], B=2 (from q), H=4 (from q), R=5 (from q)"),
    ("mode", "topk", ValueError, "is 'topk'; expected one of 'top_k', 'top_p', 'threshold'"),
    ("pooling", "sum", ValueError, "is 'sum'; expected one of 'mean', 'max'"),
    ("block_size", 20, ValueError, "is 20; expected one or two multiples of 16 from 16 to 256"),
    ("always", torch.ones(5, 4), TypeError, "has dtype torch.float32; expected torch.bool"),
    ("always", torch.ones(5, 5).bool(), ValueError,
     "has shape [5, 5]; expected a shape that broadcasts to [2, 4, 5, 4] (from q)"),
    ("query_mask", torch.ones(2, 50).bool(), ValueError,
     "has shape [2, 50]; expected [B, Nq], B=2 (from q), Nq=70 (from q)"),
    ("key_mask", torch.ones(2, 50), TypeError, "has dtype torch.float32; expected torch.bool"),
    ("key_weight", torch.ones(2, 50).int(), TypeError,
     "has dtype torch.int32; expected a floating point dtype"),
    ("gate", True, TypeError, "is True (bool); expected a float, a tensor or None"),
    ("gate", math.inf, ValueError, "is inf; expected a finite float"),
    ("gate", torch.ones(3), ValueError, "has shape [3]; expected [] or [H], H=4 (from q)"),
    ("scale", math.nan, ValueError, "is nan; expected a finite float"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "sentence"), WRONG)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_wrong_arguments(name, value, error, sentence, impl):
    arguments = {"q": Q, "k": K, "v": V, "keep": 2, "block_size": 16, "impl": impl} | {name: value}
    with pytest.raises(error, match=f"^{re.escape(f'topk_attention: {name} {sentence}')}$"):
        topk_attention(**arguments)


@pytest.mark.parametrize("keep", [0, 1.5, -0.2])
def test_shares_lie_between_zero_and_one(keep):
    with pytest.raises(ValueError, match=re.escape("expected a float in (0, 1]")):
        topk_attention(Q, K, V, keep, mode="top_p")


def test_an_explicit_choice_never_falls_back():
    wide = [t.double() for t in (Q, K, V)]
    with pytest.raises(NotImplementedError, match="topk_attention: impl='triton' cannot run this"):
        topk_attention(*wide, 2, impl="triton")
