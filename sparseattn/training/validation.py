"""Claims of the papers, measured here: what holds, what does not, and what cannot be shown here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

from sparseattn.data.pairs import numbers
from sparseattn.data.samples import nuclei_picture
from sparseattn.data.split import Examples
from sparseattn.models import Adaptor, AdaptorConfig, SparseAttnNet
from sparseattn.training.logs import read_csv
from sparseattn.training.loop import train
from sparseattn.training.options import TrainOptions

Verdict = Literal["holds", "does not hold", "cannot be shown here"]
PIXELS, PIXELS_SLACK, POINTS = 0.15, 0.02, 0.02


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and what follows."""

    claim: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Effort:
    """How much is spent: seeds and epochs of trainings."""

    seeds: int = 5
    epochs: int = 60


def trainable_share(effort: Effort) -> Finding:
    """Adaptor: over 90 % fewer trainable parameters (ResNet-50 and BERT shapes, exact count)."""
    claim = "Adaptor: more than 90 % fewer trainable parameters"
    missing = [name for name in ("timm", "transformers") if find_spec(name) is None]
    if missing:
        return Finding(claim, f"needs {' and '.join(missing)}", "cannot be shown here")
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
    return Finding(claim, measured, "holds" if share < 0.1 else "does not hold")


def few_pixels(effort: Effort) -> Finding:
    """SparseAttnNet: about 15 % of the pixels at competitive accuracy (digits)."""
    few: list[float] = []
    everything: list[float] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(effort.seeds):
            for name, changes in (("few", {}), ("all", {"keep": 1.0})):
                out = Path(folder) / f"{name}-{seed}"
                options = TrainOptions(
                    data="digits", out=str(out), epochs=effort.epochs, lr=2e-3, seed=seed
                )
                row = read_csv(train("sparseattnnet", options, changes) / "epochs.csv")[-1]
                (few if name == "few" else everything).append(row["accuracy"])
                if name == "few":
                    shares.append(row["keep"])
    near = all(abs(share - PIXELS) <= PIXELS_SLACK for share in shares)
    holds = near and mean(few) >= mean(everything) - POINTS
    return Finding(
        "SparseAttnNet: about 15 % of the pixels, competitive accuracy",
        f"digits, {effort.seeds} seeds: {_spread(few)} with {mean(shares):.1%} of the pixels, "
        f"{_spread(everything)} with all",
        "holds" if holds else "does not hold",
    )


def frozen_bits(effort: Effort) -> Finding:
    """Adaptor: the backbones are frozen, bit by bit, in training mode too."""
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
    return Finding(
        "Adaptor: the backbones stay frozen, BatchNorm's statistics too",
        measured,
        "does not hold" if moved else "holds",
    )


def shuffled_pairs(effort: Effort) -> Finding:
    """Adaptor: what it learns comes from the pairs: on shuffled ones the loss stays at ln B."""
    size, steps = 32, 5 * effort.epochs
    true = _contrastive("late", False, steps, size)
    shuffled = _contrastive("late", True, steps, size)
    leaky = _contrastive("own", True, steps, size)
    level = math.log(size)
    holds = true < 0.8 * level and abs(shuffled / level - 1) < 0.03
    return Finding(
        "Adaptor: the loss falls by what pairs share, not by a leak",
        f"loss after {steps} steps, in units of ln {size}: {true / level:.2f} on true pairs, "
        f"{shuffled / level:.2f} on shuffled ones; {leaky / level:.2f} on shuffled ones where a "
        "sample reads its own partner (the leak)",
        "holds" if holds else "does not hold",
    )


def on_nuclei(effort: Effort) -> Finding:
    """SparseAttnNet: a model of how the chosen pixels fall on labelled nuclei."""
    claim = "SparseAttnNet: the chosen pixels are the salient ones"
    picture, mask = nuclei_picture()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            data="nuclei", out=folder, epochs=max(2, effort.epochs // 3), lr=2e-3
        )
        train("sparseattnnet", options, {"rule_every": 1})
        model: Any = SparseAttnNet.from_pretrained(str(Path(folder) / "model")).eval()
    crops = picture.unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 1, 32, 32)
    covered = (mask > 0).unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 32 * 32)
    with torch.no_grad():
        chosen = model(crops).chosen
    hits, area = float(covered.gather(1, chosen).float().mean()), float(covered.float().mean())
    return Finding(
        claim,
        f"{hits:.1%} of the chosen pixels lie in nuclei, which are {area:.1%} of the picture",
        "holds" if hits > area else "does not hold",
    )


CHECKS: dict[str, Callable[[Effort], Finding]] = {
    "V1": trainable_share,
    "V2": few_pixels,
    "V2b": on_nuclei,
    "V8": frozen_bits,
    "V9": shuffled_pairs,
}
CLINICAL = Finding(
    "AUC, Dice and accuracy on hospital data, as the papers report them",
    "MIMIC-CXR, CheXpert and the cytometry sets cannot be shipped or downloaded freely",
    "cannot be shown here",
)


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


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1%} ± {stdev(values) if len(values) > 1 else 0:.1%}"
