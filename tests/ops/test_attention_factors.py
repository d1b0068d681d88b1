"""What is read out of linear attentions, and their distance from softmax attention."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from sparseattn import (
    AttentionFactors,
    approximation_error,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
)
from sparseattn.testing import landmarks
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import require_close

SPEC = Spec(20, 35, head_dim=16, heads=4, key_heads=2, landmarks=9, key_mask="random")
PERFORMER = (performer_attention, AttentionFactors.performer, landmarks.performer)
LINFORMER = (linformer_attention, AttentionFactors.linformer)
NYSTROM = (nystrom_attention, AttentionFactors.nystrom, landmarks.nystrom)
LINEAR = (linear_attention, AttentionFactors.linear, landmarks.make)
OPS = {  # name: (op, its factors, maker of inputs, options)
    "softmax": (*PERFORMER, {}),
    "cosh": (*PERFORMER, {"kernel": "cosh"}),
    "relu": (*PERFORMER, {"kernel": "relu"}),
    "eps": (*PERFORMER, {"eps": 1e-4}),
    "headwise": (*LINFORMER, landmarks.linformer, {}),
    "key-value": (*LINFORMER, partial(landmarks.linformer, sharing="key-value"), {}),
    "none": (*LINFORMER, partial(landmarks.linformer, sharing="none"), {}),
    "nystrom": (*NYSTROM, {"iterations": 2}),
    "nystrom legacy": (*NYSTROM, {"legacy_start": True, "iterations": 1}),
    "linear elu": (*LINEAR, {}),
    "linear relu": (*LINEAR, {"feature_map": "relu"}),
}


@pytest.mark.parametrize("key_mask", ["random", "nothing", None])
@pytest.mark.parametrize("name", OPS)
def test_factors_give_what_the_op_gives(name, key_mask):
    op, make_factors, maker, options = OPS[name]
    spec = replace(SPEC, key_mask=key_mask)
    arguments = maker(spec, torch.float64).arguments | options
    v = arguments.pop("v")
    factors = make_factors(**arguments)
    if key_mask:
        v = v.masked_fill(~arguments["key_mask"][:, None, :, None], 0)
        assert not factors.dense().masked_select(~arguments["key_mask"][:, None, None]).any()
    truth = op(v=v, **arguments, impl="reference")
    require_close("out", factors.attend(v), truth, truth.norm(), torch.float64)
    assert torch.equal(factors.rows(slice(0, 1)), (factors.left[:, :, :1] @ factors.right))
    torch.testing.assert_close(factors.rows(torch.tensor([3, 1])), factors.dense()[:, :, [3, 1]])
    if op in (performer_attention, linear_attention) and key_mask is None:
        sums = factors.dense().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_maps_of_single_queries_need_no_others():
    arguments = landmarks.performer(SPEC).arguments
    arguments.pop("v")
    every = AttentionFactors.performer(**arguments)
    one = AttentionFactors.performer(**arguments | {"q": arguments["q"][:, :, :1]})
    torch.testing.assert_close(one.dense(), every.rows(slice(0, 1)))
    assert one.left.shape == (2, 4, 1, 9) and one.right.shape == (2, 4, 9, 35)
    half = {
        n: t.half() if t.is_floating_point() else t for n, t in arguments.items() if n != "scale"
    }
    assert AttentionFactors.performer(**half).left.dtype == torch.float32


def test_errors_are_those_of_the_ops():
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match="feature_map is 'exp'"):
        AttentionFactors.linear(q, q, "exp")
    with pytest.raises(ValueError, match="projection has shape"):
        AttentionFactors.performer(q, q, torch.randn(3, 8))
    with pytest.raises(ValueError, match="key_projection has shape"):
        AttentionFactors.linformer(q, q, torch.randn(3, 8))


# -- approximation_error -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_error_is_the_relative_distance_from_softmax(block, monkeypatch):
    monkeypatch.setattr(sys.modules[approximation_error.__module__], "_BLOCK", block)
    inputs = landmarks.make(SPEC, torch.float64).arguments
    q, k, v, mask = (inputs[name] for name in ("q", "k", "v", "key_mask"))
    clean = [t.masked_fill(~mask[:, None, :, None], 0).repeat_interleave(2, 1) for t in (k, v)]
    exact = F.scaled_dot_product_attention(q, *clean, attn_mask=mask[:, None, None])
    out = torch.randn_like(exact)
    counts = torch.rand(2, 20) < 0.7
    truth = (out - exact).mul(counts[:, None, :, None]).norm(dim=(2, 3))
    truth /= exact.mul(counts[:, None, :, None]).norm(dim=(2, 3))
    dirty = out.masked_fill(~counts[:, None, :, None], torch.nan)
    found = approximation_error(q, k, v, dirty, key_mask=mask, query_mask=counts)
    torch.testing.assert_close(found, truth)
    assert approximation_error(q, k, v, exact, key_mask=mask).max() < 1e-14


def test_error_of_what_sees_nothing_is_that_of_zero():
    q = torch.randn(2, 1, 7, 16, requires_grad=True)
    nothing = torch.tensor([[False] * 7, [True] * 7])
    zero = torch.zeros(2, 1, 7, 16)
    found = approximation_error(q, q, q, zero, key_mask=nothing)
    assert found.tolist() == [[0.0], [1.0]] and not found.requires_grad
    assert approximation_error(q, q, q, zero + 1, key_mask=nothing)[0].item() == torch.inf
    none = approximation_error(q[:, :, :0], q, q, zero[:, :, :0])
    assert none.tolist() == [[0.0], [0.0]]


def test_error_falls_with_the_number_of_features():
    q, k, v = (torch.randn(1, 1, 200, 16) * 0.5 for _ in range(3))
    errors = []
    for m in (16, 4096):
        w = torch.randn(m, 16)
        errors.append(approximation_error(q, k, v, performer_attention(q, k, v, w)).item())
    assert errors[1] < errors[0] / 3


def test_error_names_what_is_wrong():
    q = torch.randn(1, 1, 7, 16)
    with pytest.raises(ValueError, match="approximation_error: out has shape"):
        approximation_error(q, q, q, q[:, :, :3])
    with pytest.raises(ValueError, match="query_mask has shape"):
        approximation_error(q, q, q, q, query_mask=torch.ones(1, 3).bool())
