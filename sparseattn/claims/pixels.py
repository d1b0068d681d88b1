"""SparseAttnNet: few pixels are enough, and they are the salient ones."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from sparseattn.claims.finding import Effort, Finding, found, spread
from sparseattn.data.samples import CROP, held_rows, nuclei_picture
from sparseattn.models import SparseAttnNet
from sparseattn.training.logs import read_csv
from sparseattn.training.loop import train
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import recipe_type

SMALL = {"dim": 32, "heads": 2, "depth": 1}  # a model for crops of 1024 pixels on a CPU
PIXELS, PIXELS_SLACK, POINTS = 0.15, 0.02, 0.02  # of the claim: share of pixels, and of accuracy


@dataclass(frozen=True)
class Run:
    """What a training ended with."""

    accuracy: float
    keep: float
    model: Any


def digits(effort: Effort) -> Finding:
    """Train on digits with few pixels and with all of them, from the same seeds."""
    few, everything = _pairs("digits", effort.seeds, {"epochs": effort.epochs}, {})
    claim = "SparseAttnNet: about 15 % of the pixels, competitive accuracy (digits)"
    return found(claim, _compared(few, everything), is_near(few, everything))


def nuclei(effort: Effort) -> Finding:
    """Train on crops of nuclei; see where the chosen pixels fall in the part for testing."""
    options = {"epochs": max(1, 3 * effort.epochs // 4), "batch_size": 16, "lr": 1e-3}
    few, everything = _pairs("nuclei", effort.seeds, options, SMALL)
    picture, mask = (part[held_rows(part)] for part in nuclei_picture())
    crops = picture.unfold(0, CROP, CROP).unfold(1, CROP, CROP).reshape(-1, 1, CROP, CROP)
    covered = (mask > 0).unfold(0, CROP, CROP).unfold(1, CROP, CROP).reshape(-1, CROP**2)
    with torch.no_grad():
        chosen = [run.model(crops).chosen for run in few]
    hits = [float(covered.gather(1, pixels).float().mean()) for pixels in chosen]
    area = float(covered.float().mean())
    measured = (
        f"{_compared(few, everything)}; {spread(hits)} of the chosen pixels lie in nuclei, which "
        f"are {area:.1%} of the picture"
    )
    claim = "SparseAttnNet: the same on nuclei crops, and the chosen pixels are salient"
    return found(claim, measured, is_near(few, everything) and min(hits) > area)


def _pairs(
    data: str, seeds: int, options: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[list[Run], list[Run]]:
    """Train from every seed with few pixels and with all of them, otherwise in the same way."""
    return (
        [_trained(data, seed, options, changes) for seed in range(seeds)],
        [_trained(data, seed, options, {**changes, "keep": 1.0}) for seed in range(seeds)],
    )


def _trained(data: str, seed: int, options: Mapping[str, Any], changes: Mapping[str, Any]) -> Run:
    given = {**recipe_type("sparseattnnet").defaults, **options, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train("sparseattnnet", TrainOptions(data=data, out=str(out), **given), changes)
        row = read_csv(out / "epochs.csv")[-1]
        model = SparseAttnNet.from_pretrained(str(out / "model")).eval()
    return Run(row["accuracy"], row["keep"], model)


def is_near(few: list[Run], everything: list[Run]) -> bool:
    """Say whether every run saw few pixels, and the mean accuracy is that of all pixels."""
    shares = all(abs(run.keep - PIXELS) <= PIXELS_SLACK for run in few)
    means = [mean(run.accuracy for run in runs) for runs in (few, everything)]
    return shares and means[0] >= means[1] - POINTS


def _compared(few: list[Run], everything: list[Run]) -> str:
    accuracies = [spread([run.accuracy for run in runs]) for runs in (few, everything)]
    least, most = (f"{pick(run.keep for run in few):.1%}" for pick in (min, max))
    share = least if least == most else f"{least} to {most}"
    return (
        f"accuracy over {len(few)} seeds: {accuracies[0]} with {share} of the pixels, "
        f"{accuracies[1]} with all"
    )
