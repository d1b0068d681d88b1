"""The fixtures of conftest.py do what they say."""

import os

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MAKERS = {
    "empty": lambda dtype: torch.empty(4, 3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 4, dtype=dtype).mT),
    "empty_strided": lambda dtype: torch.empty_strided((4, 3), (1, 4), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((4, 3), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(4, 3),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((4,), (1,)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_new_memory_is_nan_when_poisoned(poisoned_memory, maker, dtype):
    assert MAKERS[maker](dtype).isnan().all()


def test_poison_does_not_break_ops(poisoned_memory):
    q = torch.randn(1, 2, 33, 16, requires_grad=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    (out.sum() + q.flatten().cumsum(0)[-1]).backward()
    table = torch.zeros(4, 2).index_add_(0, torch.tensor([1, 1, 3]), torch.ones(3, 2))
    assert out.isfinite().all() and q.grad.isfinite().all()
    assert table.sum() == 6


def test_poison_ends_with_the_test():
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_limited():
    assert torch.get_num_threads() == 2


def test_interpreter_is_on_without_a_gpu():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"


NUMBERS = {}


@pytest.mark.parametrize("name", ["a", "b"])
def test_each_test_has_numbers_of_its_own(name):
    NUMBERS[name] = torch.rand(2).tolist()
    assert "b" not in NUMBERS or NUMBERS["a"] != NUMBERS["b"]


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.integers())
def test_each_hypothesis_example_starts_from_the_same_numbers(example):
    drawn = torch.rand(2).tolist()
    assert NUMBERS.setdefault("example", drawn) == drawn


@pytest.mark.gpu
def test_gpu_tests_run_on_a_gpu():
    assert torch.cuda.is_available()
