"""Where a mask shows every block: torch's fused attention, which knows no gradient of bias and lse.

Columns beside the head dim carry them, and leave every logit and output as it is. With c beside q,
and 0 beside k, the columns of dk have scale * c * sum_i ds_ij among them. With -dlse / u beside
dout, u beside out, and 0 beside v, the backward's delta = dout.out becomes dout.out - dlse.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseattn.ops.blocked import plan

_COLUMNS = 8  # added to the head dim: at most four are used, the others keep rows aligned
_PIECES = {2: 3, 4: 1, 8: 1}  # numbers of so many bytes that hold a gradient of lse exactly
_LARGE = 2.0**15  # float16 holds it and its inverse

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Inputs(NamedTuple):
    """What torch's attention is given: as many key heads as query heads, nothing that is NaN.

    It reads the columns of a head dim as neighbours in memory, whatever their stride is.

    q, factor, scale: see `scaled`
    unseen: bool [B, 1 or H, 1, 1], the queries that see nothing; None if there are none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [B, 1 or H, 1, Nk]
    unseen: Tensor | None
    scale: float
    factor: float


def fits(problem: plan.Problem) -> bool:
    """Whether one mask for the whole batch shows everything, in a form torch's attention takes.

    A mask for each sample stays out, or what its batch mates see would change a sample's rounding.
    """
    q, k, rows = problem.q, problem.k, problem.rows
    plain = problem.block_gate is None and problem.token_bits is None
    if q.device.type != "cpu" or not plain or not q.numel() * k.numel():
        return False
    has_factor = 1 / _LARGE < abs(problem.scale) < _LARGE  # that `backward` puts beside q
    if rows.offsets.shape[0] > 1 or (problem.key_bias is not None and not has_factor):
        return False
    every_block = rows.offsets.shape[-1] - 1, -(-k.shape[2] // problem.block_size[1])
    return bool((rows.offsets[..., -1] == math.prod(every_block)).all())


def forward(problem: plan.Problem) -> tuple[Tensor, Tensor]:
    """Return o like q, and the natural-log lse [B, H, Nq] in the accumulation dtype."""
    x = _inputs(problem)
    out = torch.empty_like(problem.q)
    o, lse = _fused(x.q, x.k, x.v, attn_mask=x.bias, scale=x.scale)
    out.copy_(o)
    if x.unseen is not None:
        out.masked_fill_(x.unseen, 0)
        lse = lse.masked_fill(x.unseen[..., 0], -math.inf)
    return out, lse.contiguous()


def backward(
    problem: plan.Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk, dv, and the gradient of key_bias if it is wanted."""
    x = _inputs(problem)
    if x.unseen is not None:
        dout = dout.masked_fill(x.unseen, 0)
        lse = lse.masked_fill(x.unseen[..., 0], 0)
        dlse = None if dlse is None else dlse.masked_fill(x.unseen[..., 0], 0)
    beside = 2.0 ** -round(math.log2(abs(x.scale))) if needs_bias else 0.0  # beside q
    dq, dk, dv, column = gradients((dout, x.q, x.k, x.v, out), lse, dlse, x.bias, x.scale, beside)
    dbias = None
    if column is not None and problem.key_bias is not None:
        dbias = column.to(lse.dtype) / (x.scale * beside)
        if problem.key_bias.shape[1] == 1:
            dbias = dbias.sum(1, keepdim=True)
    sums = [dk, dv]
    if problem.group > 1:
        sums = [t.unflatten(1, (-1, problem.group)).sum(2, dtype=lse.dtype) for t in sums]
    dq = torch.mul(dq, x.factor, out=torch.empty_like(problem.q))
    dk, dv = (
        torch.empty_like(t).copy_(s) for t, s in zip((problem.k, problem.v), sums, strict=True)
    )
    return dq, dk, dv, None if dbias is None else dbias.contiguous()


def gradients(
    per_token: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    dlse: Tensor | None,
    bias: Tensor | None,
    scale: float,
    factor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk, dv of torch's attention, given dout, q, k, v and out.

    With a factor also scale * factor * sum_i ds_ij, [B, H, Nk] in k's dtype.
    """
    head_dim = per_token[0].shape[3]
    given = list(per_token)
    if factor or dlse is not None:
        given = [pad(t, (0, _COLUMNS)) for t in given]
    if factor:
        given[1][..., head_dim] = factor  # this column of dk is about as large as dbias
    if dlse is not None:
        unit = torch.where(dlse.abs() < _LARGE, 1.0, _LARGE)  # 1 would leave no room in float16
        rest = -dlse / unit
        for piece in range(1, 1 + _PIECES[per_token[4].element_size()]):
            given[0][..., head_dim + piece] = rest
            given[4][..., head_dim + piece] = unit
            rest = rest - given[0][..., head_dim + piece]
    dq, dk, dv = _fused_backward(*given, lse, 0.0, False, attn_mask=bias, scale=scale)
    column = dk[..., head_dim] if factor else None
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim], column


def scaled(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Return q times a factor, the factor, and the rest of the scale, which is a power of two.

    torch's forward scales products, its backward what it multiplies. Unless that rounds nothing,
    large logits are not the ones that lse was made of. A 16-bit q would lose more than it gains.
    """
    if q.element_size() == 2 or scale == 0:
        return q, 1.0, scale
    mantissa, exponent = math.frexp(scale)
    factor, power = 2 * mantissa, math.ldexp(1.0, exponent - 1)
    return q if factor == 1 else q * factor, factor, power


def _inputs(problem: plan.Problem) -> _Inputs:
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (problem.q, problem.k, problem.v))
    bias = problem.key_bias
    q, factor, scale = scaled(q, problem.scale)
    if problem.group > 1:
        k, v = (t.repeat_interleave(problem.group, 1) for t in (k, v))
    if bias is None:
        return _Inputs(q, k, v, None, None, scale, factor)
    bias = bias.to(plan.accumulate_dtype(q.dtype))
    hidden = bias == -math.inf
    unseen = None
    if bool(hidden.any()):  # what hidden keys hold, even NaN, reaches nobody
        k, v = (t.masked_fill(hidden[..., None], 0) for t in (k, v))
        alone = hidden.all(-1, keepdim=True)
        if bool(alone.any()):
            unseen = alone[..., None]
            q, bias = q.masked_fill(unseen, 0), bias.masked_fill(alone, 0)
    return _Inputs(q, k, v, bias[:, :, None], unseen, scale, factor)
