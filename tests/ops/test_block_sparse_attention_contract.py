"""What block_sparse_attention promises: witnesses, independence, padding, layouts, derivatives."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing.attention import run
from sparseattn.testing.inputs import AttentionSpec as Spec
from sparseattn.testing.inputs import make
from sparseattn.testing.tolerance import judge, require

IMPLS = ["torch", "triton"]
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def dense_mask(q_len, k_len, device="cpu"):
    blocks = torch.ones(1, 1, -(-q_len // 64), -(-k_len // 64), dtype=torch.bool, device=device)
    return BlockMask.from_dense(blocks, q_len, k_len)


def equal(first, second):
    """Bitwise, with NaN equal to itself."""
    return first.dtype == second.dtype and torch.equal(
        first.nan_to_num(-1e9), second.nan_to_num(-1e9)
    )


# -- other people's attention ------------------------------------------------------------------


def flex(inputs):
    out, aux = flex_attention(
        inputs.q, inputs.k, inputs.v, block_mask=inputs.mask.to_flex(), scale=inputs.scale,
        enable_gqa=inputs.q.shape[1] != inputs.k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return {"out": out, "lse": aux.lse}


FLEX_MASKS = ["blocks", "topk", "holes", "tokens", "rows", "window", "mixed", "one", "keys", "all"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", FLEX_MASKS)
def test_agrees_with_flex_attention_on_random_masks(mask):
    sizes = [(64, 64), (32, 128), (128, 16), (48, 80), (16, 32)]
    for seed, block_size in enumerate(sizes):  # 10 kinds x 5 = 50 masks
        spec = Spec(
            97 + 16 * seed, 97 + 16 * seed if mask in ("window", "mixed") else 150 - 9 * seed,
            batch=2, heads=4, key_heads=4 if seed % 2 else 2, head_dim=16, mask=mask,
            block_size=block_size, per_batch=seed > 1, per_head=seed > 0 and mask != "keys",
            scale=0.2 * seed or None, seed=seed,
        )  # fmt: skip
        inputs = make(spec)
        truth, naive = flex(inputs.to(torch.float64)), flex(inputs)
        out, lse = block_sparse_attention(
            inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options, return_lse=True
        )
        require(
            judge(f"out, {spec}", out, naive["out"], truth["out"]),
            judge(f"lse, {spec}", lse, naive["lse"], truth["lse"]),
        )


SDPA_SPECS = {
    "plain": Spec(130),
    "cross": Spec(33, 150, head_dim=40),
    "grouped": Spec(100, batch=2, heads=6, key_heads=2),
    "permuted": Spec(130, batch=2, layout="permuted", dout_layout="permuted"),
    "scale": Spec(70, scale=0.7),
    "one query": Spec(1, 80),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SDPA_SPECS)
def test_agrees_with_sdpa_at_density_one(case, impl):
    spec = replace(SDPA_SPECS[case], use="out", mask="all")
    inputs = make(spec, device=DEVICES[impl])

    def sdpa(q, k, v, mask, *, scale, return_lse, **options):
        out = F.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out, out.new_zeros(())

    truth, naive = run(sdpa, inputs.to(torch.float64)), run(sdpa, inputs)
    result = run(partial(block_sparse_attention, impl=impl), inputs)
    require(*(judge(n, result[n], naive[n], truth[n]) for n in ("out", "dq", "dk", "dv")))


@pytest.mark.parametrize("impl", IMPLS)
def test_fully_masked_rows_are_zero_as_in_sdpa(impl):
    inputs = make(Spec(130, mask="rows"), device=DEVICES[impl])
    tokens = inputs.mask.to_dense()
    expected = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=tokens)
    out, lse = block_sparse_attention(
        inputs.q, inputs.k, inputs.v, inputs.mask, return_lse=True, impl=impl
    )
    empty = ~tokens.any(-1).expand(lse.shape)
    assert empty.any() and (out[empty] == 0).all() and (lse[empty] == -math.inf).all()
    assert (expected[empty] == 0).all() and lse[~empty].isfinite().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (1, 2, 0, 70, 16), (1, 2, 70, 0, 16), (1, 2, 0, 0, 16)],
    ids=["B=0", "H=0", "L=0", "S=0", "L=S=0"],
)
def test_sizes_of_zero(shape, impl):
    batch, heads, q_len, k_len, head_dim = shape
    device = DEVICES.get(impl, "cpu")
    mask = dense_mask(q_len, k_len, device)
    q = torch.randn(batch, heads, q_len, head_dim, device=device, requires_grad=True)
    k = torch.randn(batch, heads, k_len, head_dim, device=device, requires_grad=True)
    bias = torch.randn(batch, 1, k_len, device=device, requires_grad=True)
    gate = torch.randn(
        batch, 1, mask.num_q_blocks, mask.num_k_blocks, device=device, requires_grad=True
    )
    out, lse = block_sparse_attention(
        q, k, k, mask, key_bias=bias, block_gate=gate, return_lse=True, impl=impl
    )
    expected = F.scaled_dot_product_attention(q, k, k)
    assert out.shape == expected.shape and torch.equal(out, expected)
    assert lse.shape == q.shape[:3] and (lse == -math.inf).all()
    grads = torch.autograd.grad((out, lse), (q, k, bias, gate), (out, lse * 0 + 1))
    leaves = (q, k, bias, gate)
    assert all(g.shape == x.shape for g, x in zip(grads, leaves, strict=True))
    assert all((g == 0).all() for g in grads)


# -- layouts and kinds of results --------------------------------------------------------------


def test_gate_rows_further_apart_than_int32_reaches(tmp_path):
    """The third row starts 2**31 elements on; taken as int32, that is at the empty start."""
    step, device = 2**30, DEVICES["triton"]
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("needs 20 GiB of free GPU memory")
        flat = torch.zeros(4 * step + 3, device=device)
    else:  # a file that is empty but for two places takes no room
        flat = torch.from_file(str(tmp_path / "gate"), shared=True, size=4 * step + 3)
    far = flat.as_strided((1, 1, 3, 3), (0, 0, step, 1), 2 * step)
    near = far.copy_(torch.randn(1, 1, 3, 3)).clone()
    q, k, v = (torch.randn(1, 1, 48, 16, device=device, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
    mask = BlockMask.from_dense(mask, 48, 48, (16, 16))
    results = []
    for gate in (far, near):
        out = block_sparse_attention(q, k, v, mask, block_gate=gate, impl="triton")
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_output_lies_in_memory_as_q_does(layout, impl):
    inputs = make(Spec(70, batch=2, layout=layout), device=DEVICES[impl])
    out = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, impl=impl)
    assert out.stride() == inputs.q.stride()
    if layout == "permuted":  # merging heads is free
        merged = out.transpose(1, 2).reshape(2, 70, -1)
        assert merged.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_have_the_dtypes_promised(dtype, impl):
    inputs = make(
        Spec(20, mask="all", key_bias="shared", block_gate="heads"),
        dtype,
        DEVICES.get(impl, "cpu"),
    )
    inputs = replace(
        inputs, key_bias=inputs.key_bias.bfloat16(), block_gate=inputs.block_gate.double()
    )
    found = run(partial(block_sparse_attention, impl=impl), inputs)
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert kinds == {
        "out": dtype, "lse": torch.float32, "dq": dtype, "dk": dtype, "dv": dtype,
        "dkey_bias": torch.bfloat16, "dblock_gate": torch.float64,
    }  # fmt: skip


def test_lse_is_returned_only_when_asked_for():
    inputs = make(Spec(20, mask="all"))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.mask)
    assert isinstance(block_sparse_attention(*arguments), torch.Tensor)
    out, lse = block_sparse_attention(*arguments, return_lse=True)
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_as_they_are(impl):
    spec = Spec(130, mask="mixed", key_mask="tail", key_bias="hidden", block_gate="hidden")
    inputs = make(spec, device=DEVICES[impl])
    names = ("q", "k", "v", "key_mask", "key_bias", "block_gate", "dout", "dlse")
    before = {name: getattr(inputs, name).clone() for name in names}
    run(partial(block_sparse_attention, impl=impl), inputs)
    assert all(equal(getattr(inputs, name), before[name]) for name in names)


# -- equal bits --------------------------------------------------------------------------------

BUSY = Spec(
    130, batch=2, heads=2, key_heads=1, mask="mixed", per_batch=True, per_head=True,
    key_bias="shared", block_gate="shared", poison_keys=False,
)  # fmt: skip


FULL = Spec(130, batch=2, heads=2, mask="all", poison_keys=False, use="out")  # a path of its own
SPECS = [pytest.param(BUSY, id="busy"), pytest.param(FULL, id="full")]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", SPECS)
def test_two_equal_runs_give_equal_bits(spec, impl):
    attend, inputs = partial(block_sparse_attention, impl=impl), make(spec, device=DEVICES[impl])
    first, second = run(attend, inputs), run(attend, inputs)
    assert all(equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("spec", "other"),
    [(BUSY, -3), (BUSY, 40), (BUSY, math.nan), (FULL, math.nan)],  # 40: exponentials overflow
    ids=["values", "large", "nan", "full-nan"],
)
def test_a_sample_does_not_depend_on_its_batch_mates(spec, other, impl):
    attend, inputs = partial(block_sparse_attention, impl=impl), make(spec, device=DEVICES[impl])
    names = ("q", "k", "v", "key_bias", "block_gate", "dout", "dlse")
    given = {name: getattr(inputs, name) for name in names}
    changed = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
    for tensor in changed.values():
        tensor[1] *= other
    first, second = run(attend, inputs), run(attend, replace(inputs, **changed))
    assert all(equal(first[name][0], second[name][0]) for name in first)
    assert not equal(first["out"][1], second["out"][1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("own", ["full", "sparse"])
def test_a_sample_does_not_depend_on_the_mask_of_its_batch_mates(own, impl):
    attend, device = partial(block_sparse_attention, impl=impl), DEVICES[impl]
    inputs = make(replace(FULL, q_len=200, k_len=200), device=device)
    mine = torch.ones(4, 4, dtype=torch.bool, device=device)
    if own == "sparse":
        mine = mine.triu()
    results = []
    for theirs in (torch.ones_like(mine), torch.eye(4, device=device).bool()):
        blocks = torch.stack((mine, theirs))[:, None]
        mask = BlockMask.from_dense(blocks, 200, 200)
        results.append(run(attend, replace(inputs, mask=mask)))
    first, second = results
    assert all(equal(first[name][0], second[name][0]) for name in first)
    assert not equal(first["out"][1], second["out"][1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_alone_equals_itself_in_a_batch(impl):
    spec = replace(BUSY, per_batch=False)
    attend, inputs = partial(block_sparse_attention, impl=impl), make(spec, device=DEVICES[impl])
    names = ("q", "k", "v", "key_bias", "block_gate", "dout", "dlse")
    alone = replace(inputs, **{name: getattr(inputs, name)[1:] for name in names})
    together, single = run(attend, inputs), run(attend, alone)
    assert all(equal(together[name][1:], single[name]) for name in single)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", ["key_mask", "token mask", "key_bias"])
def test_padded_equals_unpadded(how, impl):
    """Whatever the padding holds: 70 tokens padded to 130, or by themselves, give the same."""
    attend, device = partial(block_sparse_attention, impl=impl), DEVICES[impl]
    short = make(Spec(70, mask="all", key_bias="shared"), device=device)
    rest = (0, 0, 0, 60)
    q, k, v, dout = (F.pad(getattr(short, name), rest) for name in ("q", "k", "v", "dout"))
    bias, dlse = F.pad(short.key_bias, rest[2:]), F.pad(short.dlse, rest[2:])
    real = torch.arange(130, device=device) < 70
    mask, key_mask = dense_mask(130, 130, device), None
    if how == "key_mask":
        key_mask = real[None]
    elif how == "key_bias":
        bias = bias.masked_fill(~real, -math.inf)
    else:
        mask = BlockMask.from_token_mask(real[None])
    if how != "token mask":
        k, v = (t.masked_fill(~real[:, None], math.nan) for t in (k, v))
    padded = replace(
        short, q=q, k=k, v=v, dout=dout, dlse=dlse, mask=mask, key_mask=key_mask, key_bias=bias
    )
    expected, found = run(attend, short), run(attend, padded)
    wide = short.to(torch.float64)
    truth = run(partial(block_sparse_attention, impl="reference"), wide)
    for name in expected:
        kept = found[name][..., :70] if name in ("lse", "dkey_bias") else found[name][:, :, :70]
        require(judge(name, kept, expected[name], truth[name]))
    for name in ("dk", "dv"):
        assert (found[name][:, :, 70:] == 0).all()
    assert (found["dkey_bias"][..., 70:] == 0).all()


# -- derivatives -------------------------------------------------------------------------------


def leaves_and_function(impl, spec):
    inputs = make(spec, torch.float64)
    leaves = [inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.block_gate]
    sees = inputs.mask.to_dense().any(-1)

    def function(q, k, v, key_bias, block_gate):
        out, lse = block_sparse_attention(
            q, k, v, inputs.mask, key_bias=key_bias, block_gate=block_gate, return_lse=True,
            impl=impl,
        )  # fmt: skip
        return out, lse.where(sees, 0)  # a difference of infinities is no slope

    return [leaf.detach().clone().requires_grad_() for leaf in leaves], function


SMALL = Spec(
    37, 21, heads=2, key_heads=1, head_dim=3, mask="rows", block_size=(16, 16),
    key_bias="heads", block_gate="shared",
)  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl):
    leaves, function = leaves_and_function(impl, SMALL)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_reference_is_differentiable_twice():
    leaves, function = leaves_and_function("reference", replace(SMALL, q_len=17, k_len=19))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", ["backward", "grad", "penalty"])
def test_second_derivative_is_refused_and_never_silently_zero(how, impl):
    inputs = make(Spec(20, mask="all"), device=DEVICES[impl])
    q = inputs.q.requires_grad_()
    out = block_sparse_attention(q, inputs.k, inputs.v, inputs.mask, impl=impl)
    loss = out.sum() if how == "penalty" else out.square().sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        if how == "grad":
            torch.autograd.grad(dq.sum(), q)
        else:  # a gradient penalty whose own gradient is lost would train the wrong model
            (dq.square().sum() + loss).backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "key_bias", "block_gate"])
def test_gradients_of_one_input_alone(wanted, impl):
    spec = Spec(70, heads=1, mask="mixed", key_bias="shared", block_gate="shared")
    inputs = make(spec, device=DEVICES[impl])
    everything = run(partial(block_sparse_attention, impl=impl), inputs)
    leaf = getattr(inputs, wanted).detach().requires_grad_()
    alone = replace(inputs, **{wanted: leaf})
    out, lse = block_sparse_attention(
        alone.q, alone.k, alone.v, alone.mask, **alone.options, return_lse=True, impl=impl
    )
    (gradient,) = torch.autograd.grad((out, lse), leaf, (inputs.dout, inputs.dlse))
    assert equal(gradient, everything[f"d{wanted}"])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_mask_made_under_inference_mode_serves_training(impl):
    tokens = torch.rand(1, 1, 64, 64) < 0.5
    with torch.inference_mode():
        made = BlockMask.from_token_mask(tokens, (32, 32))
    q = torch.randn(1, 1, 64, 16, requires_grad=True)
    gradients = []
    for mask in (made, BlockMask.from_token_mask(tokens, (32, 32))):
        out = block_sparse_attention(q, q, q, mask, impl=impl)
        gradients.append(torch.autograd.grad(out.sum(), q)[0])
    assert torch.equal(*gradients)
