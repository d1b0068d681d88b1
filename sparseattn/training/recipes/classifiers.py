"""How encoders are fine-tuned for classification, from the weights of a run or from none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseattn.data.sources import image_classes
from sparseattn.data.split import Split
from sparseattn.models import MIRAMClassifier, SparseContrastClassifier
from sparseattn.training.metrics import classification_metrics
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe, data_options
from sparseattn.training.recipes.miram import MIRAMRecipe
from sparseattn.training.recipes.sparseattnnet import first_of_each_class, guess_titles
from sparseattn.training.recipes.sparsecontrast import SparseContrastRecipe
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import curves_picture, images_picture


class ClassifierRecipe(Recipe):
    """Cross-entropy with all weights. Images and config are those of the pre-training."""

    part: ClassVar[str]  # of the model that is pre-trained
    before: ClassVar[type[Recipe]]

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return images and labels."""
        return image_classes(options.data, **data_options(options))

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> Any:
        """Take the number of classes from the data, and the rest as the pre-training does."""
        return cls.before.configure(split, {**changes, "classes": len(split.classes)})

    def begin(self, model: nn.Module, trained: nn.Module) -> None:
        """Take the encoder over."""
        getattr(model, self.part).load_state_dict(getattr(trained, self.part).state_dict())

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return logits and labels."""
        return {"logits": output.logits.float(), "labels": batch["labels"]}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracy, and the area under the ROC curve averaged over classes."""
        return classification_metrics(measured["logits"], measured["labels"])

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
        if history:
            curves = {"accuracy on test images": [row["accuracy"] for row in history]}
            found.append(
                Picture(
                    "Accuracy",
                    "Accuracy on test images after each epoch.",
                    "A curve of the accuracy over the epochs.",
                    curves_picture([row["epoch"] for row in history], curves, "epoch"),
                )
            )
        return found


class MIRAMClassifierRecipe(ClassifierRecipe):
    """The encoder of MIRAM on all patches. Images have the high resolution, as in pre-training."""

    name: ClassVar[str] = "miram-classifier"
    summary: ClassVar[str] = "classify images with the encoder of a masked autoencoder"
    model_type: ClassVar[type[nn.Module]] = MIRAMClassifier
    config_type: ClassVar[type] = MIRAMRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 32, "lr": 1e-3}
    begins_with: ClassVar[str] = MIRAMRecipe.name
    before: ClassVar[type[Recipe]] = MIRAMRecipe
    part: ClassVar[str] = "encoder"


class SparseContrastClassifierRecipe(ClassifierRecipe):
    """The backbone of SparseContrast, trimmed to its kept share from the first step."""

    name: ClassVar[str] = "sparsecontrast-classifier"
    summary: ClassVar[str] = "classify images from their most salient tokens"
    model_type: ClassVar[type[nn.Module]] = SparseContrastClassifier
    config_type: ClassVar[type] = SparseContrastRecipe.config_type
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 32, "lr": 5e-4}
    begins_with: ClassVar[str] = SparseContrastRecipe.name
    before: ClassVar[type[Recipe]] = SparseContrastRecipe
    part: ClassVar[str] = "backbone"
