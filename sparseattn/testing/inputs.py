"""Seeded inputs of attention ops: shapes, memory layouts, masks of every kind, padding with NaN.

An AttentionSpec is a plain description that a test or a benchmark can print; make() turns it into
tensors, the same ones on every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn.structures.block_mask import BlockMask

MASKS = (
    "all", "none", "one", "topk", "blocks", "holes", "tokens", "rows", "keys", "window", "mixed",
)  # fmt: skip
LAYOUTS = ("contiguous", "permuted", "sliced", "expanded", "strided")


@dataclass(frozen=True)
class AttentionSpec:
    """What inputs to make.

    mask: "all", "none"; "one" key block per query block; "topk" of random scores; "blocks" at
        random; "holes": blocks with an empty row and an empty column; "tokens" at random, and one
        query block all visible; "rows": tokens, every third query and key seeing nothing; "keys":
        tokens [B, Nk]; "window": 1-D with a prefix; "mixed": blocks and a window.
    per_batch, per_head: whether the mask tells batch entries and heads apart.
    layout: "contiguous", "permuted" ([B, N, H, D] in memory), "sliced" out of a larger tensor,
        "expanded" (all heads share memory), "strided" (every other column).
    dout_layout: the same, or "scalar": one number expanded to the shape, as out.sum() sends.
    key_mask: "tail" pads samples at the end, "random" anywhere, "nothing" hides all keys of the
        first sample.
    key_bias, block_gate: "shared" by the heads, "heads" apart, or with some -inf: "hidden"
        (shared) and "hidden-heads".
    poison_keys: keys that key_mask or key_bias hides hold NaN.
    poison_queries: queries that see nothing hold NaN.
    use: which results the loss depends on.
    """

    q_len: int
    k_len: int | None = None
    head_dim: int = 32
    batch: int = 1
    heads: int = 2
    key_heads: int | None = None
    block_size: tuple[int, int] = (64, 64)
    mask: str = "blocks"
    per_batch: bool = False
    per_head: bool = False
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    input_scale: float = 1.0
    scale: float | None = None
    key_mask: Literal["tail", "random", "nothing"] | None = None
    key_bias: Literal["shared", "heads", "hidden", "hidden-heads"] | None = None
    block_gate: Literal["shared", "heads", "hidden", "hidden-heads"] | None = None
    poison_keys: bool = True
    poison_queries: bool = False
    use: Literal["both", "out", "lse"] = "both"
    seed: int = 0


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of block_sparse_attention, and the gradients sent into its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    key_mask: Tensor | None = None
    key_bias: Tensor | None = None
    block_gate: Tensor | None = None
    scale: float | None = None
    dout: Tensor | None = None
    dlse: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        names = ("key_mask", "key_bias", "block_gate", "scale")
        return {name: getattr(self, name) for name in names}

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Return the inputs in `dtype`; bias, gate and dlse in float32, or float64 for float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(tensor: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(to)

        return replace(
            self,
            q=self.q.to(dtype),
            k=self.k.to(dtype),
            v=self.v.to(dtype),
            key_bias=cast(self.key_bias, wide),
            block_gate=cast(self.block_gate, wide),
            dout=cast(self.dout, dtype),
            dlse=cast(self.dlse, wide),
        )


def make(
    spec: AttentionSpec,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AttentionInputs:
    """Make the inputs of a spec: normal q, k, v and gradients, drawn on the host."""
    random = torch.Generator().manual_seed(spec.seed)
    k_len = spec.q_len if spec.k_len is None else spec.k_len
    key_heads = spec.heads if spec.key_heads is None else spec.key_heads

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    queries = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
    keys = (spec.batch, key_heads, k_len, spec.head_dim)
    q, k, v = (normal(*shape, scale=spec.input_scale) for shape in (queries, keys, keys))
    dout, dlse = normal(*queries), normal(*queries[:3])
    mask = make_mask(spec, random)
    key_mask = _make_key_mask(spec, k_len, random)
    key_bias = _extra(spec.key_bias, (spec.batch, spec.heads, k_len), random)
    grid = (spec.batch, spec.heads, mask.num_q_blocks, mask.num_k_blocks)
    gate = _extra(spec.block_gate, grid, random)
    if spec.poison_keys:
        hidden = _hidden_keys(k, key_mask, key_bias)[:, None, :, None]
        k, v = (t.masked_fill(hidden, math.nan) for t in (k, v))
    if spec.poison_queries:
        visible = visible_pairs(mask, (spec.batch, spec.heads), key_mask, key_bias, gate)
        q = q.masked_fill(~visible.any(-1, keepdim=True), math.nan)
    q, k, v = (lay_out(t.to(device, dtype), spec.layout) for t in (q, k, v))
    inputs = AttentionInputs(
        q,
        k,
        v,
        mask.to(device),
        None if key_mask is None else key_mask.to(device),
        None if key_bias is None else key_bias.to(device),
        None if gate is None else gate.to(device),
        spec.scale,
        None if spec.use == "lse" else lay_out(dout.to(device, dtype), spec.dout_layout),
        None if spec.use == "out" else dlse.to(device),
    )
    return inputs.to(torch.float64) if dtype == torch.float64 else inputs


def make_mask(spec: AttentionSpec, random: torch.Generator) -> BlockMask:
    """Make the mask of a spec on the host."""
    q_len, k_len = spec.q_len, spec.q_len if spec.k_len is None else spec.k_len
    block_q, block_k = spec.block_size
    lead = (spec.batch if spec.per_batch else 1, spec.heads if spec.per_head else 1)
    geometry = (q_len, k_len, spec.block_size)
    chance = torch.rand((*lead, -(-q_len // block_q), -(-k_len // block_k)), generator=random)
    if spec.mask == "one":
        return BlockMask.from_block_scores(chance, 1, *geometry)
    if spec.mask == "topk":
        return BlockMask.from_block_scores(chance, 0.4, *geometry)
    if spec.mask in ("tokens", "rows"):
        tokens = torch.rand((*lead, q_len, k_len), generator=random) < 0.5
        if spec.mask == "rows":
            tokens[:, :, ::3], tokens[..., ::3] = False, False
        else:
            tokens[:, :, :block_q] = True
        return BlockMask.from_token_mask(tokens, spec.block_size)
    if spec.mask == "keys":
        tokens = torch.rand((lead[0], k_len), generator=random) < 0.7
        return BlockMask.from_token_mask(tokens, spec.block_size, q_len=q_len)
    if spec.mask in ("window", "mixed"):
        prefix = min(1, q_len)
        window = BlockMask.window(q_len - prefix, 20, block_size=spec.block_size, prefix=prefix)
        more = BlockMask.from_dense(chance < 0.2, *geometry)
        return window if spec.mask == "window" else window | more
    if spec.mask not in MASKS:
        raise ValueError(f"make_mask: mask is {spec.mask!r}; expected one of {MASKS}")
    blocks = chance < {"all": 2.0, "none": -1.0}.get(spec.mask, 0.5)
    if spec.mask == "holes":
        blocks[:, :, -1], blocks[..., 0] = False, False
    return BlockMask.from_dense(blocks, *geometry)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the values of a tensor [B, H, N, D] in another place; memory between holds NaN.

    "expanded" and "scalar" cannot keep all values: the first head, or element, serves all.
    """
    batch, heads, length, columns = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "permuted":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return tensor[:, :1].contiguous().expand(tensor.shape)
    if layout == "scalar":
        return tensor.new_full((), 0.5).expand(tensor.shape)
    if layout == "sliced":
        room = tensor.new_full((batch, length + 3, heads + 1, columns + 8), math.nan)
        place = room[:, 2 : length + 2, 1:, 8:].transpose(1, 2)
    elif layout == "strided":
        room = tensor.new_full((batch, heads, length, columns, 2), math.nan)
        place = room[..., 1]
    else:
        raise ValueError(f"lay_out: layout is {layout!r}; expected one of {LAYOUTS} or 'scalar'")
    return place.copy_(tensor)


def visible_pairs(
    mask: BlockMask,
    shape: tuple[int, int],
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    block_gate: Tensor | None,
) -> Tensor:
    """Return which pairs take part, bool [B, H, Nq, Nk] for shape (B, H), all arguments heard."""
    visible = mask.to_dense().expand(*shape, -1, -1)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if key_bias is not None:
        visible = visible & (key_bias[:, :, None] > -math.inf)
    if block_gate is not None:
        visible = visible & (spread_gate(block_gate, mask) > -math.inf)
    return visible


def spread_gate(block_gate: Tensor, mask: BlockMask) -> Tensor:
    """Return a gate [B, 1 or H, R, C] as one value per pair, [B, 1 or H, Nq, Nk]."""
    gate = block_gate.repeat_interleave(mask.block_size[0], 2)[:, :, : mask.q_len]
    return gate.repeat_interleave(mask.block_size[1], 3)[..., : mask.k_len]


def _make_key_mask(spec: AttentionSpec, k_len: int, random: torch.Generator) -> Tensor | None:
    if spec.key_mask is None:
        return None
    chance = torch.rand((spec.batch, k_len), generator=random)
    if spec.key_mask == "tail":
        lengths = torch.linspace(0.4, 0.9, spec.batch) * k_len
        return torch.arange(k_len) < lengths.ceil()[:, None]
    keep = chance < 0.6
    if spec.key_mask == "nothing":
        keep[:1] = False
    return keep


def _extra(kind: str | None, shape: tuple[int, ...], random: torch.Generator) -> Tensor | None:
    """Return a bias or gate of this kind."""
    if kind is None:
        return None
    shape = shape if kind.endswith("heads") else (shape[0], 1, *shape[2:])
    value = torch.randn(shape, generator=random)
    if kind.startswith("hidden"):
        value.masked_fill_(torch.rand(shape, generator=random) < 0.3, -math.inf)
    return value


def _hidden_keys(k: Tensor, key_mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    """Return the keys that no head may see, bool [B, Nk]."""
    hidden = torch.zeros((k.shape[0], k.shape[2]), dtype=torch.bool)
    if key_mask is not None:
        hidden |= ~key_mask
    if key_bias is not None:
        hidden |= (key_bias == -math.inf).all(1)
    return hidden
