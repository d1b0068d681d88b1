"""Block-sparse attention in torch: cost and memory follow the blocks that are kept.

Query blocks whose lists are equally long are computed together, a cache-sized chunk at a time:
their key and value blocks are gathered, then dense math runs on the gathered keys: torch's fused
attention where it is the faster, forward alone or backward too, else whole products. The backward
recomputes the weights from lse. A mask that shows everything goes to torch's dense attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.ops.blocked import dense, plan, tables
from sparseattn.structures import token_bits as bits_of

# Gathered keys of a chunk, for 64 queries a block: what keeps one step of the chunk in cache, and
# its memory small beside the output.
_FUSED_KEYS = 5120
_FORWARD_KEYS = 10240
_BACKWARD_KEYS = {2: 6400, 4: 10240, 8: 5120}  # by item size

_fused_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(problem: plan.Problem) -> tuple[Tensor, Tensor]:
    """Return o like q, and the natural-log lse [B, H, Nq] in the accumulation dtype."""
    q = problem.q
    if dense.fits(problem):
        return dense.forward(problem)
    out = torch.zeros_like(q) if problem.has_empty_rows else torch.empty_like(q)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=plan.accumulate_dtype(q.dtype))
    is_fused = q.device.type == "cpu" and (q.element_size() == 2 or _is_tall(problem))
    most_keys = _FUSED_KEYS if is_fused else _FORWARD_KEYS
    scratch = plan.Scratch(q.device)
    for slab in plan.slabs(problem, sums=False):
        place = slab, problem, scratch
        key_tables = [tables.keys(problem.k, *place, "k"), tables.keys(problem.v, *place, "v")]
        q_table, out_table, lse_table = (
            tables.queries(t, *place, name) for t, name in ((q, "q"), (out, "out"), (lse, "lse"))
        )
        for chunk in plan.chunks(problem, slab, most_keys, not is_fused):
            bias, hidden = _chunk_bias(problem, chunk)
            queries = plan.take(q_table, chunk)
            if bias is not None:  # what a query that sees nothing holds, even NaN, reaches nobody
                queries = queries.masked_fill((bias == -math.inf).all(-1, keepdim=True), 0)
            given = queries, key_tables, (chunk.ids, hidden, scratch), bias, problem.scale
            if is_fused:
                o, o_lse = _fused(*given)
            else:
                o = plan.place(out_table, chunk, scratch)
                o_lse = _attend(o, *given)
            plan.put(out_table, chunk, o)
            plan.put(lse_table, chunk, o_lse)
        tables.store(out, out_table, slab, problem)
        tables.store(lse, lse_table, slab, problem)
    return out, lse


def backward(
    problem: plan.Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, and the gradients of key_bias and block_gate where `needs` says so."""
    q, k, v = problem.q, problem.k, problem.v
    wide = plan.accumulate_dtype(q.dtype)
    if dense.fits(problem):
        return *dense.backward(problem, out, lse, dout, dlse, needs[0]), None
    dq = torch.zeros_like(q) if problem.has_empty_rows else torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    bias = problem.padded_bias
    dbias = torch.zeros_like(bias) if bias is not None and needs[0] else None
    gate = problem.block_gate
    dgate = torch.zeros_like(gate, dtype=wide) if gate is not None and needs[1] else None
    scratch, is_tall = plan.Scratch(q.device), _is_tall(problem)
    most_keys = _FUSED_KEYS if is_tall else _BACKWARD_KEYS[q.element_size()]
    for slab in plan.slabs(problem, sums=True):
        place = slab, problem, scratch
        x = _Tables(
            q=tables.queries(q, *place, "q"),
            dout=tables.queries(dout, *place, "dout"),
            # past the last query nothing has a weight, however large a gate is
            lse=tables.queries(lse, *place, "lse", math.inf),
            dlse=None if dlse is None else tables.queries(dlse, *place, "dlse"),
            dq=tables.queries(dq, *place, "dq"),
            k=tables.keys(k, *place, "k"),
            v=tables.keys(v, *place, "v"),
            dk=tables.sums(dk, *place, "dk"),
            dv=tables.sums(dv, *place, "dv"),
        )
        out_table = tables.queries(out, *place, "out") if is_tall else None
        for chunk in plan.chunks(problem, slab, most_keys, not is_tall):
            if out_table is not None:
                _fused_backward_chunk(problem, chunk, scratch, x, out_table)
                continue
            ds = _backward_chunk(problem, chunk, scratch, x)
            if dbias is not None:
                _add_bias_gradient(dbias, ds, chunk)
            if dgate is not None:
                _add_gate_gradient(dgate, ds, chunk)
        if not is_tall:
            x.dk.mul_(problem.scale)
        tables.store(dq, x.dq, slab, problem)
        tables.store_sum(dk, x.dk, slab)
        tables.store_sum(dv, x.dv, slab)
    if dbias is not None:
        dbias = dbias.flatten(2)[..., : k.shape[2]].contiguous()
    return dq, dk, dv, dbias, dgate


class _Tables(NamedTuple):
    """What the backward reads and writes of a slab, as tables of blocks (tables.py)."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    dlse: Tensor | None
    dq: Tensor
    k: Tensor
    v: Tensor
    dk: Tensor
    dv: Tensor


def _backward_chunk(
    problem: plan.Problem, chunk: plan.Chunk, scratch: plan.Scratch, x: _Tables
) -> Tensor:
    """Add one chunk's share to dq, dk / scale and dv; return its ds [n, block_q, e, block_k].

    Scratch of the same name is used for one thing after the other.
    """
    narrow, wide = problem.q.dtype, plan.accumulate_dtype(problem.q.dtype)
    bias, hidden = _chunk_bias(problem, chunk)
    keys = plan.gather(x.k, chunk.ids, hidden, scratch, "keys")
    queries, douts, lse = (plan.take(table, chunk) for table in (x.q, x.dout, x.lse))
    lse = lse[..., None]
    if bias is not None:  # a query that sees nothing weighs nothing, whatever it holds
        empty = lse == -math.inf
        queries, douts = queries.masked_fill(empty, 0), douts.masked_fill(empty, 0)
        lse = lse.masked_fill(empty, math.inf)
    logits = _products(queries, keys, scratch)
    if bias is None:
        torch.add(-lse, logits, alpha=problem.scale, out=logits)
    else:
        torch.add(bias, logits, alpha=problem.scale, out=logits).sub_(lse)
    p = logits.exp_()  # [n, bq, e * bk]

    p_narrow = scratch.copy("narrow", p, narrow)
    dvalues = torch.bmm(p_narrow.mT, douts, out=scratch.take("values", tuple(keys.shape), narrow))
    _add_blocks(x.dv, chunk.ids, scratch.copy("ds", dvalues, wide))

    values = plan.gather(x.v, chunk.ids, hidden, scratch, "values")
    name = "ds" if narrow == wide else "narrow"
    dp = torch.bmm(douts, values.mT, out=scratch.take(name, tuple(p.shape), narrow))
    ds = scratch.copy("ds", dp, wide).mul_(p)
    # delta is summed from the very p and dp it is taken from, so that what cancels does cancel
    delta = ds.sum(-1, keepdim=True)
    if narrow != wide:  # torch's fused lse is off by 5e-5, so p sums to 1 only nearly, or to 0
        delta /= p.sum(-1, keepdim=True).clamp_min_(0.5)
    if x.dlse is not None:
        dlse = plan.take(x.dlse, chunk)[..., None]
        delta -= dlse if bias is None else dlse.masked_fill(empty, 0)
    ds.addcmul_(p, delta, value=-1)

    ds_narrow = scratch.copy("narrow", ds, narrow)
    plan.put(x.dq, chunk, torch.bmm(ds_narrow, keys).mul_(problem.scale))
    dkeys = torch.bmm(ds_narrow.mT, queries, out=scratch.take("values", tuple(keys.shape), narrow))
    _add_blocks(x.dk, chunk.ids, scratch.copy("logits", dkeys, wide))
    return ds.unflatten(2, (-1, problem.block_size[1]))


def _fused_backward_chunk(
    problem: plan.Problem, chunk: plan.Chunk, scratch: plan.Scratch, x: _Tables, out_table: Tensor
) -> None:
    """Add one chunk's share to dq, dk and dv, by torch's fused attention."""
    bias, hidden = _chunk_bias(problem, chunk)
    keys = plan.gather(x.k, chunk.ids, hidden, scratch, "keys")
    values = plan.gather(x.v, chunk.ids, hidden, scratch, "values")
    queries, douts, outs = (plan.take(table, chunk) for table in (x.q, x.dout, out_table))
    queries, factor, scale = dense.scaled(queries, problem.scale)
    dlse = None if x.dlse is None else plan.take(x.dlse, chunk)[:, None]
    dq, dkeys, dvalues, _ = dense.gradients(
        (douts[:, None], queries[:, None], keys[:, None], values[:, None], outs[:, None]),
        plan.take(x.lse, chunk)[:, None],
        dlse,
        None if bias is None else bias[:, None],
        scale,
    )
    plan.put(x.dq, chunk, dq[:, 0].mul_(factor))
    wide = plan.accumulate_dtype(problem.q.dtype)
    _add_blocks(x.dk, chunk.ids, scratch.copy("wide", dkeys, wide))
    _add_blocks(x.dv, chunk.ids, scratch.copy("wide", dvalues, wide))


def _add_blocks(total: Tensor, ids: Tensor, part: Tensor) -> None:
    """Add the gradients [n, e * bk, D] of gathered blocks to their sums [blocks, bk * D]."""
    total.index_add_(0, ids.flatten(), part.reshape(ids.numel(), -1))


def _products(queries: Tensor, keys: Tensor, scratch: plan.Scratch) -> Tensor:
    """Return every query times every key [n, bq, e * bk] in full precision, not scaled yet.

    The scale comes after the product, as in torch's fused attention: below the exponent anything
    else would not cancel lse, its own or theirs.
    """
    wide = plan.accumulate_dtype(queries.dtype)
    wide_keys = scratch.copy("ds", keys, wide)
    products = scratch.take("logits", (*queries.shape[:2], keys.shape[1]), wide)
    return torch.bmm(queries.to(wide), wide_keys.mT, out=products)


KeysAt = tuple[Tensor, Tensor | None, plan.Scratch]  # ids, hidden: as `plan.gather` takes them


def _attend(
    o: Tensor,
    queries: Tensor,
    key_tables: list[Tensor],
    keys_at: KeysAt,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Write dense attention of queries [n, bq, D] over gathered keys to o; return lse [n, bq]."""
    scratch = keys_at[2]
    keys = plan.gather(key_tables[0], *keys_at, "keys")
    logits = _products(queries, keys, scratch)
    if bias is None:  # scaled and shifted in one go
        peak = (logits.amin if scale < 0 else logits.amax)(-1, keepdim=True).mul_(scale)
        torch.add(-peak, logits, alpha=scale, out=logits)
    else:
        torch.add(bias, logits, alpha=scale, out=logits)
        peak = logits.amax(-1, keepdim=True)
        logits -= peak.masked_fill_(peak == -math.inf, 0)
    p = logits.exp_()
    total = p.sum(-1, keepdim=True)
    lse = (peak + total.log())[..., 0]
    if bias is not None:
        total.masked_fill_(total == 0, 1)
    values = plan.gather(key_tables[1], *keys_at, "keys")
    torch.bmm(scratch.copy("narrow", p, values.dtype), values, out=o).div_(total)
    return lse


def _fused(
    queries: Tensor,
    key_tables: list[Tensor],
    keys_at: KeysAt,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Do what `_attend` does in torch's fused CPU attention; return o too."""
    keys, values = (
        plan.gather(t, *keys_at, name)
        for t, name in zip(key_tables, ("keys", "values"), strict=True)
    )
    mask = None if bias is None else bias[:, None]
    queries, _, scale = dense.scaled(queries, scale)
    heads = (queries[:, None], keys[:, None], values[:, None])
    o, lse = _fused_cpu(*heads, attn_mask=mask, scale=scale)
    lse = lse.view(queries.shape[:2])
    if bias is not None:
        lse = lse.where((bias > -math.inf).any(-1), -math.inf)
    return o[:, 0], lse


def _is_tall(problem: plan.Problem) -> bool:
    """Whether query blocks are so tall that torch's fused attention is the faster, in any dtype.

    From 192 queries on it cuts its tiles larger. It has no gradient of bias and gate.
    """
    given = (problem.key_bias, problem.block_gate, problem.token_bits)
    is_plain = all(tensor is None for tensor in given)
    return problem.q.device.type == "cpu" and is_plain and problem.block_size[0] >= 192


def _chunk_bias(problem: plan.Problem, chunk: plan.Chunk) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the chunk's logits, [n, 1 or bq, e * bk], or None if nothing is.

    Also which keys nobody may see, [n, e * bk, 1] or None: zeroed, NaN in them stays there.
    """
    block_k = problem.block_size[1]
    k_len = problem.k.shape[2]
    wide = plan.accumulate_dtype(problem.q.dtype)
    parts: list[Tensor] = []
    hidden = None
    if problem.padded_bias is not None:
        batch, head = chunk.where(*problem.padded_bias.shape[:2])
        bias = problem.padded_bias[batch, head, chunk.columns].flatten(1)
        hidden = (bias == -math.inf)[..., None]
        parts.append(bias[:, None])
    elif k_len % block_k and bool((chunk.columns == k_len // block_k).any()):
        place = torch.arange(block_k, device=chunk.columns.device)
        beyond = chunk.columns[..., None] * block_k + place >= k_len
        bias = torch.zeros(beyond.shape, dtype=wide, device=chunk.columns.device)
        parts.append(bias.masked_fill_(beyond, -math.inf).flatten(1)[:, None])
    if problem.block_gate is not None:
        gate = problem.block_gate
        batch, head = chunk.where(*gate.shape[:2])
        gate = gate[batch, head, chunk.row[:, None], chunk.columns].to(wide)
        parts.append(gate.repeat_interleave(block_k, 1)[:, None])
    if problem.token_bits is not None and chunk.slots.shape[1]:
        parts.append(_token_bias(problem, chunk, wide))
    if not parts:
        return None, None
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total, hidden


def _token_bias(problem: plan.Problem, chunk: plan.Chunk, wide: torch.dtype) -> Tensor:
    """Return 0 or -inf for every token pair of the chunk, [n, bq, e * bk]."""
    bits = problem.token_bits
    if bits is None:
        raise ValueError("block_sparse_attention: token_bits is None; expected a tensor")
    block_q, block_k = problem.block_size
    batch, head = chunk.where(*bits.shape[:2])
    shown = bits_of.unpack(bits[batch, head, chunk.slots], block_k)  # [n, p, bq, bk]
    num_partial, entries = chunk.slots.shape[1], chunk.ids.shape[1]
    shape = chunk.ids.shape[0], block_q, entries, block_k
    bias = torch.zeros(shape, dtype=wide, device=bits.device)
    bias[:, :, :num_partial].masked_fill_(~shown.transpose(1, 2), -math.inf)
    return bias.flatten(2)


def _add_bias_gradient(dbias: Tensor, ds: Tensor, chunk: plan.Chunk) -> None:
    """dbias[b, h, key] += sum of ds over the queries that see it."""
    heads, columns = dbias.shape[1:3]
    batch, head = chunk.where(*dbias.shape[:2])
    place = (batch * heads + head) * columns + chunk.columns
    dbias.view(-1, dbias.shape[3]).index_add_(0, place.flatten(), ds.sum(1).flatten(0, 1))


def _add_gate_gradient(dgate: Tensor, ds: Tensor, chunk: plan.Chunk) -> None:
    """dgate[b, h, row, column] += sum of ds over the block."""
    heads, rows, columns = dgate.shape[1:]
    batch, head = chunk.where(*dgate.shape[:2])
    line = (batch * heads + head) * rows + chunk.row[:, None]
    place = line * columns + chunk.columns
    dgate.view(-1).index_add_(0, place.flatten(), ds.sum((1, 3)).flatten())
