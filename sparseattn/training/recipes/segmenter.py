"""How HySparK's encoder is fine-tuned for segmentation, from the weights of a run or from none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseattn.data.samples import SEGMENTED
from sparseattn.data.split import Split
from sparseattn.data.volumes import nnunet_blocks
from sparseattn.models import HySparKSegmenter
from sparseattn.training.metrics import dice_metrics
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe
from sparseattn.training.recipes.hyspark import HySparKRecipe, volume_options
from sparseattn.training.recipes.shared import FineTuning, fullest_volume, history_picture
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import coloured, planes_picture


class HySparKSegmenterRecipe(FineTuning):
    """Cross-entropy and Dice with all weights, on whole volumes."""

    name: ClassVar[str] = "hyspark-segmenter"
    summary: ClassVar[str] = "give every voxel a class, with the encoder of masked volumes"
    model_type: ClassVar[type[nn.Module]] = HySparKSegmenter
    config_type: ClassVar[type] = HySparKRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 5, "batch_size": 8, "lr": 3e-3}
    begins_with: ClassVar[str] = HySparKRecipe.name
    before: ClassVar[type[Recipe]] = HySparKRecipe
    parts: ClassVar[tuple[str, ...]] = ("encoder",)

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return volumes with a label a voxel: a sample, or those of a folder of nnU-Net's layout.

        Raises:
            ValueError: the data have no such labels.
        """
        if options.data in SEGMENTED:
            return SEGMENTED[options.data](options.seed)
        if options.layout != "nnunet":
            raise ValueError(
                f"{cls.name}: data is {options.data!r} with layout {options.layout!r}; expected "
                f"one of {', '.join(SEGMENTED)}, or a folder with layout nnunet"
            )
        return nnunet_blocks(options.data, labelled=True, **volume_options(options))

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return the class of each voxel, predicted and true."""
        found = {"predicted": output.logits.argmax(1), "labels": batch["labels"]}
        return {name: classes.to(torch.uint8) for name, classes in found.items()}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Dice of each class but the first, and their mean."""
        return dice_metrics(measured["predicted"], measured["labels"], self.config.classes)

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Show a test volume in three planes, with its true classes and those predicted."""
        example = fullest_volume(split)
        volume = example["images"].mean(0)
        with torch.no_grad():
            predicted = model(example["images"][None]).logits[0].argmax(0)
        rows = {
            "volume": coloured(volume, torch.zeros_like(predicted)),
            "true": coloured(volume, example["labels"]),
            "predicted": coloured(volume, predicted),
        }
        found = Picture(
            "Three planes",
            f"A test volume; its true classes; and those predicted. Of {', '.join(split.classes)} "
            "the first has no colour. Slices through the middle of the first, second and third "
            "axis.",
            "Three rows of three slices: the volume, tinted by true, and by predicted classes.",
            planes_picture(rows),
        )
        curve = history_picture(
            history,
            {"dice": "mean Dice of test volumes"},
            "Dice",
            "Dice of all test volumes together after each epoch, the mean over the classes.",
            "A curve of Dice over the epochs.",
        )
        return [found, *curve]
