"""Cases of performer_attention: its kernels of features, padding, grouped queries, lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from proof import linear
from proof.case import Case, Size
from sparseattn.ops.performer_attention import performer_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import performer


def drawn(normal: Callable[..., Tensor], spec: Spec) -> dict[str, Tensor]:
    """The projection of a huge case."""
    return {"projection": normal(spec.landmarks, spec.head_dim)}


def case(name: str, size: Size, spec: Spec, **options: Any) -> Case:
    """The case of a spec."""
    return linear.case(performer_attention, name, size, spec, performer, drawn, **options)


SMALL = Spec(20, 35, head_dim=16, heads=2, key_heads=1, landmarks=17, key_mask="tail")
LONG = Spec(16384, head_dim=64, heads=4, batch=1, landmarks=256)
ODD = Spec(197, 300, head_dim=64, heads=4, key_heads=2, landmarks=49)
EDGES = {
    "n1": replace(ODD, q_len=1),
    "two-tokens": Spec(2, landmarks=8),
    "n577": Spec(577, heads=12, head_dim=64, landmarks=266),
    "m1": replace(ODD, landmarks=1),
    "m512": replace(ODD, landmarks=512, head_dim=128),
    "d16": replace(ODD, head_dim=16),
    "d40": replace(ODD, head_dim=40, key_mask="random"),
    "d72": replace(ODD, head_dim=72, layout="sliced"),
    "strided": replace(ODD, layout="strided"),
    "no-keys": replace(ODD, key_mask="nothing"),
    "scale": replace(ODD, scale=0.5, input_scale=0.5),
}
HUGE = Spec(4096, batch=513, heads=16, head_dim=64, landmarks=256)
CASES = (
    case("tail", "small", SMALL),
    case("eps", "small", SMALL, eps=1e-4),
    case("relu", "small", replace(SMALL, key_mask=None), kernel="relu"),
    case("m256-16k", "full", LONG),
    case("tail-d128", "full", replace(ODD, q_len=4096, k_len=4096, head_dim=128, key_mask="tail")),
    case("eps-m266", "full", replace(LONG, q_len=4096, landmarks=266), eps=1e-4),
    case("relu-16k", "full", LONG, kernel="relu"),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
    case("cosh", "edge", ODD, kernel="cosh"),
    case("relu-no-keys", "edge", replace(ODD, key_mask="nothing"), kernel="relu"),
    case("eps-no-keys", "edge", replace(ODD, key_mask="nothing"), eps=1e-4),
    case("huge", "huge", HUGE),
)
