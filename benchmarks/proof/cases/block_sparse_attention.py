"""Cases of block_sparse_attention: random blocks, token masks, padding, biases, gates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import BFLOAT16, Arguments, Case, Size
from sparseattn.ops.block_sparse_attention import block_sparse_attention
from sparseattn.structures.block_mask import BlockMask
from sparseattn.testing.attention import magnitudes
from sparseattn.testing.inputs import AttentionInputs, AttentionSpec
from sparseattn.testing.inputs import make as make_inputs

TRITON = partial(block_sparse_attention, impl="triton", return_lse=True)
REFERENCE = partial(block_sparse_attention, impl="reference", return_lse=True)
TENSORS = ("q", "k", "v", "key_bias", "block_gate")


def sizes(
    arguments: Arguments, sent: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The size of the terms of every result."""
    inputs = AttentionInputs(**arguments, dout=sent["out"], dlse=sent["lse"])
    return magnitudes(inputs, truth, dtype)


def given(name: str, size: Size, spec: AttentionSpec, **more: Any) -> Case:
    """A case whose mask is an argument."""

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        inputs = make_inputs(replace(spec, seed=spec.seed + seed), dtype, device)
        named = {n: getattr(inputs, n) for n in (*TENSORS, "mask", "key_mask", "scale")}
        return {name: value for name, value in named.items() if value is not None}

    extras = {"key_bias": spec.key_bias, "block_gate": spec.block_gate}
    gradients = ("q", "k", "v", *(name for name, kind in extras.items() if kind))
    batched = (*TENSORS, "key_mask", "out", "lse", *(["mask"] if spec.per_batch else []))
    return Case(
        name, size, make, TRITON, REFERENCE, ("out", "lse"), gradients,
        batched if spec.batch > 1 else (), sizes, **more,
    )  # fmt: skip


def chosen(name: str, size: Size, spec: AttentionSpec, keep: int | float, **more: Any) -> Case:
    """A case whose mask is built from block scores inside the call, as a selector does."""
    block = spec.block_size[0]
    blocks = -(-spec.q_len // block)
    token_first = size == "huge"

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        random = torch.Generator(device).manual_seed(spec.seed + seed)
        shape = (spec.batch, spec.heads, spec.q_len, spec.head_dim)
        scores = torch.rand((1, spec.heads, blocks, blocks), generator=random, device=device)
        q, k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
        if token_first:  # tokens of one sample lie further apart than 2^31 elements in all
            q = torch.empty((shape[2], *shape[:2], shape[3]), dtype=dtype, device=device)
            q = q.permute(1, 2, 0, 3)
        for tensor in (q, k, v):
            tensor.normal_(generator=random)
        return {"q": q, "k": k, "v": v, "scores": scores}

    def masked(attend: Any, q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Any:
        return attend(q, k, v, choose(scores))

    def choose(scores: Tensor) -> BlockMask:
        lengths = (spec.q_len, spec.q_len)
        return BlockMask.from_block_scores(scores, keep, *lengths, spec.block_size)

    def masked_sizes(arguments: Arguments, *rest: Any) -> dict[str, Tensor]:
        named = {name: arguments[name] for name in "qkv"}
        return sizes({**named, "mask": choose(arguments["scores"])}, *rest)

    return Case(
        name, size, make, partial(masked, TRITON), partial(masked, REFERENCE), ("out", "lse"),
        ("q", "k", "v"), ("q", "k", "v", "out", "lse") if spec.batch > 1 else (), masked_sizes,
        **more,
    )  # fmt: skip


Spec = AttentionSpec
LOADED = Spec(
    20, 35, batch=2, heads=2, key_heads=1, block_size=(16, 32), mask="tokens", per_head=True,
    key_mask="tail", key_bias="heads", block_gate="heads", poison_queries=True,
)  # fmt: skip
WIDE = Spec(130, heads=1, mask="mixed")
EDGES = {
    "n1": Spec(1),
    "n63": Spec(63, mask="tokens"),
    "n65": Spec(65, mask="all"),
    "n127": Spec(127, mask="rows", key_bias="heads"),
    "n129": Spec(129, mask="holes", layout="permuted"),
    "n197": Spec(197, head_dim=64, mask="mixed", key_mask="tail", block_gate="heads"),
    "n577": Spec(577, head_dim=64, heads=12, mask="window", batch=4),
    "n1025": Spec(1025, head_dim=64, mask="topk", key_mask="random", batch=3),
    "one-query": Spec(1, 4096, mask="all", head_dim=64),
    "none": Spec(150, mask="none"),
    "one": Spec(700, mask="one", key_mask="nothing", batch=2),
    "cross": Spec(300, 1200, head_dim=80, mask="blocks", per_head=True, heads=4, key_heads=2),
    "d16": replace(WIDE, head_dim=16),
    "d40": replace(WIDE, head_dim=40),
    "d80": replace(WIDE, head_dim=80, block_gate="heads", key_bias="heads"),
    "d96": replace(WIDE, head_dim=96),
    "d128": replace(WIDE, head_dim=128, key_bias="hidden", block_gate="hidden"),
    "d192": replace(WIDE, head_dim=192),
    "d256": replace(WIDE, head_dim=256, key_bias="heads", block_gate="heads"),
    "scale-01": Spec(500, head_dim=64, mask="topk", input_scale=0.1),
    "scale-16": Spec(500, head_dim=64, mask="topk", input_scale=16),
    "negative": Spec(260, head_dim=64, mask="mixed", scale=-0.2),
    "sliced": Spec(260, head_dim=64, layout="sliced"),
    "strided": Spec(260, head_dim=64, layout="strided"),
    "wide-blocks": Spec(1000, head_dim=64, block_size=(256, 128), mask="tokens"),
}
FULL = Spec(4096, batch=1, heads=4, head_dim=64)
CASES = (
    chosen("chosen", "small", Spec(50, batch=2, heads=1, head_dim=16, block_size=(32, 32)), 1),
    given("loaded", "small", LOADED),
    chosen("chosen-d64", "full", replace(FULL, batch=2, heads=2), 0.15),
    chosen("chosen-d128", "full", replace(FULL, head_dim=128, block_size=(128, 128)), 0.5),
    chosen("chosen-8k", "full", replace(FULL, q_len=8192, heads=1), 0.1),
    given(
        "loaded-d72", "full",
        replace(LOADED, q_len=4097, k_len=3001, heads=4, key_heads=2, head_dim=72,
                block_size=(64, 64), batch=1),
    ),
    given("whole-d256", "full", replace(FULL, q_len=2048, head_dim=256, per_head=True)),
    *(given(name, "edge", spec) for name, spec in EDGES.items()),
    chosen(
        "huge", "huge",
        Spec(1024, batch=2049, heads=8, head_dim=128, block_size=(128, 128)), 1 / 8,
        dtypes=(BFLOAT16,),
    ),
)  # fmt: skip
