"""SparseContrast: what a training step costs, trimmed and not, against what counting predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseattn.benchmarks.timing import CpuTimer, Job, interleave
from sparseattn.claims.finding import Effort, Finding, found, missing
from sparseattn.models import SparseContrast, SparseContrastConfig, nt_xent, two_views

SIDES = (224, 512, 896)  # of the images, in pixels: 196, 1024 and 3136 tokens
SAVED = 0.4  # of the time of a step, as claimed
KEEP, DEPTH, WIDTH = 0.25, 4, 192
CONFIG = SparseContrastConfig(
    backbone="vit_tiny_patch16_224", dim=WIDTH, depth=DEPTH, start=1, stages=1, keep=KEEP
)
Trim = Literal["maps", "tokens"]


def step_times(effort: Effort) -> Finding:
    """Time whole steps, dense and trimmed in both ways, on two images."""
    claim = "SparseContrast: a training step takes 40 % less time than a dense one"
    if lacking := missing("timm"):
        return Finding(claim, lacking, "cannot be shown here")
    parts, saved = [], []
    for side in SIDES:
        shares = step_shares(side, effort.seconds)
        tokens = (side // 16) ** 2
        texts = [
            f"trim {trim} {share - 1:+.0%} ({predicted_share(trim, tokens) - 1:+.0%} by counting)"
            for trim, share in shares.items()
        ]
        parts.append(f"{tokens} tokens: {', '.join(texts)}")
        saved += [f"{trim} at {tokens}" for trim, share in shares.items() if share <= 1 - SAVED]
    measured = (
        f"time of a step against dense, ViT of width {WIDTH}, {DEPTH} blocks, the last "
        f"{DEPTH - CONFIG.start} of them trimmed to {KEEP:.0%}: {'; '.join(parts)}. "
        f"Saved 40 %: {', '.join(saved) or 'none'}"
    )
    return found(claim, measured, bool(saved))


def step_shares(side: int, seconds: float) -> dict[Trim, float]:
    """Return the time of a step with either way of trimming, in units of a dense step.

    A step is forward, backward and optimizer. A trimmed one has its share of the dense forward that
    the quality loss needs in some of the steps. seconds: that steps of one kind may take in all.
    """
    images = torch.rand(2, 1, side, side)
    config = dataclasses.replace(CONFIG, image_size=side, quality_share=0.0)
    kinds: tuple[Trim, ...] = ("maps", "tokens")
    dense = SparseContrast(config)
    jobs = {
        "dense": _step(dense, partial(_dense_loss, dense, images)),
        "quality": Job(lambda _: _dense_forward(dense, images)),
    }
    for trim in kinds:
        model = SparseContrast(dataclasses.replace(config, trim=trim))
        jobs[trim] = _step(model, partial(_loss, model, images))
    times = {name: span.p50 for name, span in interleave(jobs, CpuTimer(), 1, 5, seconds).items()}
    quality = CONFIG.quality_share * times["quality"]
    return {trim: (times[trim] + quality) / times["dense"] for trim in kinds}


def predicted_share(trim: Trim, tokens: int) -> float:
    """Return the multiplications of a step in units of a dense one, counting blocks alone.

    A block of n tokens with k keys: 12 n D^2 in its linear maps and 2 n k D in its attention,
    twice that in the backward.
    """
    dim, kept = WIDTH, KEEP * tokens

    def block(n: float, keys: float) -> float:
        return 12 * n * dim**2 + 2 * n * keys * dim

    whole = block(tokens, tokens)
    trimmed = block(tokens, kept) if trim == "maps" else block(kept, kept)
    share = (CONFIG.start + (DEPTH - CONFIG.start) * trimmed / whole) / DEPTH
    return share + CONFIG.quality_share / 3


def _loss(model: SparseContrast, images: Tensor) -> Tensor:
    loss: Tensor = model(images).loss
    return loss


def _dense_loss(model: SparseContrast, images: Tensor) -> Tensor:
    """Return the contrastive loss with plain attention: no predictor, no further losses."""
    config = model.config
    views = two_views(images, config.crop, config.degrees, config.contrast_jitter)
    first, second = model.projector(model.backbone(views, None).pooled).chunk(2)
    return nt_xent(first, second, config.temperature)


@torch.no_grad()
def _dense_forward(model: SparseContrast, images: Tensor) -> None:
    model.backbone(torch.cat([images, images]), None)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Job:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(_: Any) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Job(step)
