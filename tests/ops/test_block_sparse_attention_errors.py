"""Every public argument wrong in shape, dtype, device, value or type, and what is said then."""

import re

import pytest
import torch

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.ops import dispatch
from sparseattn.testing.tolerance import judge, require

OP = "block_sparse_attention"
B, H, G, NQ, NK, D = 2, 4, 2, 70, 100, 32  # blocks of 64: R = C = 2


def blocks(*lead, device="cpu"):
    return torch.ones(*lead, 2, 2, dtype=torch.bool, device=device)


def mask_of(batch, heads, q_len, k_len):
    return BlockMask.from_dense(blocks(batch, heads), q_len, k_len)


GOOD = {
    "q": torch.randn(B, H, NQ, D),
    "k": torch.randn(B, G, NK, D),
    "v": torch.randn(B, G, NK, D),
    "mask": mask_of(1, 1, NQ, NK),
    "key_mask": torch.ones(B, NK, dtype=torch.bool),
    "key_bias": torch.randn(B, 1, NK),
    "block_gate": torch.randn(B, H, 2, 2),
}
FLOATS = "torch.float32 or torch.float16 or torch.bfloat16 or torch.float64"
LIKE_Q = "expected the dtype of q, dtype=torch.float32 (from q)"

WRONG_TYPES = [  # argument, wrong value, sentence after "<op>: <argument> "
    ("q", None, "is None (NoneType); expected a torch.Tensor"),
    ("k", 3.5, "is 3.5 (float); expected a torch.Tensor"),
    ("v", [1], "is [1] (list); expected a torch.Tensor"),
    ("mask", None, "is None (NoneType); expected a BlockMask"),
    ("mask", blocks(1, 1), "has shape [1, 1, 2, 2]; expected a BlockMask"),
    ("key_mask", True, "is True (bool); expected a torch.Tensor"),
    ("key_bias", 0.5, "is 0.5 (float); expected a torch.Tensor"),
    ("block_gate", "no", "is 'no' (str); expected a torch.Tensor"),
    ("scale", "1", "is '1' (str); expected a float or None"),
    ("scale", True, "is True (bool); expected a float or None"),
    ("scale", torch.ones(()), "has shape []; expected a float or None"),
    ("q", GOOD["q"].int(), f"has dtype torch.int32; expected {FLOATS}"),
    ("k", GOOD["k"].cfloat(), f"has dtype torch.complex64; expected {FLOATS}"),
    ("v", GOOD["v"].bool(), f"has dtype torch.bool; expected {FLOATS}"),
    ("k", GOOD["k"].half(), f"has dtype torch.float16; {LIKE_Q}"),
    ("v", GOOD["v"].double(), f"has dtype torch.float64; {LIKE_Q}"),
    ("key_mask", GOOD["key_mask"].float(), "has dtype torch.float32; expected torch.bool"),
    ("key_bias", GOOD["key_bias"].int(), "has dtype torch.int32; expected a floating point dtype"),
    ("block_gate", blocks(B, H), "has dtype torch.bool; expected a floating point dtype"),
]  # fmt: skip
RULES = {
    "q": "[B, H, Nq, D]",
    "k": "[B, G, Nk, D], B=2 (from q), D=32 (from q)",
    "v": "[B, G, Nk, D], B=2 (from q), G=2 (from k), Nk=100 (from k), D=32 (from q)",
    "key_mask": "[B, Nk], B=2 (from q), Nk=100 (from k)",
    "key_bias": "[B, 1 or H, Nk], B=2 (from q), H=4 (from q), Nk=100 (from k)",
    "block_gate": "[B, 1 or H, R, C], B=2 (from q), H=4 (from q), R=2 (from mask), C=2 (from mask)",
}
WRONG_SHAPES = [
    ("q", (H, NQ, D)),
    ("k", (1, G, NK, D)),
    ("k", (B, G, NK, 16)),
    ("k", (B, NK, D)),
    ("v", (B, G, 99, D)),
    ("v", (B, 1, NK, D)),
    ("key_mask", (B, 99)),
    ("key_mask", (1, NK)),
    ("key_mask", (B, 1, NK)),
    ("key_bias", (B, 3, NK)),
    ("key_bias", (B, NK)),
    ("key_bias", (B, 1, NQ)),
    ("block_gate", (B, H, 2, 3)),
    ("block_gate", (1, H, 2, 2)),
    ("block_gate", (B, G, 2, 2)),
]
IMPLS = "expected one of 'auto', 'triton', 'torch', 'reference'"
WRONG_VALUES = [
    ("mask", mask_of(1, 1, 71, NK), "has q_len=71; expected q_len=70 (from q)"),
    ("mask", mask_of(1, 1, NQ, 99), "has k_len=99; expected k_len=100 (from k)"),
    ("mask", mask_of(3, 1, NQ, NK), "has batch=3; expected 1 or 2 (from q)"),
    ("mask", mask_of(1, 2, NQ, NK), "has heads=2; expected 1 or 4 (from q)"),
    ("scale", float("nan"), "is nan; expected a finite float"),
    ("scale", float("inf"), "is inf; expected a finite float"),
    ("impl", "cuda", f"is 'cuda'; {IMPLS}"),
    ("impl", None, f"is None; {IMPLS}"),
]  # fmt: skip
ON_A_DEVICE = ("k", "v", "mask", "key_mask", "key_bias", "block_gate")


def refused(error, sentence, **wrong):
    arguments = {"impl": "torch"} | GOOD | wrong
    with pytest.raises(error, match=f"^{re.escape(f'{OP}: {sentence}')}$"):
        block_sparse_attention(**arguments)


def numbered(cases):
    return [f"{name}-{index}" for index, (name, *_) in enumerate(cases)]


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG_TYPES, ids=numbered(WRONG_TYPES))
def test_wrong_type(name, value, sentence):
    refused(TypeError, f"{name} {sentence}", **{name: value})


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES, ids=numbered(WRONG_SHAPES))
def test_wrong_shape(name, shape):
    value = torch.zeros(shape, dtype=GOOD[name].dtype)
    refused(ValueError, f"{name} has shape {list(shape)}; expected {RULES[name]}", **{name: value})


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG_VALUES, ids=numbered(WRONG_VALUES))
def test_wrong_value(name, value, sentence):
    refused(ValueError, f"{name} {sentence}", **{name: value})


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_wrong_device(name):
    sentence = f"{name} is on meta; expected the device of q, device=cpu (from q)"
    refused(ValueError, sentence, **{name: GOOD[name].to("meta")})


def test_head_dim_of_zero():
    nothing = {name: GOOD[name][..., :0] for name in "qkv"}
    refused(ValueError, "q has shape [2, 4, 70, 0]; expected a head dim D >= 1", **nothing)


@pytest.mark.parametrize("impl", ["auto", "triton", "torch", "reference"])
def test_every_impl_checks_the_same(impl):
    sentence = f"key_mask has shape [1, 100]; expected {RULES['key_mask']}"
    refused(ValueError, sentence, key_mask=GOOD["key_mask"][:1], impl=impl)


def test_good_arguments_are_good():
    block_sparse_attention(**GOOD)


@pytest.mark.parametrize("heads", [3, 8, 0])
def test_key_heads_must_divide_the_query_heads(heads):
    wrong = {name: torch.randn(B, heads, NK, D) for name in ("k", "v")}
    refused(ValueError, f"k has {heads} heads; expected a divisor of H, H=4 (from q)", **wrong)


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="takes 4 positional arguments"):
        block_sparse_attention(*GOOD.values())


# -- an explicit choice that cannot run --------------------------------------------------------

D20 = {name: GOOD[name][..., :20].double() for name in "qkv"}
DTYPE = "dtype is float64; expected float32, float16 or bfloat16"
HEAD_DIM = "head dim is 20; expected a multiple of 8 from 16 to 256"


def triton_error(**changed):
    with pytest.raises(NotImplementedError) as caught:
        block_sparse_attention(**GOOD | changed, impl="triton")
    return str(caught.value)


def test_triton_lists_all_reasons(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)  # with a GPU it is off
    assert triton_error(**D20) == f"{OP}: impl='triton' cannot run this: {DTYPE}; {HEAD_DIM}"


def test_triton_reasons_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    where = "tensors are on cpu; expected CUDA, or CPU with TRITON_INTERPRET=1"
    reasons = f"{where}; {DTYPE}; {HEAD_DIM}"
    assert triton_error(**D20) == f"{OP}: impl='triton' cannot run this: {reasons}"
    assert triton_error() == f"{OP}: impl='triton' cannot run this: {where}"


def test_triton_reasons_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    reason = "Triton is not installed (pip install triton)"
    assert triton_error() == f"{OP}: impl='triton' cannot run this: {reason}"


@pytest.mark.parametrize("head_dim", [8, 12, 264])
def test_triton_refuses_head_dims(head_dim, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    wrong = {name: torch.zeros(*GOOD[name].shape[:3], head_dim) for name in "qkv"}
    rule = f"head dim is {head_dim}; expected a multiple of 8 from 16 to 256"
    assert triton_error(**wrong) == f"{OP}: impl='triton' cannot run this: {rule}"


def test_automatic_choice_runs_what_triton_cannot():
    out = block_sparse_attention(**GOOD | D20)
    expected = block_sparse_attention(**GOOD | D20, impl="reference")
    assert out.dtype == torch.float64
    require(judge("out", out, expected, expected))


def test_wrong_arguments_are_named_before_an_impl_that_cannot_run():
    sentence = f"key_mask has shape [1, 100]; expected {RULES['key_mask']}"
    refused(ValueError, sentence, **D20, key_mask=GOOD["key_mask"][:1], impl="triton")
