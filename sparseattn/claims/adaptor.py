"""Adaptor: few parameters learn, the others keep their bits, and the loss falls by the pairs."""

from __future__ import annotations

import math
from statistics import mean
from typing import Literal

import torch

from sparseattn.claims.finding import Effort, Finding, found, missing
from sparseattn.data.pairs import numbers
from sparseattn.data.split import Examples
from sparseattn.models import Adaptor, AdaptorConfig


def trainable_share(effort: Effort) -> Finding:
    """Count parameters with the shapes of ResNet-50 and BERT, without weights."""
    claim = "Adaptor: more than 90 % fewer trainable parameters"
    if lacking := missing("timm", "transformers"):
        return Finding(claim, lacking, "cannot be shown here")
    import timm
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        image = timm.create_model("resnet50", num_classes=0)
        model = Adaptor(
            AdaptorConfig(image_width=2048, text_width=768), image, BertModel(BertConfig())
        )
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = model.trainable_share()
    measured = f"ResNet-50 + BERT: {learn:,} of {learn / share:,.0f} parameters learn ({share:.1%})"
    return found(claim, measured, share < 0.1)


def frozen_bits(effort: Effort) -> Finding:
    """Train some steps, and compare every tensor of the encoders bit by bit."""
    torch.manual_seed(0)
    image = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.BatchNorm2d(64))
    model = Adaptor(AdaptorConfig(dim=64, heads=4), image).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "encoder." in k}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in _batches(20, 32):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = model.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    measured = f"{len(moved)} of {len(before)} tensors of the encoders changed in 20 steps"
    claim = "Adaptor: the backbones stay frozen, BatchNorm's statistics too"
    return found(claim, measured, not moved)


def shuffled_pairs(effort: Effort) -> Finding:
    """Train on true pairs, on shuffled ones, and on shuffled ones with a model that leaks."""
    size, steps = 32, 5 * effort.epochs
    true = _contrastive("late", False, steps, size)
    shuffled = _contrastive("late", True, steps, size)
    leaky = _contrastive("own", True, steps, size)
    level = math.log(size)
    measured = (
        f"loss after {steps} steps, in units of ln {size}: {true / level:.2f} on true pairs, "
        f"{shuffled / level:.2f} on shuffled ones; {leaky / level:.2f} on shuffled ones where a "
        "sample reads its own partner (the leak)"
    )
    claim = "Adaptor: the loss falls by what pairs share, not by a leak"
    return found(claim, measured, true < 0.8 * level and abs(shuffled / level - 1) < 0.03)


def _batches(steps: int, size: int) -> list[dict[str, torch.Tensor]]:
    data = numbers().train
    if not isinstance(data, Examples):
        raise TypeError("numbers are not in memory")
    generator = torch.Generator().manual_seed(0)
    length = len(data)
    return [
        data.take(torch.randint(length, (size,), generator=generator).tolist()).columns
        for _ in range(steps)
    ]


def _contrastive(fusion: Literal["late", "own"], shuffle: bool, steps: int, size: int) -> float:
    """Train on numbers; return the mean loss of the last tenth of the steps."""
    torch.manual_seed(0)
    config = AdaptorConfig(dim=64, heads=4, queries=8, project=64, fusion=fusion)
    model, losses = Adaptor(config).train(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in _batches(steps, size):
        if shuffle:
            batch = {**batch, "images": batch["images"][torch.randperm(size)]}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return mean(losses[-max(1, steps // 10) :])
