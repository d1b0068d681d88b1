"""MIRAM: what its high-resolution decoder holds, against the number of its tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseattn.claims.finding import Effort, Finding, found
from sparseattn.models import MIRAM, MIRAMConfig
from sparseattn.testing.memory import peak_extra_bytes

SIDES = (16, 24, 32, 48)  # of the decoder's grid: 256 to 2304 tokens
LINEAR = ("linformer", "performer", "nystrom")
MOST, STORED = 1.15, (1.85, 2.15)


def decoder_slope(method: str) -> float:
    """Return the slope of peak memory against tokens, log over log, forward and backward.

    method: of the decoder, or "stored": softmax attention whose matrix is kept for the backward,
    as torch does without a fused kernel.
    """
    stored = method == "stored"
    points = []
    for side in SIDES:
        config = MIRAMConfig(
            image_size=2 * side, patch=4, dim=32, depth=1, heads=2, low_dim=32, low_depth=1,
            low_heads=2, high_dim=64, high_depth=1, high_heads=4, features=64, projected_keys=64,
            landmarks=64, high_method="softmax" if stored else method,  # type: ignore[arg-type]
        )  # fmt: skip
        decoder = MIRAM(config).high
        tokens = torch.randn(1, side * side, 64)

        def step(decoder: torch.nn.Module = decoder, tokens: torch.Tensor = tokens) -> None:
            decoder.predict(decoder.attend(tokens)).square().sum().backward()  # type: ignore[operator]

        with sdpa_kernel(SDPBackend.MATH) if stored else nullcontext():
            step()  # what is made once
            decoder.zero_grad()
            points.append((math.log(side * side), math.log(peak_extra_bytes(step)[1])))
    x, y = torch.tensor(points).T
    return float((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum())


def memory_slopes(effort: Effort) -> Finding:
    """Fit the slopes of the linear decoders, of stored softmax, and of torch's fused softmax."""
    slopes = {method: decoder_slope(method) for method in (*LINEAR, "stored", "softmax")}
    linear = ", ".join(f"{method} {slopes[method]:.2f}" for method in LINEAR)
    measured = (
        f"slope of peak memory in tokens, {SIDES[0] ** 2} to {SIDES[-1] ** 2}, forward and "
        f"backward: {linear}; softmax {slopes['stored']:.2f} with its matrix stored, "
        f"{slopes['softmax']:.2f} in torch's fused kernel, which stores none"
    )
    holds = all(slopes[method] <= MOST for method in LINEAR)
    holds = holds and STORED[0] <= slopes["stored"] <= STORED[1]
    claim = "MIRAM: the high-resolution decoder's memory falls from O(N²) to O(N)"
    return found(claim, measured, holds)
