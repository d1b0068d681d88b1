"""The tolerance rule passes what is right and catches what is wrong."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing.attention import judge_all, magnitudes, run
from sparseattn.testing.inputs import AttentionSpec as Spec
from sparseattn.testing.inputs import make
from sparseattn.testing.tolerance import SEQUENCE, judge, require, rounding_floor

REFERENCE = partial(block_sparse_attention, impl="reference")
TORCH = partial(block_sparse_attention, impl="torch")

# -- the rule itself ---------------------------------------------------------------------------


def numbers(count=1000, dtype=torch.float32):
    truth = torch.linspace(-2, 2, count, dtype=torch.float64)
    return truth, truth.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounded_truth_passes(dtype):
    truth, naive = numbers(dtype=dtype)
    assert judge("x", naive, naive, truth).passed


def test_twice_the_naive_error_passes_and_more_does_not():
    truth, naive = numbers()
    naive = naive + 1e-3
    assert judge("x", (truth + 1.99e-3).float(), naive, truth).passed
    assert not judge("x", (truth + 2.01e-3).float(), naive, truth).passed


def test_maximum_sees_one_wrong_element():
    truth, naive = numbers()
    wrong = naive.clone()
    wrong[700] += 1e-5
    (fault,) = judge("x", wrong, naive, truth).faults
    assert fault.startswith("max error is over (at [700]")


def test_mean_sees_a_small_error_everywhere():
    truth, naive = numbers()
    naive[0] += 1e-3  # one bad element of the naive reference hides much from the maximum
    (fault,) = judge("x", (truth + 1e-5).float(), naive, truth).faults
    assert fault.startswith("mean error is over")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_never_passes(bad):
    truth, naive = numbers(dtype=torch.bfloat16)
    wrong = naive.clone()
    wrong[3] = bad
    assert not judge("x", wrong, naive + 100, truth).passed


def test_infinities_must_coincide():
    truth, naive = numbers()
    truth[:2] = naive[:2] = -math.inf
    assert judge("x", naive, naive, truth).passed
    for place, value in ((0, 5.0), (0, math.inf), (0, math.nan), (2, -math.inf)):
        wrong = naive.clone()
        wrong[place] = value
        assert not judge("x", wrong, naive, truth).passed
    assert judge("x", naive[:2], naive[:2], truth[:2]).passed
    assert not judge("x", -naive[:2], naive[:2], truth[:2]).passed


def test_zero_is_exact_where_nothing_is_summed():
    truth, naive = numbers()
    magnitude = truth.abs()
    truth[:9] = naive[:9] = magnitude[:9] = 0
    assert judge("x", naive, naive, truth, magnitude).passed
    wrong = naive.clone()
    wrong[4] = 1e-30
    (fault,) = judge("x", wrong, naive, truth, magnitude).faults
    assert fault == "not exactly 0 where nothing is summed"


def test_terms_that_cancel_have_a_floor_of_their_size():
    truth, naive = torch.zeros(100).double(), torch.zeros(100)
    result = torch.full((100,), 1e-7)
    assert not judge("x", result, naive, truth).passed
    assert judge("x", result, naive, truth, truth + 1).passed
    assert not judge("x", result * 10, naive, truth, truth + 1).passed


def test_wrong_shape_fails_and_a_useless_reference_is_an_error():
    truth, naive = numbers()
    assert not judge("x", naive[:-1], naive, truth).passed
    for bad in (math.nan, math.inf):
        broken = naive.clone()
        broken[5] = bad
        with pytest.raises(ValueError, match=r"naive reference|gives NaN"):
            judge("x", naive, broken, truth)
    with pytest.raises(ValueError, match="gives NaN"):
        judge("x", naive, naive, truth * math.nan)
    with pytest.raises(ValueError, match="must be float64"):
        judge("x", naive, naive, naive)


def test_empty_tensors_pass():
    assert judge("x", torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).double()).passed


def test_require_prints_every_judgement():
    truth, naive = numbers()
    good, bad = judge("good", naive, naive, truth), judge("bad", naive * 2, naive, truth)
    require(good)
    with pytest.raises(AssertionError, match=r"good: .*passes\nbad: .*over"):
        require(good, bad)


def test_floor_is_a_few_roundings():
    one = torch.ones(1).double()
    float32 = float(rounding_floor(one, torch.float32))
    assert 2**-24 < float32 < 8 * 2**-24
    assert 2**-8 < float(rounding_floor(one, torch.bfloat16)) < 1.01 * 2**-8
    assert 2**-11 < float(rounding_floor(one, torch.float16)) < 1.01 * 2**-11
    assert float(rounding_floor(one * 0, torch.float32)) == 0
    # below the normal range of float16 a number is a multiple of 2 ** -24
    assert float(rounding_floor(one * 2**-20, torch.float16)) >= 2**-25


@pytest.mark.parametrize("terms", [4000, 20000])
def test_floor_of_a_long_sum_is_what_adding_in_sequence_costs(terms):
    """Decision 0009: added in pairs, the naive reference is luckier than the rule may ask."""
    products = torch.randn(terms, 500)
    in_sequence = torch.zeros(500)
    for product in products:
        in_sequence += product
    truth, in_pairs = products.double().sum(0), products.sum(0)
    size, count = products.double().square().sum(0).sqrt(), torch.full((500,), float(terms))
    unit = SEQUENCE * terms**0.5 * size * 2**-24
    assert 0.9 < ((in_sequence - truth) / unit).square().mean().sqrt() < 1.1
    assert not judge("x", in_sequence, in_pairs, truth, size).passed
    assert judge("x", in_sequence, in_pairs, truth, size, count.double()).passed
    for wrong in (in_sequence - products[7], in_sequence * 1.0001):
        assert not judge("x", wrong, in_pairs, truth, size, count.double()).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floor_is_of_the_size_of_the_naive_error(dtype):
    """A floor far above what rounding does would make the factor of 2 meaningless."""
    inputs = make(Spec(197, head_dim=64, mask="mixed", key_bias="shared"), dtype)
    wide = inputs.to(torch.float64)
    truth, naive = run(REFERENCE, wide), run(REFERENCE, inputs)
    sizes = magnitudes(wide, truth, inputs.q.dtype)
    for name, value in truth.items():
        error = (naive[name].double() - value).abs().mean()
        assert rounding_floor(value, naive[name].dtype, sizes[name]).mean() < 12 * error


# -- faults injected into the op ---------------------------------------------------------------

BASE = Spec(197, heads=2, key_heads=2, mask="mixed", key_bias="shared", block_gate="shared")
SPECS = {
    "n65": replace(BASE, q_len=65),
    "n197": BASE,
    "n577": replace(BASE, q_len=577, heads=1, key_heads=1),
    "input-4": replace(BASE, q_len=65, input_scale=4.0),
    "input-tenth": replace(BASE, q_len=65, input_scale=0.1),
}


def without_last_key(inputs):
    """A tile bound that is one key short, and only where the last block is read."""
    keep = torch.ones(1, inputs.k.shape[2], dtype=torch.bool)
    keep[:, -1] = False
    return replace(inputs, key_mask=keep)


def without_one_block(inputs):
    blocks = torch.ones(1, 1, inputs.mask.num_q_blocks, inputs.mask.num_k_blocks).bool()
    blocks[0, 0, 0, 0] = False
    geometry = (inputs.mask.q_len, inputs.mask.k_len, inputs.mask.block_size)
    return replace(inputs, mask=inputs.mask & BlockMask.from_dense(blocks, *geometry))


def with_one_pair_more(inputs):
    """A wrong bit of a partial block, where it matters: a hidden pair of large weight."""
    tokens = inputs.mask.to_dense().clone()
    logits = (inputs.q.float() @ inputs.k.float().mT)[0, :1].masked_fill(tokens[0], -math.inf)
    tokens[0].view(-1)[logits.argmax()] = True
    return replace(inputs, mask=BlockMask.from_token_mask(tokens, inputs.mask.block_size))


def with_wrong_scale(inputs):
    """1 % in float32, 10 % where the dtype itself is only good to 1 %."""
    scale = inputs.q.shape[3] ** -0.5
    return replace(inputs, scale=scale * (1.01 if inputs.q.dtype == torch.float32 else 1.1))


def with_heads_swapped(inputs):
    """Keys of one head with the values of another; with one head, of the next key."""
    by_head = inputs.k.shape[1] > 1
    return replace(inputs, v=inputs.v.flip(1) if by_head else inputs.v.roll(1, 2))


def with_scale_rounded_into_q(inputs):
    """Pre-scaling q in its own dtype, once more than needed."""
    return replace(inputs, q=(inputs.q.float() * 1.1).to(inputs.q.dtype), scale=None)


def without_lse_gradient(inputs):
    return replace(inputs, dlse=None)


def with_gate_of_another_row(inputs):
    return replace(inputs, block_gate=inputs.block_gate.roll(1, 2))


INPUT_FAULTS = [
    without_last_key, without_one_block, with_one_pair_more, with_wrong_scale, with_heads_swapped,
    with_scale_rounded_into_q, without_lse_gradient, with_gate_of_another_row,
]  # fmt: skip


def scaled_twice(result, inputs):
    return {"dq": result["dq"] * inputs.q.shape[3] ** -0.5}


def one_row_left_out(result, inputs):
    out = result["out"].clone()
    out[0, 0, 7] = 0
    return {"out": out}


def last_keys_left_as_they_were(result, inputs):
    dv = result["dv"].clone()
    dv[:, :, -32:] = 0
    return {"dv": dv}


def lse_in_base_2(result, inputs):
    return {"lse": result["lse"] / math.log(2)}


def bias_gradient_of_one_head(result, inputs):
    return {"dkey_bias": result["dkey_bias"] / 2}


def gate_gradient_of_one_block_missing(result, inputs):
    gate = result["dblock_gate"].clone()
    gate.view(-1)[gate.abs().argmax()] = 0
    return {"dblock_gate": gate}


def delta_left_out(result, inputs):
    """ds = p * dp: the gradient of a softmax without its normalisation."""
    without = run(REFERENCE, replace(inputs, dlse=(inputs.dout * result["out"]).sum(-1).float()))
    return {"dq": without["dq"]}


def one_nan(result, inputs):
    dk = result["dk"].clone()
    dk[0, 0, 3, 3] = math.nan
    return {"dk": dk}


RESULT_FAULTS = [
    scaled_twice, one_row_left_out, last_keys_left_as_they_were, lse_in_base_2,
    bias_gradient_of_one_head, gate_gradient_of_one_block_missing, delta_left_out, one_nan,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SPECS)
def test_injected_faults_are_caught(case, dtype):
    inputs = make(SPECS[case], dtype)
    wide = inputs.to(torch.float64)
    truth, naive = run(REFERENCE, wide), run(REFERENCE, inputs)
    naive["lse"] = run(REFERENCE, inputs.to(torch.float32))["lse"]  # as exact_lse does
    sizes = magnitudes(wide, truth, inputs.q.dtype)

    def passes(result):
        return all(
            judge(n, value, naive[n], truth[n], sizes[n]).passed for n, value in result.items()
        )

    assert passes(naive)
    missed = [f.__name__ for f in INPUT_FAULTS if passes(run(REFERENCE, f(inputs)))]
    missed += [f.__name__ for f in RESULT_FAULTS if passes(f(naive, inputs))]
    assert missed == []


@pytest.mark.parametrize("bits", [10, 16])
def test_float32_products_of_rounded_inputs_are_caught(bits):
    """TF32 keeps 10 bits, and two bfloat16 pieces 16: neither passes for float32."""
    inputs = make(replace(BASE, mask="all"))

    def rounded(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    coarse = replace(inputs, q=rounded(inputs.q), k=rounded(inputs.k), v=rounded(inputs.v))
    wide = inputs.to(torch.float64)
    truth, naive, result = run(REFERENCE, wide), run(REFERENCE, inputs), run(REFERENCE, coarse)
    sizes = magnitudes(wide, truth, inputs.q.dtype)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert not judge(name, result[name], naive[name], truth[name], sizes[name]).passed


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("length", [1, 2, 17])
def test_small_problems_pass_whatever_the_luck_of_the_naive_reference(length, seed):
    spec = Spec(length, mask="tokens", key_bias="shared", block_gate="shared", seed=seed)
    require(*judge_all(TORCH, REFERENCE, make(spec)))


def test_float64_is_held_to_float64():
    inputs = make(BASE, torch.float64)
    require(*judge_all(TORCH, REFERENCE, inputs))
    assert not all(
        judgement.passed
        for judgement in judge_all(
            lambda *a, **k: tuple(t.float().double() for t in TORCH(*a, **k)), REFERENCE, inputs
        )
    )
