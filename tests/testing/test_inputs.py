"""The makers of inputs make what their names say."""

from dataclasses import replace

import pytest
import torch

from sparseattn.testing.inputs import LAYOUTS, MASKS, AttentionSpec, lay_out, make, visible_pairs

SPEC = AttentionSpec(150, batch=2, heads=4, key_heads=2, per_batch=True, per_head=True)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_valid_and_of_their_kind(mask):
    spec = replace(SPEC, mask=mask, per_head=mask != "keys", block_size=(32, 48))
    made = make(spec).mask
    made.validate()
    tokens = made.to_dense()
    empty_rows, empty_columns = ~tokens.any(-1), ~tokens.any(-2)
    assert (made.q_len, made.k_len, made.block_size) == (150, 150, (32, 48))
    assert {"all": tokens.all(), "none": not tokens.any()}.get(mask, 0 < tokens.float().mean() < 1)
    if mask in ("holes", "rows"):
        assert empty_rows.any() and empty_columns.any()
    if mask == "one":
        assert (made.rows.counts() == 1).all()
    has_partial = made.partial_rows is not None
    assert has_partial == (mask in ("tokens", "rows", "keys", "window", "mixed"))


def test_a_mask_may_be_shared():
    shared = make(replace(SPEC, per_batch=False, per_head=False)).mask
    apart = make(SPEC).mask
    assert (shared.batch, shared.heads, apart.batch, apart.heads) == (1, 1, 2, 4)
    assert not torch.equal(apart.to_dense()[0, 0], apart.to_dense()[1, 0])


def test_equal_specs_make_equal_inputs_and_other_seeds_do_not():
    spec = replace(SPEC, mask="tokens", key_bias="heads", block_gate="hidden", key_mask="random")
    first, second, other = make(spec), make(spec), make(replace(spec, seed=1))
    for name in ("q", "k", "v", "key_mask", "key_bias", "block_gate", "dout", "dlse"):
        mine, again = getattr(first, name), getattr(second, name)
        assert torch.equal(mine.nan_to_num(), again.nan_to_num())
        assert not torch.equal(mine.nan_to_num(), getattr(other, name).nan_to_num())
    assert torch.equal(first.mask.to_dense(), second.mask.to_dense())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_differ_in_strides(layout):
    plain = torch.randn(2, 4, 10, 16)
    if layout == "expanded":
        plain = plain[:, :1].expand(2, 4, 10, 16)
    laid = lay_out(plain, layout)
    assert torch.equal(laid, plain)
    step = {"contiguous": 160, "permuted": 16, "sliced": 24, "expanded": 0, "strided": 320}[layout]
    assert laid.stride(1) == step and laid.stride(3) == (2 if layout == "strided" else 1)


@pytest.mark.parametrize("layout", ["sliced", "strided"])
def test_memory_between_the_elements_holds_nan(layout):
    laid = lay_out(torch.randn(2, 4, 10, 16), layout)
    assert laid.isfinite().all()
    held = torch.tensor([], dtype=laid.dtype).set_(laid.untyped_storage())
    assert held.isnan().sum() == held.numel() - laid.numel()


def test_one_number_serves_a_gradient():
    assert lay_out(torch.randn(2, 4, 10, 16), "scalar").stride() == (0, 0, 0, 0)


@pytest.mark.parametrize("key_mask", ["tail", "random", "nothing"])
def test_hidden_keys_hold_nan_and_others_do_not(key_mask):
    inputs = make(replace(SPEC, key_mask=key_mask, key_bias="hidden"))
    hidden = ~inputs.key_mask | (inputs.key_bias[:, 0] == -torch.inf)
    assert 0 < hidden.float().mean() < 1
    for tensor in (inputs.k, inputs.v):
        assert torch.equal(tensor.isnan().any(-1), hidden[:, None].expand(2, 2, 150))
    assert key_mask != "nothing" or hidden[0].all()
    assert inputs.q.isfinite().all() and inputs.dout.isfinite().all()


def test_queries_that_see_nothing_hold_nan_if_asked():
    spec = replace(SPEC, mask="rows", block_gate="hidden-heads", poison_queries=True)
    inputs = make(spec)
    sees = visible_pairs(inputs.mask, (2, 4), None, None, inputs.block_gate).any(-1)
    assert torch.equal(inputs.q.isnan().any(-1), ~sees) and not sees.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    inputs = make(replace(SPEC, key_bias="heads", block_gate="shared"), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {inputs.q.dtype, inputs.k.dtype, inputs.v.dtype, inputs.dout.dtype} == {dtype}
    assert {inputs.key_bias.dtype, inputs.block_gate.dtype, inputs.dlse.dtype} == {wide}
    assert inputs.to(torch.float64).q.dtype == torch.float64


def test_use_leaves_gradients_out():
    assert make(replace(SPEC, use="out")).dlse is None
    assert make(replace(SPEC, use="lse")).dout is None


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="mask is 'diagonal'"):
        make(replace(SPEC, mask="diagonal"))
    with pytest.raises(ValueError, match="layout is 'columns'"):
        make(replace(SPEC, layout="columns"))
