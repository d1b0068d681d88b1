"""Attention ops held against the tolerance rule: results, gradients, sizes of their terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseattn.testing.inputs import AttentionInputs, spread_gate, visible_pairs
from sparseattn.testing.tolerance import Judgement, judge, require, sum_dtype

Attend = Callable[..., Any]


def run(attend: Attend, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Return out, lse and the gradient of every input that has one, for the loss of the inputs."""
    names = ("q", "k", "v", "key_bias", "block_gate")
    tensors = {name: getattr(inputs, name) for name in names}
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
    options = inputs.options | {n: t for n, t in leaves.items() if n in inputs.options}
    q, k, v = (leaves[name] for name in "qkv")
    out, lse = attend(q, k, v, inputs.mask, **options, return_lse=True)
    used = [(r, g) for r, g in ((out, inputs.dout), (lse, inputs.dlse)) if g is not None]
    results, sent = zip(*used, strict=True)
    wanted = list(leaves.values())
    gradients = torch.autograd.grad(results, wanted, sent, materialize_grads=True)
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **found}


def judge_all(
    attend: Attend, reference: Attend, inputs: AttentionInputs, exact_lse: bool = False
) -> list[Judgement]:
    """Hold every result of `attend` against `reference`, run in float64 and in the inputs' dtype.

    exact_lse: lse, float32 for float16 and bfloat16 inputs, is held against the reference in
    float32 there, which is stricter.
    """
    wide = inputs.to(torch.float64)
    truth, naive, result = run(reference, wide), run(reference, inputs), run(attend, inputs)
    if exact_lse and inputs.q.dtype in (torch.float16, torch.bfloat16):
        naive["lse"] = run(reference, inputs.to(torch.float32))["lse"]
    sizes = magnitudes(wide, truth, inputs.q.dtype)
    judgements = [judge(n, result[n], naive[n], truth[n], sizes[n]) for n in truth]
    return [*judgements, _kinds(result, inputs)]


def check(
    attend: Attend, reference: Attend, inputs: AttentionInputs, exact_lse: bool = False
) -> None:
    """Raise AssertionError with all errors if one result breaks the rule."""
    require(*judge_all(attend, reference, inputs, exact_lse))


def magnitudes(
    inputs: AttentionInputs, truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return for each result the size of the terms it is summed of, in float64.

    A logit that is off by e makes its weight p off by e * p, so a term in p counts with the sizes
    of its logit and of lse too, and ds = p * (dp - delta) with those of dp and delta. Roundings of
    the terms are independent: their squares are summed. Those of lse may agree, since lse may be
    the same in every row: they are summed with the signs of the terms.

    inputs: in float64. dtype: in which the op is called, and keeps out for its backward.
    """
    x = inputs
    group = x.q.shape[1] // max(1, x.k.shape[1])
    scale = x.q.shape[3] ** -0.5 if x.scale is None else x.scale
    q, k, v = (t.nan_to_num(nan=0.0) for t in (x.q, x.k, x.v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    visible, p, size2 = _weights(x, q, k, truth["lse"], scale)
    sees = visible.any(-1)
    lse2 = (p**2 * size2).sum(-1) + truth["lse"].masked_fill(~sees, 0) ** 2 + sees
    lse = lse2.sqrt()
    weight2 = p**2 * (1 + size2)
    out2 = weight2 @ v**2 + lse2[..., None] * truth["out"] ** 2
    dout = torch.zeros_like(q) if x.dout is None else x.dout
    delta, delta2 = (dout * truth["out"]).sum(-1), (dout**2 * out2).sum(-1)
    if x.dlse is not None:
        delta, delta2 = delta - x.dlse.where(sees, 0), delta2 + x.dlse.where(sees, 0) ** 2
    slope = dout @ v.mT - delta[..., None]
    ds2 = p**2 * (dout**2 @ (v**2).mT + delta2[..., None]) + weight2 * slope**2
    agreeing = p * slope * lse[..., None]
    key_shape = (*x.k.shape[:2], group, *x.k.shape[2:])
    dk2 = scale**2 * (ds2.mT @ q**2 + (agreeing.mT @ q) ** 2)
    dv2 = weight2.mT @ dout**2 + ((p * lse[..., None]).mT @ dout) ** 2
    squares = {
        "out": out2,
        "lse": lse2,
        "dq": scale**2 * (ds2 @ k**2 + (agreeing @ k) ** 2),
        "dk": dk2.view(key_shape).sum(2),
        "dv": dv2.view(key_shape).sum(2),
    }
    if x.key_bias is not None:
        squares["dkey_bias"] = _shared(ds2.sum(2) + agreeing.sum(2) ** 2, x.key_bias)
    if x.block_gate is not None:
        sums2 = _block_sums(ds2, x) + _block_sums(agreeing, x) ** 2
        sums2 = sums2 + _rounded_out(p, dout**2, v**2, truth["out"], dtype, x)
        squares["dblock_gate"] = _shared(sums2, x.block_gate)
    return {name: square.sqrt() for name, square in squares.items()}


def _weights(
    inputs: AttentionInputs, q: Tensor, k: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pairs are visible, their weights, and the squared sizes of their logits."""
    extras = (inputs.key_mask, inputs.key_bias, inputs.block_gate)
    visible = visible_pairs(inputs.mask, (q.shape[0], q.shape[1]), *extras)
    logits, size2 = scale * (q @ k.mT), scale**2 * (q**2 @ (k**2).mT)
    added = [] if inputs.key_bias is None else [inputs.key_bias[:, :, None]]
    if inputs.block_gate is not None:
        added.append(spread_gate(inputs.block_gate, inputs.mask))
    for extra in added:
        extra = extra.nan_to_num(neginf=0.0)
        logits, size2 = logits + extra, size2 + extra**2
    peak = lse.masked_fill(lse == -math.inf, 0.0)[..., None]
    weights = (logits - peak).masked_fill(~visible, -math.inf).exp()
    return visible, weights, size2.masked_fill(~visible, 0)


def _rounded_out(
    p: Tensor, dout2: Tensor, v2: Tensor, out: Tensor, dtype: torch.dtype, inputs: AttentionInputs
) -> Tensor:
    """Return the squared size of what the rounding of out to `dtype` does to dblock_gate.

    The backward is given out in the dtype of q, and delta = do.o is off by that. It takes delta
    from every term of a row: in the sum over a row, where ds itself cancels, this remains. In
    units of the roundings of sums; a rounding of at most u has a square of u * u / 3 on average.
    """
    ratio = torch.finfo(dtype).eps / torch.finfo(sum_dtype(dtype)).eps
    delta2 = (dout2 * (out**2 + p**2 @ v2)).sum(-1)
    block_k = inputs.mask.block_size[1]
    padded = torch.nn.functional.pad(p, (0, -p.shape[3] % block_k))
    shares = padded.unflatten(3, (-1, block_k)).sum(4)  # [B, H, Nq, C]
    spread = shares**2 * delta2[..., None] * (ratio**2 / 3)
    spare = -spread.shape[2] % inputs.mask.block_size[0]
    rows = torch.nn.functional.pad(spread, (0, 0, 0, spare))
    return rows.unflatten(2, (-1, inputs.mask.block_size[0])).sum(3)


def _block_sums(pairs: Tensor, inputs: AttentionInputs) -> Tensor:
    """Sum [B, H, Nq, Nk] over the blocks of the mask."""
    block_q, block_k = inputs.mask.block_size
    spare = (0, -pairs.shape[3] % block_k, 0, -pairs.shape[2] % block_q)
    padded = torch.nn.functional.pad(pairs, spare)
    return padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).sum((3, 5))


def _shared(sums: Tensor, like: Tensor) -> Tensor:
    """Sum over heads where one value serves all of them."""
    return sums if like.shape[1] == sums.shape[1] else sums.sum(1, keepdim=True)


def _kinds(result: dict[str, Tensor], inputs: AttentionInputs) -> Judgement:
    """Check the dtypes: out like q, lse and sums wide, a gradient like its input."""
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    expected = {"out": inputs.q.dtype, "lse": wide}
    for name in ("q", "k", "v", "key_bias", "block_gate"):
        if getattr(inputs, name) is not None:
            expected[f"d{name}"] = getattr(inputs, name).dtype
    wrong = (n for n, dtype in expected.items() if result[n].dtype != dtype)
    faults = tuple(f"{n} is {result[n].dtype}; expected {expected[n]}" for n in wrong)
    return Judgement("dtypes", 0.0, 0.0, 0.0, 0.0, faults)
