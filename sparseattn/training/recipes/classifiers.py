"""How encoders are fine-tuned for classification, from the weights of a run or from none."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sparseattn.data.split import Split
from sparseattn.models import AdaptorClassifier, MIRAMClassifier, SparseContrastClassifier
from sparseattn.training.recipe import History, Recipe
from sparseattn.training.recipes.adaptor import AdaptorRecipe
from sparseattn.training.recipes.miram import MIRAMRecipe
from sparseattn.training.recipes.shared import (
    Classification,
    FineTuning,
    first_of_each_class,
    guess_titles,
    history_picture,
)
from sparseattn.training.recipes.sparsecontrast import SparseContrastRecipe
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import images_picture


class ClassifierRecipe(FineTuning, Classification):
    """Cross-entropy with all weights that learn. The config is that of the pre-training."""

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Show a few test images with what they were taken for, and accuracy over the epochs."""
        images, labels = first_of_each_class(split)
        with torch.no_grad():
            logits = model(images).logits
        titles = guess_titles(split, labels, logits)
        found = [
            Picture(
                "Test images",
                "Test images, the first of each class, and what they were taken for if wrong.",
                "Row of images, each with its class.",
                images_picture(images.mean(1), titles),
            )
        ]
        return found + history_picture(
            history,
            {"accuracy": "accuracy on test images"},
            "Accuracy",
            "Accuracy on test images after each epoch.",
            "A curve of the accuracy over the epochs.",
        )


class MIRAMClassifierRecipe(ClassifierRecipe):
    """The encoder of MIRAM on all patches. Images have the high resolution, as in pre-training."""

    name: ClassVar[str] = "miram-classifier"
    summary: ClassVar[str] = "classify images with the encoder of a masked autoencoder"
    model_type: ClassVar[type[nn.Module]] = MIRAMClassifier
    config_type: ClassVar[type] = MIRAMRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 32, "lr": 1e-3}
    begins_with: ClassVar[str] = MIRAMRecipe.name
    before: ClassVar[type[Recipe]] = MIRAMRecipe
    parts: ClassVar[tuple[str, ...]] = ("encoder",)


class SparseContrastClassifierRecipe(ClassifierRecipe):
    """The backbone of SparseContrast, trimmed to its kept share from the first step."""

    name: ClassVar[str] = "sparsecontrast-classifier"
    summary: ClassVar[str] = "classify images from their most salient tokens"
    model_type: ClassVar[type[nn.Module]] = SparseContrastClassifier
    config_type: ClassVar[type] = SparseContrastRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 32, "lr": 5e-4}
    begins_with: ClassVar[str] = SparseContrastRecipe.name
    before: ClassVar[type[Recipe]] = SparseContrastRecipe
    parts: ClassVar[tuple[str, ...]] = ("backbone",)


class AdaptorClassifierRecipe(ClassifierRecipe):
    """The frozen image encoder and what the adaptor reads in it; the adaptor and a head learn."""

    name: ClassVar[str] = "adaptor-classifier"
    summary: ClassVar[str] = "classify images from what an adaptor reads in a frozen encoder"
    model_type: ClassVar[type[nn.Module]] = AdaptorClassifier
    config_type: ClassVar[type] = AdaptorRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 32, "lr": 1e-3}
    begins_with: ClassVar[str] = AdaptorRecipe.name
    before: ClassVar[type[Recipe]] = AdaptorRecipe
    parts: ClassVar[tuple[str, ...]] = (
        "image_encoder", "image_project", "image_queries", "blocks",
    )  # fmt: skip
