"""Cases of nystrom_attention: segments, grids, padding, grouped queries, lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from proof import linear
from proof.case import Case, Size
from sparseattn.ops.nystrom_attention import nystrom_attention
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import nystrom


def case(name: str, size: Size, spec: Spec, make: linear.Maker = nystrom, **options: Any) -> Case:
    """The case of a spec."""
    return linear.case(nystrom_attention, name, size, spec, make, _landmarks, **options)


def _landmarks(_: Callable[..., Tensor], spec: Spec) -> dict[str, Any]:
    """What a huge case has besides q, k and v."""
    return {"num_landmarks": spec.landmarks}


SMALL = Spec(24, head_dim=16, heads=2, key_heads=1, landmarks=5, key_mask="tail", correlated=True)
LONG = Spec(16384, head_dim=64, heads=4, batch=1, landmarks=64, correlated=True)
ODD = Spec(300, head_dim=64, heads=4, key_heads=2, landmarks=49, correlated=True)
EDGES = {
    "n1": replace(ODD, q_len=1),
    "n20": replace(ODD, q_len=20),
    "n577": Spec(577, heads=12, head_dim=64, landmarks=64, correlated=True),
    "m1": replace(ODD, landmarks=1),
    "m128-d128": replace(ODD, q_len=1025, landmarks=128, head_dim=128),
    "m256": replace(ODD, q_len=1025, landmarks=256),
    "d16": replace(ODD, head_dim=16),
    "d40": replace(ODD, head_dim=40, key_mask="random"),
    "d72": replace(ODD, head_dim=72, layout="sliced"),
    "strided": replace(ODD, layout="strided"),
    "no-keys": replace(ODD, key_mask="nothing"),
    "scale": replace(ODD, scale=0.5, input_scale=0.5),
    "iid": replace(ODD, correlated=False),
}
CASES = (
    case("tail", "small", SMALL, iterations=2),
    case("m64-16k", "full", LONG),
    case("tail-d128", "full", replace(ODD, q_len=4096, head_dim=128, key_mask="tail")),
    case("grid-16k", "full", replace(LONG, q_len=16385), grid=(128, 128)),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
    case("grid3", "edge", replace(ODD, key_mask="random"), grid=(5, 6, 9)),
    case("legacy", "edge", ODD, legacy_start=True),
    case("residual", "edge", replace(ODD, key_mask="tail"), partial(nystrom, residual=(33,))),
    case("huge", "huge", Spec(4096, batch=513, heads=16, head_dim=64, landmarks=64)),
)
