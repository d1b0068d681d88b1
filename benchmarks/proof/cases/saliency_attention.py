"""Cases of saliency_attention: tokens kept by a learned saliency, queries pruned or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proof.case import Arguments, Case, Size
from sparseattn.ops.saliency_attention import saliency_attention
from sparseattn.testing.saliency import SaliencyInputs, make, term_sizes
from sparseattn.testing.saliency import SaliencySpec as Spec

TENSORS = ("q", "k", "v", "saliency", "passthrough")


def sizes(
    arguments: Arguments, sent: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The size of the terms of every result."""
    named = {n: arguments[n] for n in (*TENSORS, "keep") if n in arguments}
    options = {n: x for n, x in arguments.items() if n not in named}
    return term_sizes(SaliencyInputs(**named, dout=sent["out"], options=options), truth, dtype)


def case(name: str, size: Size, spec: Spec, **more: Any) -> Case:
    """The case of a spec; the kept tokens are a result, and must be those of the reference."""

    def arguments(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        inputs = make(replace(spec, seed=spec.seed + seed), dtype, device)
        return {**inputs.tensors, "keep": inputs.keep, **inputs.options}

    attend = partial(saliency_attention, return_indices=True)
    trains = TENSORS if spec.prune == "passthrough" else TENSORS[:4]
    drawn = ("always",) if spec.always == "mask" else ()
    samples = (*TENSORS, "key_mask", *drawn, "out", "kept")
    return Case(
        name, size, arguments, partial(attend, impl="triton"), partial(attend, impl="reference"),
        ("out", "kept"), trains, samples if spec.batch > 1 else (), sizes, **more,
    )  # fmt: skip


SMALL = Spec(50, batch=2, head_dim=16, heads=2, key_heads=1)
LONG = Spec(4096, heads=4, head_dim=64)
ODD = Spec(501, batch=2, head_dim=64, heads=4, key_heads=2)
EDGES = {
    "one-token": Spec(1, keep=1),
    "cross": replace(ODD, q_len=70, key_mask="random"),
    "ties": replace(ODD, saliency="ties", keep=200),
    "holes": replace(ODD, saliency="holes", per_head=True),
    "nothing": replace(ODD, saliency="nothing"),
    "no-keys": replace(ODD, key_mask="nothing", prune="queries"),
    "threshold": replace(ODD, threshold=0.9, always=3),
    "always": replace(ODD, always="mask", per_head=True, prune="passthrough"),
    "no-bias": replace(ODD, log_bias=False),
    "d40": replace(ODD, head_dim=40, layout="strided"),
    "d256": replace(ODD, head_dim=256, prune="queries"),
}
CASES = (
    case("tail", "small", replace(SMALL, key_mask="tail", always=1)),
    case("prune", "small", replace(SMALL, prune="passthrough", always="mask")),
    case("keep-25", "full", replace(LONG, always=1)),
    case("prune-50", "full", replace(LONG, keep=0.5, prune="passthrough", always=5)),
    case("per-head", "full", replace(LONG, per_head=True, batch=2, heads=2, key_mask="tail")),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
)
