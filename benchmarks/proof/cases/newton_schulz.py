"""Cases of newton_schulz: numbers of landmarks, masks, head dims."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from proof.case import Arguments, Case, Size
from sparseattn.ops.newton_schulz import newton_schulz
from sparseattn.testing import landmarks
from sparseattn.testing.landmarks import LandmarkSpec as Spec
from sparseattn.testing.landmarks import judge


def case(name: str, size: Size, spec: Spec, iterations: int = 6, **more: Any) -> Case:
    """The case of a spec, whose q_len is m."""

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        return landmarks.newton_schulz(replace(spec, seed=seed), dtype, device).arguments

    attend = partial(newton_schulz, iterations=iterations)
    return Case(
        name, size, make, partial(attend, impl="triton"), partial(attend, impl="reference"),
        gradients=("queries", "keys", "values"),
        batched=("queries", "keys", "values", "landmark_mask", "out") if spec.batch > 1 else (),
        judge=judge, **more,
    )  # fmt: skip


FULL = Spec(64, head_dim=64, batch=8, heads=12, correlated=True)
ODD = Spec(49, head_dim=64, correlated=True)
EDGES = {
    "m1": replace(ODD, q_len=1),
    "m100": replace(ODD, q_len=100),
    "d16": replace(ODD, head_dim=16),
    "d72": replace(ODD, head_dim=72),
    "d128": replace(ODD, head_dim=128),
    "masked": replace(ODD, key_mask="random"),
    "nothing": replace(ODD, key_mask="nothing"),
    "iid": replace(ODD, correlated=False),
}
CASES = (
    case("small", "small", Spec(14, head_dim=16, heads=1, key_mask="tail", correlated=True), 2),
    case("m64", "full", FULL),
    case("m128-d128", "full", replace(FULL, q_len=128, head_dim=128)),
    *(case(name, "edge", spec) for name, spec in EDGES.items()),
)
