"""Wrong arguments of BlockMask: the sentences."""

import numpy as np
import pytest
import torch

from sparseattn import BlockMask

BLOCKS = torch.ones(1, 1, 2, 3, dtype=torch.bool)  # fits 128 x 192 tokens
SCORES = torch.zeros(1, 1, 2, 3)
TOKENS = torch.ones(1, 1, 20, 30, dtype=torch.bool)
SIZE_RULE = "expected one or two multiples of 16 from 16 to 256"
KEEP_RULE = "expected an int >= 0 or a float in (0, 1]"
SHAPE_RULE = (
    "expected [B, H, R, C], R=2 (from q_len and block_size), C=3 (from k_len and block_size)"
)
SHAPES = "expected an int or a tuple of one to three ints"
AXES = "expected an int or one int per axis, axes=1 (from shape)"


def dense(blocks=BLOCKS, q_len=128, k_len=192, **options):
    return BlockMask.from_dense(blocks, q_len, k_len, **options)


def scored(scores=SCORES, keep=1, q_len=128, k_len=192, **options):
    return BlockMask.from_block_scores(scores, keep, q_len, k_len, **options)


def tokens(keep=TOKENS, **options):
    return BlockMask.from_token_mask(keep, **options)


def window(shape=20, radius=2, **options):
    return BlockMask.window(shape, radius, **options)


def check(call, kind, sentence):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("size", "kind", "what"),
    [
        (17, ValueError, "is 17"),
        (0, ValueError, "is 0"),
        (-16, ValueError, "is -16"),
        (272, ValueError, "is 272"),
        ((64,), ValueError, "is (64,)"),
        ((64, 64, 64), ValueError, "is (64, 64, 64)"),
        ((64, 20), ValueError, "is (64, 20)"),
        ((512, 64), ValueError, "is (512, 64)"),
        (64.0, TypeError, "is 64.0 (float)"),
        (None, TypeError, "is None (NoneType)"),
        (True, TypeError, "is True (bool)"),
        ((64, True), TypeError, "is (64, True) (tuple)"),
        ("64", TypeError, "is '64' (str)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [dense, scored, tokens, window])
def test_block_size(build, size, kind, what):
    sentence = f"BlockMask: block_size {what}; {SIZE_RULE}"
    check(lambda: build(block_size=size), kind, sentence)


@pytest.mark.parametrize("build", [dense, scored])
@pytest.mark.parametrize("name", ["q_len", "k_len"])
@pytest.mark.parametrize(
    ("value", "kind", "what"),
    [
        (-1, ValueError, "is -1"),
        (128.0, TypeError, "is 128.0 (float)"),
        (None, TypeError, "is None (NoneType)"),
        (True, TypeError, "is True (bool)"),
    ],
    ids=str,
)
def test_lengths(build, name, value, kind, what):
    sentence = f"BlockMask: {name} {what}; expected an int >= 0"
    check(lambda: build(**{name: value}), kind, sentence)


@pytest.mark.parametrize(("build", "name"), [(dense, "blocks"), (scored, "scores")])
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 1, 2, 2), (1, 2, 3), (2,), (1, 1, 1, 2, 3)])
def test_blocks_of_the_wrong_shape(build, name, shape):
    sentence = f"BlockMask: {name} has shape {list(shape)}; {SHAPE_RULE}"
    check(lambda: build(torch.ones(shape, dtype=torch.bool)), ValueError, sentence)


@pytest.mark.parametrize(
    ("build", "name"), [(dense, "blocks"), (scored, "scores"), (tokens, "keep")]
)
def test_no_tensor(build, name):
    check(
        lambda: build([True]),
        TypeError,
        f"BlockMask: {name} is [True] (list); expected a torch.Tensor",
    )
    check(
        lambda: build(None),
        TypeError,
        f"BlockMask: {name} is None (NoneType); expected a torch.Tensor",
    )


@pytest.mark.parametrize(
    ("build", "name"), [(dense, "blocks"), (scored, "scores"), (tokens, "keep")]
)
def test_an_array_is_described_in_one_line(build, name):
    with pytest.raises(TypeError) as error:
        build(np.ones((1, 1, 2, 3)))
    assert str(error.value).startswith(f"BlockMask: {name} ")
    assert str(error.value).endswith("; expected a torch.Tensor")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32], ids=str)
def test_dtype_of_booleans(dtype):
    what = f"has dtype {dtype}; expected torch.bool"
    check(lambda: dense(BLOCKS.to(dtype)), TypeError, f"BlockMask: blocks {what}")
    check(lambda: tokens(TOKENS.to(dtype)), TypeError, f"BlockMask: keep {what}")
    always = BLOCKS.to(dtype)
    check(lambda: scored(always=always), TypeError, f"BlockMask: always {what}")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64], ids=str)
def test_dtype_of_scores(dtype):
    sentence = f"BlockMask: scores has dtype {dtype}; expected a floating point dtype"
    check(lambda: scored(SCORES.to(dtype)), TypeError, sentence)


@pytest.mark.parametrize(
    ("keep", "kind", "what"),
    [
        (-1, ValueError, "is -1"),
        (0.0, ValueError, "is 0.0"),
        (1.5, ValueError, "is 1.5"),
        (-0.5, ValueError, "is -0.5"),
        (float("nan"), ValueError, "is nan"),
        (float("inf"), ValueError, "is inf"),
        (True, TypeError, "is True (bool)"),
        (None, TypeError, "is None (NoneType)"),
        ("all", TypeError, "is 'all' (str)"),
    ],
    ids=str,
)
def test_keep(keep, kind, what):
    check(lambda: scored(keep=keep), kind, f"BlockMask: keep {what}; {KEEP_RULE}")


@pytest.mark.parametrize("shape", [(3, 3), (2,), (2, 1, 2, 3), (1, 1, 1, 2, 3), (0,)], ids=str)
def test_shape_of_always(shape):
    sentence = (
        f"BlockMask: always has shape {list(shape)}; "
        "expected a shape that broadcasts to [1, 1, 2, 3] (from scores)"
    )
    check(lambda: scored(always=torch.ones(shape).bool()), ValueError, sentence)


def test_always_elsewhere():
    check(
        lambda: scored(always=[True]),
        TypeError,
        "BlockMask: always is [True] (list); expected a torch.Tensor",
    )
    check(
        lambda: scored(always=BLOCKS.to("meta")),
        ValueError,
        "BlockMask: always is on meta; expected the device of scores, device=cpu (from scores)",
    )


@pytest.mark.parametrize("shape", [(20,), (1, 20, 30), (1, 1, 1, 20, 30)], ids=str)
def test_shape_of_a_token_mask(shape):
    sentence = f"BlockMask: keep has shape {list(shape)}; expected [B, H, Nq, Nk] or [B, Nk]"
    check(lambda: tokens(torch.ones(shape).bool()), ValueError, sentence)


def test_q_len_of_a_token_mask():
    check(
        lambda: tokens(q_len=20),
        ValueError,
        "BlockMask: q_len is 20; expected None, since keep has its own Nq",
    )
    keys = TOKENS[0, 0, :1]
    check(
        lambda: tokens(keys, q_len=-1), ValueError, "BlockMask: q_len is -1; expected an int >= 0"
    )
    check(
        lambda: tokens(keys, q_len=2.0),
        TypeError,
        "BlockMask: q_len is 2.0 (float); expected an int >= 0",
    )


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"shape": 4.0}, TypeError, f"shape is 4.0 (float); {SHAPES}"),
        ({"shape": ()}, ValueError, f"shape is () (tuple); {SHAPES}"),
        ({"shape": (2,) * 4}, ValueError, f"shape is (2, 2, 2, 2) (tuple); {SHAPES}"),
        ({"shape": (4.0,)}, TypeError, "shape is 4.0 (float); expected an int >= 0"),
        ({"shape": True}, TypeError, "shape is True (bool); expected an int >= 0"),
        ({"shape": -1}, ValueError, "shape is -1; expected an int >= 0"),
        ({"shape": (3, -1)}, ValueError, "shape is -1; expected an int >= 0"),
        ({"radius": -1}, ValueError, "radius is -1; expected an int >= 0"),
        ({"radius": True}, TypeError, "radius is True (bool); expected an int >= 0"),
        ({"radius": (1.5,)}, TypeError, "radius is 1.5 (float); expected an int >= 0"),
        ({"radius": (1, 2)}, ValueError, f"radius is (1, 2) (tuple); {AXES}"),
        ({"radius": None}, TypeError, f"radius is None (NoneType); {AXES}"),
        ({"radius": 1.5}, TypeError, f"radius is 1.5 (float); {AXES}"),
        ({"prefix": -1}, ValueError, "prefix is -1; expected an int >= 0"),
        ({"prefix": 1.0}, TypeError, "prefix is 1.0 (float); expected an int >= 0"),
    ],
    ids=str,
)  # fmt: skip
def test_window(options, kind, sentence):
    check(lambda: window(**options), kind, f"BlockMask.window: {sentence}")


def combine_cases():
    mine = dense()
    yield 3, TypeError, "other is 3 (int); expected a BlockMask"
    yield BLOCKS, TypeError, "other has shape [1, 1, 2, 3]; expected a BlockMask"
    yield dense(q_len=127), ValueError, "other has q_len=127; expected q_len=128 (from self)"
    yield dense(k_len=190), ValueError, "other has k_len=190; expected k_len=192 (from self)"
    small = torch.ones(1, 1, 8, 3).bool()
    small = BlockMask.from_dense(small, 128, 192, (16, 64))
    what = "other has block_size=(16, 64); expected block_size=(64, 64) (from self)"
    yield small, ValueError, what
    yield mine.to("meta"), ValueError, "other has device=meta; expected device=cpu (from self)"


@pytest.mark.parametrize(("other", "kind", "sentence"), list(combine_cases()))
def test_combine(other, kind, sentence):
    check(lambda: dense() | other, kind, f"BlockMask: {sentence}")
    check(lambda: dense() & other, kind, f"BlockMask: {sentence}")


def test_combine_shapes():
    left, right = dense(BLOCKS.expand(2, 3, -1, -1)), dense(BLOCKS.expand(2, 4, -1, -1))
    sentence = (
        "BlockMask: other has batch=2, heads=4; "
        "expected sizes that broadcast with batch=2, heads=3 (from self)"
    )
    check(lambda: left | right, ValueError, sentence)
    check(lambda: left & right, ValueError, sentence)


def test_by_hand_checks_the_geometry():
    rows = dense().rows
    check(
        lambda: BlockMask(128, 192, (64, 60), rows, rows),
        ValueError,
        f"BlockMask: block_size is (64, 60); {SIZE_RULE}",
    )
    check(
        lambda: BlockMask(-1, 192, (64, 64), rows, rows),
        ValueError,
        "BlockMask: q_len is -1; expected an int >= 0",
    )
