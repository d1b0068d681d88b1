"""Seeded inputs of topk_attention, and its results held against the tolerance rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.reference.block_sparse_attention import block_sparse_attention
from sparseattn.reference.topk_attention import pool_blocks
from sparseattn.structures.block_mask import BlockMask
from sparseattn.testing.attention import magnitudes as attention_magnitudes
from sparseattn.testing.inputs import AttentionInputs, AttentionSpec
from sparseattn.testing.inputs import make as make_attention
from sparseattn.testing.tolerance import Judgement, judge, require


@dataclass(frozen=True)
class TopkSpec:
    """What inputs to make.

    attention: q, k, v, key_mask, scale and layouts; its mask, bias, gate and use are not read.
    keep: as the op takes it, or "rows": a random count for every row.
    gate: None, a number, or a tensor: "scalar" or "heads".
    always: force a tenth of the blocks. query_mask: hide a quarter of the queries, which hold NaN,
    and all of the first block of the last sample. weights: weigh tokens, a third of them with 0.
    """

    attention: AttentionSpec
    keep: int | float | Literal["rows"] = 0.4
    mode: str = "top_k"
    pooling: str = "mean"
    gate: float | Literal["scalar", "heads"] | None = None
    always: bool = False
    query_mask: bool = False
    weights: bool = False


@dataclass(frozen=True)
class TopkInputs:
    """Arguments of topk_attention, and the gradient sent into its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: int | float | Tensor
    dout: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> TopkInputs:
        """Return the inputs in `dtype`; a gate and weights in float32, or float64 for float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options = {
            name: value.to(wide)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.options.items()
        }
        q, k, v, dout = (t.to(dtype) for t in (self.q, self.k, self.v, self.dout))
        return replace(self, q=q, k=k, v=v, dout=dout, options=options)


def make(
    spec: TopkSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TopkInputs:
    """Make the inputs of a spec, the same ones on every call."""
    base = replace(spec.attention, mask="none", use="out", key_bias=None, block_gate=None)
    made = make_attention(base, dtype, device)
    random = torch.Generator().manual_seed(base.seed + 1)
    (batch, heads, q_len, _), k_len = made.q.shape, made.k.shape[2]
    options: dict[str, Any] = {"block_size": base.block_size, "mode": spec.mode}
    options |= {"pooling": spec.pooling, "gate": spec.gate, "scale": base.scale}
    options["key_mask"] = made.key_mask
    grid = (-(-q_len // base.block_size[0]), -(-k_len // base.block_size[1]))
    q = made.q
    keep: Any = spec.keep
    if keep == "rows":
        keep = torch.randint(0, grid[1] + 2, (1, heads, grid[0]), generator=random)
        keep = keep.to(device)
    if spec.gate == "scalar":
        options["gate"] = torch.tensor(0.7, device=device)
    elif spec.gate == "heads":
        options["gate"] = torch.randn(heads, generator=random).to(device)
    if spec.always:
        options["always"] = (torch.rand((1, 1, *grid), generator=random) < 0.1).to(device)
    if spec.weights:
        for name, length in (("query_weight", q_len), ("key_weight", k_len)):
            weight = torch.rand((batch, length), generator=random)
            options[name] = weight.masked_fill(weight < 0.3, 0).to(device)
    if spec.query_mask:
        hidden = torch.rand((batch, q_len), generator=random) < 0.25
        hidden[-1, : base.block_size[0]] = True
        hidden = hidden.to(device)
        options["query_mask"] = ~hidden
        q = q.masked_fill(hidden[:, None, :, None], math.nan)
    if made.dout is None:
        raise ValueError("make: the attention inputs have no dout")
    inputs = TopkInputs(q, made.k, made.v, keep, made.dout, options)
    return inputs.to(torch.float64) if dtype == torch.float64 else inputs


def run(attend: Callable[..., Any], inputs: TopkInputs) -> tuple[dict[str, Tensor], BlockMask]:
    """Return out, the gradients of q, k, v and of a gate, and the mask."""
    leaves = {n: getattr(inputs, n).detach().requires_grad_() for n in "qkv"}
    options = dict(inputs.options)
    if isinstance(options["gate"], Tensor):
        leaves["gate"] = options["gate"] = options["gate"].detach().requires_grad_()
    q, k, v = (leaves[name] for name in "qkv")
    out, mask = attend(q, k, v, inputs.keep, **options, return_mask=True)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **found}, mask


def judge_all(
    attend: Callable[..., Any], reference: Callable[..., Any], inputs: TopkInputs
) -> list[Judgement]:
    """Hold every result of `attend` against `reference`; all must choose the same blocks."""
    wide = inputs.to(torch.float64)
    (truth, chosen), (naive, same), (result, mask) = (
        run(reference, wide), run(reference, inputs), run(attend, inputs),
    )  # fmt: skip
    blocks = [m.block_states().expand(chosen.block_states().shape) for m in (chosen, same, mask)]
    if not torch.equal(blocks[0], blocks[1]):
        raise ValueError("the naive reference chooses other blocks; take other inputs")
    equal = torch.equal(blocks[0], blocks[2])
    faults = () if equal else ("other blocks than the reference",)
    sizes = magnitudes(wide, chosen, truth, inputs.q.dtype)
    judgements = [judge(n, result[n], naive[n], truth[n], sizes[n]) for n in truth]
    return [Judgement("blocks", 0.0, 0.0, 0.0, 0.0, faults), *judgements]


def check(attend: Callable[..., Any], reference: Callable[..., Any], inputs: TopkInputs) -> None:
    """Raise AssertionError with all errors if one result breaks the rule."""
    require(*judge_all(attend, reference, inputs))


def magnitudes(
    inputs: TopkInputs, mask: BlockMask, truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return for each result the size of the terms it is summed of, in float64.

    Those of block_sparse_attention with the chosen mask; a gate adds those of its way through the
    scores: dq and dk get a part of every dblock_gate of their row and column.

    inputs: in float64. dtype: in which the op is called.
    """
    x, given = inputs, inputs.options
    scale = x.q.shape[3] ** -0.5 if given["scale"] is None else given["scale"]
    q = x.q.nan_to_num(nan=0.0)
    k, v = (t.nan_to_num(nan=0.0) for t in (x.k, x.v))
    shares_q, pooled_q = _pooling(q, "query", given, mask.block_size[0])
    shares_k, pooled_k = _pooling(k, "key", given, mask.block_size[1])
    group = q.shape[1] // max(1, k.shape[1])
    many = pooled_k.repeat_interleave(group, 1)
    scores = pooled_q @ many.mT * scale
    gate = None
    if given["gate"] is not None:
        gate = torch.as_tensor(given["gate"], dtype=torch.float64, device=q.device).view(-1, 1, 1)
    block_gate = None if gate is None else gate * scores
    attention = AttentionInputs(
        q, k, v, mask, given["key_mask"], None, block_gate, given["scale"], x.dout
    )
    bias = None
    if given["key_mask"] is not None:
        bias = torch.zeros_like(given["key_mask"], dtype=torch.float64)
        bias = bias.masked_fill(~given["key_mask"], -math.inf)[:, None]
    out, lse = block_sparse_attention(q, k, v, mask, bias, block_gate, scale)
    sizes = attention_magnitudes(attention, {**truth, "out": out, "lse": lse}, dtype)
    if gate is None:
        return sizes
    sums2 = sizes["dblock_gate"] ** 2
    through2 = (gate * scale) ** 2 * sums2
    to_q = (through2 @ many**2).repeat_interleave(mask.block_size[0], 2)[:, :, : q.shape[2]]
    to_k = (through2.mT @ pooled_q**2).unflatten(1, (-1, group)).sum(2)
    to_k = to_k.repeat_interleave(mask.block_size[1], 2)[:, :, : k.shape[2]]
    sizes["dq"] = (sizes["dq"] ** 2 + shares_q**2 * to_q).sqrt()
    sizes["dk"] = (sizes["dk"] ** 2 + shares_k**2 * to_k).sqrt()
    if isinstance(given["gate"], Tensor):
        terms = (sums2 * scores**2).sum((0, 2, 3))
        sizes["dgate"] = (terms if given["gate"].dim() else terms.sum()).sqrt()
    return sizes


def _pooling(x: Tensor, side: str, given: dict[str, Any], block: int) -> tuple[Tensor, Tensor]:
    """Return each token's part of its block's gradient, [B, 1 or H, N, 1 or D], and pooled x."""
    weights = x.new_ones((x.shape[0], x.shape[2]))
    for name in (f"{side}_mask", f"{side}_weight"):
        if given.get(name) is not None:
            weights = weights * given[name]
    pooled = pool_blocks(x, weights, block, given["pooling"])[0]
    spread = pooled.repeat_interleave(block, 2)[:, :, : x.shape[2]]
    tokens = weights[:, None, :, None]
    if given["pooling"] == "max":
        return ((x == spread) & (tokens > 0)).double(), pooled
    total = torch.nn.functional.pad(tokens, (0, 0, 0, -x.shape[2] % block))
    total = total.unflatten(2, (-1, block)).sum(3).repeat_interleave(block, 2)[:, :, : x.shape[2]]
    return tokens / total.where(total > 0, 1), pooled
