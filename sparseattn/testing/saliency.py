"""Seeded inputs of saliency_attention, and its results held against the tolerance rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.reference.saliency_attention import kept_tokens
from sparseattn.structures.block_mask import BlockMask
from sparseattn.testing.attention import magnitudes
from sparseattn.testing.inputs import AttentionInputs, lay_out
from sparseattn.testing.tolerance import Judgement, judge, require


@dataclass(frozen=True)
class SaliencySpec:
    """What inputs to make.

    per_head: one saliency for each key head.
    saliency: "random"; "ties": four values only; "holes": some are 0 or NaN; "nothing": all are 0
        in the first sample.
    always: a count, or "mask": a few tokens anywhere.
    key_mask: "tail" pads samples at the end, "random" anywhere, "nothing" hides the first sample.
        Hidden tokens hold NaN everywhere.
    prune: "queries", or "passthrough" as well.
    layout, dout_layout: as in AttentionSpec.
    """

    tokens: int
    keep: int | float = 0.25
    q_len: int | None = None
    head_dim: int = 32
    batch: int = 1
    heads: int = 2
    key_heads: int | None = None
    per_head: bool = False
    saliency: Literal["random", "ties", "holes", "nothing"] = "random"
    always: int | Literal["mask"] = 0
    threshold: float | None = None
    log_bias: bool = True
    key_mask: Literal["tail", "random", "nothing"] | None = None
    prune: Literal["queries", "passthrough"] | None = None
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    input_scale: float = 1.0
    scale: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class SaliencyInputs:
    """Arguments of saliency_attention and the gradient sent into its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    saliency: Tensor
    keep: int | float
    dout: Tensor
    passthrough: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that have gradients."""
        names = ("q", "k", "v", "saliency", "passthrough")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def to(self, dtype: torch.dtype) -> SaliencyInputs:
        """Return the inputs in `dtype`; saliency in float32, or float64 for float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        through = None if self.passthrough is None else self.passthrough.to(dtype)
        q, k, v, dout = (t.to(dtype) for t in (self.q, self.k, self.v, self.dout))
        saliency = self.saliency.to(wide)
        return replace(self, q=q, k=k, v=v, saliency=saliency, dout=dout, passthrough=through)

    def kept(self) -> Tensor:
        """Return which tokens are kept, bool [B, S, N]."""
        saliency = self.saliency[:, None] if self.saliency.dim() == 2 else self.saliency
        share, options = checks.keep_share("kept", self.keep), self.options
        return kept_tokens(
            saliency, share, options["key_mask"], self.forced(), options["threshold"]
        )

    def forced(self) -> Tensor:
        """Return which tokens are forced, bool [B or 1, N]."""
        always = self.options["always"]
        if isinstance(always, Tensor):
            return always
        return (torch.arange(self.k.shape[2], device=self.k.device) < always)[None]


def make(
    spec: SaliencySpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SaliencyInputs:
    """Make the inputs of a spec, drawn on the host."""
    random = torch.Generator().manual_seed(spec.seed)
    q_len = spec.tokens if spec.q_len is None else spec.q_len
    key_heads = spec.key_heads or spec.heads

    def normal(heads: int, length: int, scale: float = 1.0) -> Tensor:
        shape = (spec.batch, heads, length, spec.head_dim)
        return torch.randn(shape, generator=random) * scale

    q = normal(spec.heads, q_len, spec.input_scale)
    k, v = (normal(key_heads, spec.tokens, spec.input_scale) for _ in range(2))
    dout, passthrough = normal(spec.heads, q_len), normal(spec.heads, q_len)
    saliency = _saliency(spec, key_heads, random)
    key_mask = _key_mask(spec, random)
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        k, v = (t.masked_fill(hidden, math.nan) for t in (k, v))
        q = q.masked_fill(hidden, math.nan) if spec.prune else q
        spare = hidden[..., 0] if spec.per_head else hidden[:, 0, :, 0]
        saliency = saliency.masked_fill(spare, math.nan)
    always: int | Tensor = 0
    if isinstance(spec.always, int):
        always = spec.always
    else:
        always = (torch.rand((spec.batch, spec.tokens), generator=random) < 0.1).to(device)
    q, k, v, passthrough = (
        lay_out(t.to(device, dtype), spec.layout) for t in (q, k, v, passthrough)
    )
    options = {
        "key_mask": None if key_mask is None else key_mask.to(device),
        "always": always,
        "threshold": spec.threshold,
        "log_bias": spec.log_bias,
        "scale": spec.scale,
        "prune_queries": spec.prune is not None,
    }
    dout = lay_out(dout.to(device, dtype), spec.dout_layout)
    through = passthrough if spec.prune == "passthrough" else None
    inputs = SaliencyInputs(q, k, v, saliency.to(device), spec.keep, dout, through, options)
    return inputs.to(dtype)


def run(attend: Callable[..., Any], inputs: SaliencyInputs) -> dict[str, Tensor]:
    """Return out and the gradient of every input that has one."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.tensors.items()}
    through = {n: leaves[n] for n in leaves if n == "passthrough"}
    first = (leaves[n] for n in ("q", "k", "v", "saliency"))
    out = attend(*first, inputs.keep, **through, **inputs.options)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.dout, materialize_grads=True)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def judge_all(
    attend: Callable[..., Any], reference: Callable[..., Any], inputs: SaliencyInputs
) -> list[Judgement]:
    """Hold every result against `reference`, run in float64 and in the inputs' dtype."""
    wide = inputs.to(torch.float64)
    truth, naive, result = run(reference, wide), run(reference, inputs), run(attend, inputs)
    sizes = term_sizes(wide, truth, inputs.q.dtype)
    return [judge(n, result[n], naive[n], truth[n], sizes[n]) for n in truth]


def check(
    attend: Callable[..., Any], reference: Callable[..., Any], inputs: SaliencyInputs
) -> None:
    """Raise AssertionError with all errors if one result breaks the rule."""
    require(*judge_all(attend, reference, inputs))


def term_sizes(
    inputs: SaliencyInputs, truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the size of what is summed, by that of the same attention with a key bias."""
    x, kept, forced = inputs, inputs.kept(), inputs.forced()[:, None]
    heads, key_heads = x.q.shape[1], x.k.shape[1]
    group = heads // key_heads
    saliency = x.saliency[:, None] if x.saliency.dim() == 2 else x.saliency
    learns = kept & ~forced & x.options["log_bias"]
    bias = saliency.where(learns, 1).log().masked_fill(~kept, -math.inf)
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(group, 1)
    visible = (bias > -math.inf).expand(-1, heads, -1)
    dout, out = x.dout, truth["out"]
    if x.options["prune_queries"]:
        dout, out = (t.masked_fill(~visible[..., None], 0) for t in (dout, out))
    shape = (1, 1, -(-x.q.shape[2] // 64), -(-x.k.shape[2] // 64))
    blocks = torch.ones(shape, dtype=torch.bool, device=x.q.device)
    mask = BlockMask.from_dense(blocks, x.q.shape[2], x.k.shape[2])
    scale = x.q.shape[3] ** -0.5 if x.options["scale"] is None else x.options["scale"]
    q, k = x.q.nan_to_num(0.0), x.k.nan_to_num(0.0).repeat_interleave(group, 1)
    lse = (scale * (q @ k.mT) + bias[:, :, None]).logsumexp(-1)
    same = AttentionInputs(q, x.k, x.v, mask, None, bias, None, scale, dout)
    sizes = magnitudes(same, {"out": out, "lse": lse}, dtype)
    squares = sizes.pop("dkey_bias") ** 2
    if saliency.shape[1] > 1:
        squares = squares.unflatten(1, (-1, group)).sum(2)
    size = (squares.sqrt() / saliency.where(learns, 1)).masked_fill(~learns, 0)
    sizes["dsaliency"] = size.view(x.saliency.shape)
    if x.options["prune_queries"]:
        sizes["dq"] = sizes["dq"].masked_fill(~visible[..., None], 0)
        sizes["out"] = torch.where(visible[..., None], sizes["out"], truth["out"].abs())
    if x.passthrough is not None:
        sizes["dpassthrough"] = truth["dpassthrough"].abs()
    del sizes["lse"]
    return sizes


def _saliency(spec: SaliencySpec, key_heads: int, random: torch.Generator) -> Tensor:
    shape = (spec.batch, key_heads, spec.tokens) if spec.per_head else (spec.batch, spec.tokens)
    saliency = 1 - torch.rand(shape, generator=random)
    if spec.saliency == "ties":
        return (saliency * 4).ceil() / 4
    if spec.saliency == "holes":
        chance = torch.rand(shape, generator=random)
        return saliency.masked_fill(chance < 0.3, 0).masked_fill(chance > 0.8, math.nan)
    if spec.saliency == "nothing":
        saliency[0] = 0
    return saliency


def _key_mask(spec: SaliencySpec, random: torch.Generator) -> Tensor | None:
    if spec.key_mask is None:
        return None
    if spec.key_mask == "tail":
        lengths = torch.linspace(0.4, 0.9, spec.batch) * spec.tokens
        return torch.arange(spec.tokens) < lengths.ceil()[:, None]
    keep = torch.rand((spec.batch, spec.tokens), generator=random) < 0.6
    if spec.key_mask == "nothing":
        keep[0] = False
    return keep
