"""SparseContrast: a learned saliency is worth more than chance."""

from __future__ import annotations

from typing import Literal

import torch

from sparseattn.claims.finding import Effort, Finding, found, missing, spread
from sparseattn.data.samples import digits
from sparseattn.data.split import Examples
from sparseattn.models import SparseContrastClassifier, SparseContrastConfig

KEEP, STEPS, BATCH = 0.25, 480, 32


def learned_saliency(effort: Effort) -> Finding:
    """Classify digits from a quarter of their patches, chosen by the predictor or at random."""
    claim = "SparseContrast: a compact predictor finds what matters"
    if lacking := missing("timm"):
        return Finding(claim, lacking, "cannot be shown here")
    seeds = range(effort.seeds)
    learned = [accuracy("learned", seed) for seed in seeds]
    random = [accuracy("random", seed) for seed in seeds]
    measured = (
        f"digits from {KEEP:.0%} of 16 patches, {len(seeds)} seeds, {STEPS} steps: "
        f"{spread(learned)} accuracy with learned saliency, {spread(random)} with random patches"
    )
    return found(claim, measured, min(learned) > max(random))


def accuracy(choose: Literal["learned", "random"], seed: int, steps: int = STEPS) -> float:
    """Train a classifier on digits; return its accuracy on those for testing.

    Patches are chosen in front of the first block: nothing else has seen the others.
    """
    split = digits()
    train, test = split.train, split.test
    if not (isinstance(train, Examples) and isinstance(test, Examples)):
        raise TypeError("digits are not in memory")
    torch.manual_seed(seed)
    config = SparseContrastConfig(
        backbone="vit_tiny_patch16_224", image_size=8, patch=2, dim=32, depth=2, heads=2, start=0,
        stages=1, keep=KEEP, choose=choose, predictor_dim=8, classes=10,
    )  # fmt: skip
    model, rate = SparseContrastClassifier(config), 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20)
        batch = train.take(torch.randint(len(train), (BATCH,)).tolist()).columns
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        guesses = model(test.columns["images"]).logits.argmax(1)
    return float((guesses == test.columns["labels"]).float().mean())
