"""Cases of linear_attention: its feature maps, padding, grouped queries, lengths."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from proof.linear import case as linear_case
from sparseattn.ops.linear_attention import linear_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import OpInputs, make


def positive(spec: Spec, dtype: torch.dtype, device: torch.device) -> OpInputs:
    """Queries and keys that a map of positive values was applied to."""
    inputs = make(spec, dtype, device)
    return inputs.changed(**{name: inputs.arguments[name].abs() + 0.1 for name in "qk"})


case = partial(linear_case, linear_attention)
SMALL = Spec(20, 35, head_dim=16, heads=2, key_heads=1, key_mask="tail")
LONG = Spec(16384, head_dim=64, heads=4, batch=1)
ODD = Spec(197, 300, head_dim=64, heads=4, key_heads=2)
EDGES = {
    "n1": replace(ODD, q_len=1),
    "two-tokens": Spec(2),
    "n577": Spec(577, heads=12, head_dim=64),
    "d16": replace(ODD, head_dim=16),
    "d40": replace(ODD, head_dim=40, key_mask="random"),
    "d72": replace(ODD, head_dim=72, layout="sliced"),
    "strided": replace(ODD, layout="strided"),
    "expanded": replace(ODD, key_heads=4, layout="expanded", dout_layout="scalar"),
    "no-keys": replace(ODD, key_mask="nothing"),
    "input-8": replace(ODD, input_scale=8.0),
}
HUGE = Spec(4096, batch=513, heads=16, head_dim=64)
CASES = (
    case("tail", "small", SMALL, make),
    case("relu", "small", SMALL, make, feature_map="relu"),
    case("identity", "small", replace(SMALL, key_mask=None), positive, feature_map="identity"),
    case("n16k", "full", LONG, make),
    case("tail-d128", "full", Spec(4096, head_dim=128, heads=4, key_mask="tail"), make),
    case("relu-16k", "full", LONG, make, feature_map="relu"),
    *(case(name, "edge", spec, make) for name, spec in EDGES.items()),
    case("huge", "huge", HUGE, make),
)
