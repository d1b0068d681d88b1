"""How SparseContrast is pre-trained: images alone, and a kept share that follows the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseattn.data.sources import images_alone
from sparseattn.data.split import Split
from sparseattn.models.sparsecontrast import SparseContrast, SparseContrastConfig
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe, data_options
from sparseattn.training.recipes.shared import history_picture, shown_images
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import images_picture

GRID = 8  # patches a side of a small image
SMALL = {  # a model that a CPU trains on small crops, where nothing else is asked for
    "backbone": "vit_tiny_patch16_224", "dim": 64, "depth": 3, "heads": 2, "start": 1, "stages": 1,
    "predictor_dim": 32, "crop": 0.7,
}  # fmt: skip


class SparseContrastRecipe(Recipe):
    """Contrast of two views. The kept share falls along the schedule, an epoch at a time."""

    name: ClassVar[str] = "sparsecontrast"
    summary: ClassVar[str] = "learn features by contrast from the most salient tokens"
    model_type: ClassVar[type[nn.Module]] = SparseContrast
    config_type: ClassVar[type] = SparseContrastConfig
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 64, "lr": 1e-3}
    drop_last: ClassVar[bool] = True

    def __init__(self, config: SparseContrastConfig) -> None:
        super().__init__(config)
        self.epochs = 0

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return images."""
        return images_alone(options.data, **data_options(options))

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> SparseContrastConfig:
        """Take the size from the data; images under 224 get a ViT small enough for a CPU."""
        side = split.test[0]["images"].shape[-1]
        given: dict[str, Any] = {"image_size": side, "channels": split.channels}
        if side < SparseContrastConfig.image_size and "backbone" not in changes:
            given |= {"patch": max(2, side // GRID), **SMALL}
        return SparseContrastConfig(**{**given, **changes})

    def build(self) -> nn.Module:
        """Return a new model at the start of the schedule."""
        model = SparseContrast(self.config)
        model.set_progress(0.0)
        return model

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return the features of the two views of each image."""
        first, second = output.features.float().chunk(2)
        return {"first": first, "second": second}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of the images whose second view is nearest to their first, among all of them."""
        first, second = (F.normalize(measured[name], dim=1) for name in ("first", "second"))
        nearest = (first @ second.mT).argmax(1)
        return {"view_recall": float((nearest == torch.arange(len(nearest))).float().mean())}

    def after_epoch(
        self, model: nn.Module, losses: Mapping[str, float], options: TrainOptions
    ) -> dict[str, float]:
        """Move along the schedule; return the share that was kept."""
        net: Any = model
        kept = net.keep
        self.epochs += 1
        net.set_progress(self.epochs / max(1, options.epochs - 1))
        return {"keep": kept}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of epochs."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that number of epochs."""
        self.epochs = state["epochs"]

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Saliency and kept tokens over a few test images, and the trace of the kept share."""
        net: Any = model
        images = shown_images(split)
        torch.manual_seed(0)
        with torch.no_grad():
            found = net.features(images)
        total = found.saliency[0].shape[1]
        side = round(total**0.5)
        kept = torch.zeros(len(images), total).scatter(1, found.tokens, 1)
        size = images.shape[-2:]
        marks, heat = (
            F.interpolate(values.view(-1, 1, side, side), size=size)[:, 0]
            for values in (kept, found.saliency[0])
        )
        counted = found.tokens.shape[1]
        pictures = [
            Picture(
                "Kept tokens",
                f"Orange: the {counted} of {total} tokens that are kept at the end. Below: their "
                "saliency where it is predicted first. Test images.",
                "Row of images with the kept tokens tinted orange, above maps of saliency.",
                images_picture(
                    images.mean(1),
                    [""] * len(images),
                    marked=[mark.flatten().nonzero()[:, 0] for mark in marks],
                    heat=heat,
                ),
            )
        ]
        return pictures + history_picture(
            history,
            {"keep": "share of tokens kept", "view_recall": "views recalled"},
            "Share of tokens",
            "The share of tokens follows its schedule; recall is of views of test images.",
            "Two curves over the epochs: the share of tokens falls.",
        )
