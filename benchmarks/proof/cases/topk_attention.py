"""Cases of topk_attention: blocks chosen by pooled scores, gates that train through them.

The blocks that were chosen are a result of their own, and must be those of the reference. Inputs
are drawn on the host, the same ones everywhere: those of the first seed have no two scores that
rounding could swap where a row's choice ends.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import Arguments, Case, Size
from sparseattn.ops.topk_attention import topk_attention
from sparseattn.structures.block_mask import BlockMask
from sparseattn.testing.inputs import AttentionSpec
from sparseattn.testing.topk_attention import TopkInputs, magnitudes
from sparseattn.testing.topk_attention import TopkSpec as Spec
from sparseattn.testing.topk_attention import make as make_inputs

TOKENS = ("query_mask", "key_mask", "query_weight", "key_weight")


def attend(impl: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return out, and which blocks were chosen, bool [B, H, R, C]."""
    out, mask = topk_attention(**arguments, return_mask=True, impl=impl)
    return out, (mask.block_states() != -1).expand(*out.shape[:2], -1, -1)


def sizes(
    arguments: Arguments, sent: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The size of the terms of every result."""
    options: dict[str, Any] = {"gate": None, "scale": None, "key_mask": None, **arguments}
    q, k, v, keep = (options.pop(name) for name in ("q", "k", "v", "keep"))
    inputs = TopkInputs(q, k, v, keep, sent["out"], options)
    lengths = (q.shape[2], k.shape[2])
    mask = BlockMask.from_dense(truth["blocks"], *lengths, options["block_size"])
    return magnitudes(inputs, mask, truth, dtype)


def case(name: str, size: Size, spec: Spec, **more: Any) -> Case:
    """The case of a spec."""
    attention = spec.attention

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        seeded = replace(spec, attention=replace(attention, seed=attention.seed + seed))
        inputs = make_inputs(seeded, dtype, device)
        named = {name: getattr(inputs, name) for name in ("q", "k", "v", "keep")}
        return {n: x for n, x in (named | inputs.options).items() if x is not None}

    trains = isinstance(spec.gate, str)
    samples = ("q", "k", "v", *TOKENS, "out", "blocks")
    return Case(
        name, size, make, partial(attend, "triton"), partial(attend, "reference"),
        ("out", "blocks"), ("q", "k", "v", "gate") if trains else ("q", "k", "v"),
        samples if attention.batch > 1 else (), sizes, **more,
    )  # fmt: skip


Attention = AttentionSpec
SMALL = Attention(45, 60, batch=2, heads=2, key_heads=1, head_dim=16, block_size=(16, 16))
LONG = Attention(4096, heads=2, head_dim=64)
ODD = Attention(300, 500, batch=2, heads=4, key_heads=2, head_dim=64, block_size=(64, 32))
HIDDEN = replace(ODD, key_mask="random")
EDGES = {
    "one-token": Spec(Attention(1)),
    "rows": Spec(ODD, keep="rows"),
    "top-p": Spec(ODD, keep=0.7, mode="top_p", gate="scalar"),
    "threshold": Spec(ODD, keep=0.08, mode="threshold"),
    "max": Spec(HIDDEN, pooling="max", gate="heads"),
    "weights": Spec(HIDDEN, weights=True, query_mask=True, always=True, gate="heads"),
    "weights-top-p": Spec(HIDDEN, keep=0.7, mode="top_p", weights=True, pooling="max"),
    "no-keys": Spec(replace(ODD, key_mask="nothing"), gate=0.5),
    "dense": Spec(ODD, keep=1.0),
    "d256": Spec(Attention(500, head_dim=256), gate="heads"),
    "d40": Spec(Attention(500, head_dim=40, layout="strided"), gate="heads"),
    "wide-blocks": Spec(Attention(1000, head_dim=128, block_size=(256, 128)), gate="scalar"),
    "1100-blocks": Spec(Attention(64, 17600, block_size=(16, 16)), keep=40),
    "2100-blocks": Spec(Attention(64, 33600, block_size=(16, 16)), keep=0.9, mode="top_p"),
}
CASES = (
    case("plain", "small", Spec(SMALL)),
    case(
        "loaded", "small",
        Spec(replace(SMALL, key_mask="tail"), gate="heads", always=True, query_mask=True),
    ),
    case("shares", "small", Spec(SMALL, keep=0.7, mode="top_p", pooling="max", weights=True)),
    case("keep-10", "full", Spec(LONG, keep=0.1)),
    case("gate", "full", Spec(replace(LONG, key_mask="tail"), keep=0.2, gate="heads")),
    case("16k-keys", "full", Spec(replace(LONG, q_len=2048, k_len=16384, heads=1), keep=0.1)),
    case(
        "16k", "full", Spec(replace(LONG, q_len=16384, heads=4), keep=0.1),
        skip={"numbers": "the float64 reference takes more than 40 GiB; 16k-keys stands in"},
    ),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
)  # fmt: skip
