"""Cases of linformer_attention: shared, paired and per-head projections, padding, lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from proof import linear
from proof.case import Case, Size
from sparseattn.ops.linformer_attention import linformer_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import linformer

Sharing = Literal["headwise", "key-value", "none"]


def drawn(normal: Callable[..., Tensor], spec: Spec) -> dict[str, Tensor]:
    """The projection of a huge case."""
    return {"key_projection": normal(spec.landmarks, spec.q_len) * spec.q_len**-0.5}


def case(name: str, size: Size, spec: Spec, sharing: Sharing = "headwise") -> Case:
    """The case of a spec."""
    make = partial(linformer, sharing=sharing)
    return linear.case(linformer_attention, name, size, spec, make, drawn)


SMALL = Spec(20, 35, head_dim=16, heads=2, key_heads=1, landmarks=17, key_mask="tail")
LONG = Spec(16384, head_dim=64, heads=4, batch=1, landmarks=256)
ODD = Spec(197, 300, head_dim=64, heads=4, key_heads=2, landmarks=49)
EDGES = {
    "n1": replace(ODD, q_len=1),
    "n577": Spec(577, heads=12, head_dim=64, landmarks=256),
    "m1": replace(ODD, landmarks=1),
    "m512": replace(ODD, landmarks=512, head_dim=128),
    "d16": replace(ODD, head_dim=16),
    "d40": replace(ODD, head_dim=40, key_mask="random"),
    "d72": replace(ODD, head_dim=72, layout="sliced"),
    "strided": replace(ODD, layout="strided"),
    "no-keys": replace(ODD, key_mask="nothing"),
    "scale": replace(ODD, scale=0.5, input_scale=0.5),
}
CASES = (
    case("tail", "small", SMALL),
    case("pair", "small", replace(SMALL, key_mask=None), "key-value"),
    case("per-head", "small", SMALL, "none"),
    case("m256-16k", "full", LONG),
    case("tail-d128", "full", replace(ODD, q_len=4096, k_len=4096, head_dim=128, key_mask="tail")),
    case("pair-16k", "full", LONG, "key-value"),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
    case("huge", "huge", Spec(4096, batch=513, heads=16, head_dim=64, landmarks=256)),
)
