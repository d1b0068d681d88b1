"""Which tokens are kept, against a plain loop, and the two lists of a selection."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from sparseattn.constants import PAD_INDEX
from sparseattn.ops.token_gather import gather_tokens, scatter_tokens
from sparseattn.ops.token_selection import select_tokens
from sparseattn.reference.saliency_attention import kept_tokens

VALUES = [0.0, -0.5, 0.25, 0.5, 0.75, 1.0, 2.0, math.nan, -math.inf]


@st.composite
def selections(draw):
    batch, lines, tokens = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 9))
    count = batch * lines * tokens
    values = draw(st.lists(st.sampled_from(VALUES), min_size=count, max_size=count))
    saliency = torch.tensor(values).view(batch, lines, tokens)

    def bools(rows):
        kinds = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
        return torch.tensor(draw(kinds), dtype=torch.bool).view(rows, tokens)

    key_mask = bools(batch) if draw(st.booleans()) else None
    forced = bools(draw(st.sampled_from([1, batch]))) if draw(st.booleans()) else None
    keep = draw(st.sampled_from([0, 1, 2, 5, 100, (1, 10), (1, 2), (3, 4), (1, 1)]))
    return saliency, keep, key_mask, forced, draw(st.sampled_from([None, 0.5, 0.6, 3.0]))


@hypothesis.settings(derandomize=True, max_examples=300)
@hypothesis.given(selections())
def test_keeps_what_the_loop_keeps(arguments):
    selection = select_tokens(*arguments)
    kept = kept_tokens(*arguments)
    tokens, slots = selection
    assert tokens.dtype == slots.dtype == torch.int32
    assert torch.equal(slots != PAD_INDEX, kept)
    for line, places, expected in zip(
        tokens.flatten(0, 1), slots.flatten(0, 1), kept.flatten(0, 1), strict=True
    ):
        count = int(expected.sum())
        assert torch.equal(line[:count].long(), expected.nonzero().flatten())
        assert (line[count:] == PAD_INDEX).all()
        assert torch.equal(places[expected], torch.arange(count, dtype=torch.int32))


@pytest.mark.parametrize(
    ("keep", "tokens", "slots"),
    [(0, 7, 0), (3, 7, 3), (9, 7, 7), ((1, 4), 7, 2), ((1, 1), 7, 7), ((7, 25), 25, 7), (5, 0, 0)],
)
def test_number_of_slots_depends_on_sizes_alone(keep, tokens, slots):
    for saliency in (torch.zeros(2, 1, tokens), torch.ones(2, 1, tokens)):
        assert select_tokens(saliency, keep).tokens.shape == (2, 1, slots)


def test_ties_go_to_the_lowest_index_among_many_tokens():
    saliency = torch.full((1, 1, 5000), 0.5)
    saliency[..., 4000] = 0.6
    kept = select_tokens(saliency, 100).tokens[0, 0].tolist()
    assert kept == [*range(99), 4000]


def test_selection_has_no_gradient():
    saliency = torch.rand(1, 1, 20, requires_grad=True)
    assert not any(part.requires_grad for part in select_tokens(saliency, 5))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("columns", [1, 24, 384, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_and_scatter_move_bits(dtype, columns, impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    x, passthrough = torch.randn(2, 2, 4, 30, columns, device=device).to(dtype).unbind()
    selection = select_tokens(torch.rand(2, 2, 30, device=device), 7)
    kept = (selection.slots >= 0).repeat_interleave(2, 1)
    y = gather_tokens(x, selection, impl)
    assert torch.equal(y, x[kept].view(2, 4, 7, columns))
    back = scatter_tokens(y, selection, passthrough, impl)
    assert torch.equal(back, torch.where(kept[..., None], x, passthrough))
    assert torch.equal(scatter_tokens(y, selection, None, impl), x * kept[..., None])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_go_back_to_where_values_came_from(impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    x, passthrough, dout = torch.randn(3, 2, 2, 30, 8, device=device).unbind()
    selection = select_tokens(torch.rand(2, 1, 30, device=device), 7)
    kept = (selection.slots >= 0)[..., None]
    x.requires_grad_()
    passthrough.requires_grad_()
    out = scatter_tokens(3 * gather_tokens(x, selection, impl), selection, passthrough, impl)
    dx, dpassthrough = torch.autograd.grad(out, (x, passthrough), dout)
    assert torch.equal(dx, 3 * dout * kept)
    assert torch.equal(dpassthrough, dout * ~kept)
