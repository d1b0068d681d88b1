"""sparseattn/checks.py: the sentences that every op says about a wrong argument."""

import numpy as np
import pytest
import torch

from sparseattn import checks

OP = "some_op"


def refuse(kind, sentence, check, *arguments, **options):
    with pytest.raises(kind) as error:
        check(*arguments, **options)
    assert type(error.value) is kind
    assert str(error.value) == f"{OP}: {sentence}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2, 0, 3), "has shape [2, 0, 3]"),
        (torch.tensor(1), "has shape []"),
        (3, "is 3 (int)"),
        (None, "is None (NoneType)"),
        ("x", "is 'x' (str)"),
        ((1, 2), "is (1, 2) (tuple)"),
    ],
    ids=str,
)
def test_describe(value, text):
    assert checks.describe(value) == text


@pytest.mark.parametrize(
    "value", [np.ones((50, 50)), [0.5] * 10_000, "x" * 10_000, {"a": list(range(1000))}], ids=type
)
def test_describe_is_one_short_line(value):
    text = checks.describe(value)
    assert "\n" not in text and len(text) < 200
    assert text.endswith(f"({type(value).__name__})")


def test_shapes_bind_names():
    shapes = checks.Shapes(OP)
    shapes.bind("q", torch.ones(2, 4, 5, 8), "B H Nq D")
    shapes.bind("k", torch.ones(2, 3, 7, 8), "B G Nk D")
    shapes.bind("bias", torch.ones(2, 1, 7), "B 1|H Nk")
    shapes.bind("bias", torch.ones(2, 4, 7), "B 1|H Nk")
    shapes.bind("pair", torch.ones(2, 2), "2 B")
    refuse(
        ValueError,
        "v has shape [2, 3, 6, 8]; expected [B, G, Nk, D], "
        "B=2 (from q), G=3 (from k), Nk=7 (from k), D=8 (from q)",
        shapes.bind,
        "v",
        torch.ones(2, 3, 6, 8),
        "B G Nk D",
    )
    refuse(
        ValueError,
        "bias has shape [2, 3, 7]; expected [B, 1 or H, Nk], "
        "B=2 (from q), H=4 (from q), Nk=7 (from k)",
        shapes.bind,
        "bias",
        torch.ones(2, 3, 7),
        "B 1|H Nk",
    )
    refuse(
        ValueError,
        "pair has shape [3, 2]; expected [2, B], B=2 (from q)",
        shapes.bind,
        "pair",
        torch.ones(3, 2),
        "2 B",
    )


def test_shapes_count_dimensions():
    shapes = checks.Shapes(OP)
    refuse(
        ValueError,
        "q has shape [2, 4]; expected [B, H, Nq, D]",
        shapes.bind,
        "q",
        torch.ones(2, 4),
        "B H Nq D",
    )


def test_shapes_repeat_a_name_in_one_tensor():
    shapes = checks.Shapes(OP)
    shapes.bind("square", torch.ones(3, 3), "N N")
    refuse(
        ValueError,
        "other has shape [4, 5]; expected [M, M]",
        shapes.bind,
        "other",
        torch.ones(4, 5),
        "M M",
    )


def test_shapes_set_a_name():
    shapes = checks.Shapes(OP)
    shapes.set("R", 5, "mask")
    refuse(
        ValueError,
        "gate has shape [4]; expected [R], R=5 (from mask)",
        shapes.bind,
        "gate",
        torch.ones(4),
        "R",
    )


def test_shapes_bind_zero():
    shapes = checks.Shapes(OP)
    shapes.bind("q", torch.ones(0, 3), "B N")
    refuse(
        ValueError,
        "k has shape [1, 3]; expected [B, N], B=0 (from q), N=3 (from q)",
        shapes.bind,
        "k",
        torch.ones(1, 3),
        "B N",
    )


def test_require_tensor():
    checks.require_tensor(OP, "q", torch.ones(1))
    checks.require_tensor(OP, "q", torch.nn.Parameter(torch.ones(1)))
    sentence = "q is 3 (int); expected a torch.Tensor"
    refuse(TypeError, sentence, checks.require_tensor, OP, "q", 3)
    refuse(TypeError, sentence, checks.Shapes(OP).bind, "q", 3, "B")


def test_require_dtype():
    checks.require_dtype(OP, "q", torch.ones(1).bool(), torch.bool)
    checks.require_dtype(OP, "q", torch.ones(1), torch.bool, torch.float32)
    sentence = "q has dtype torch.int64; expected torch.bool or torch.float32"
    arguments = (OP, "q", torch.ones(1).long(), torch.bool, torch.float32)
    refuse(TypeError, sentence, checks.require_dtype, *arguments)


def test_require_floating():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        checks.require_floating(OP, "q", torch.ones(1, dtype=dtype))
    for dtype in (torch.int32, torch.bool, torch.complex64):
        sentence = f"q has dtype {dtype}; expected a floating point dtype"
        tensor = torch.ones(1, dtype=dtype)
        refuse(TypeError, sentence, checks.require_floating, OP, "q", tensor)


def test_require_device():
    checks.require_device(OP, "k", torch.ones(1), torch.device("cpu"), "q")
    sentence = "k is on meta; expected the device of q, device=cpu (from q)"
    tensor = torch.ones(1, device="meta")
    refuse(ValueError, sentence, checks.require_device, OP, "k", tensor, torch.device("cpu"), "q")


def test_require_int():
    checks.require_int(OP, "n", 3, low=3)
    refuse(ValueError, "n is 2; expected an int >= 3", checks.require_int, OP, "n", 2, low=3)
    for value, what in ((3.0, "3.0 (float)"), (True, "True (bool)"), ("3", "'3' (str)")):
        sentence = f"n is {what}; expected an int >= 0"
        refuse(TypeError, sentence, checks.require_int, OP, "n", value, low=0)


def test_checks_run_on_meta_tensors():
    shapes = checks.Shapes(OP)
    shapes.bind("q", torch.ones(2, 3, device="meta"), "B N")
    checks.require_floating(OP, "q", torch.ones(2, 3, device="meta"))
