"""What recipes share: classification, fine-tuning, chosen test images, curves over the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseattn.data.sources import image_classes
from sparseattn.data.split import Example, Split, count
from sparseattn.training.metrics import classification_metrics
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe, data_options
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import curves_picture

SHOWN = 6  # images on the page


class Classification(Recipe):
    """Images with labels, and a model that returns logits."""

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return images and labels."""
        return image_classes(options.data, **data_options(options))

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return logits and labels."""
        return {"logits": output.logits.float(), "labels": batch["labels"]}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Accuracy, and the area under the ROC curve averaged over classes."""
        return classification_metrics(measured["logits"], measured["labels"])


class FineTuning(Recipe):
    """A model that takes parts of a pre-trained one over, and has its config.

    before  the recipe of the pre-training        parts  modules and parameters that are taken over
    """

    before: ClassVar[type[Recipe]]
    parts: ClassVar[tuple[str, ...]]

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> Any:
        """Take the number of classes from the data, and the rest as the pre-training does."""
        return cls.before.configure(split, {**changes, "classes": len(split.classes)})

    def begin(self, model: nn.Module, trained: nn.Module) -> None:
        """Take the parts over."""
        own, theirs = model.state_dict(), trained.state_dict()
        taken = [key for key in own if key.split(".")[0] in self.parts]
        model.load_state_dict({**own, **{key: theirs[key] for key in taken}})


def history_picture(
    history: History, curves: Mapping[str, str], title: str, caption: str, alt: str
) -> list[Picture]:
    """Return curves over the epochs, a column of the history a curve; none without a history.

    curves: column of epochs.csv -> name of its curve.
    """
    if not history:
        return []
    values = {name: [row[column] for row in history] for column, name in curves.items()}
    picture = curves_picture([row["epoch"] for row in history], values, "epoch")
    return [Picture(title, caption, alt, picture)]


def shown_images(split: Split, most: int = SHOWN) -> Tensor:
    """Return `most` test images, evenly spaced."""
    return torch.stack([example["images"] for example in _spaced(split, most)])


def fullest_volume(split: Split) -> Example:
    """Return that of some test examples whose image has the most voxels above 0."""
    return max(_spaced(split, 16), key=lambda example: int((example["images"] > 0).sum()))


def _spaced(split: Split, most: int) -> list[Example]:
    step = max(1, count(split.test) // most)
    return [split.test[i] for i in range(0, min(count(split.test), step * most), step)]


def first_of_each_class(split: Split) -> tuple[Tensor, Tensor]:
    """Return the first test images of the classes in turn, `SHOWN` at most, and their labels."""
    rounds: dict[int, list[int]] = {}
    for index in range(min(count(split.test), 256)):
        rounds.setdefault(int(split.test[index]["labels"]), []).append(index)
    longest = max(map(len, rounds.values()))
    order = [rounds[c][i] for i in range(longest) for c in sorted(rounds) if i < len(rounds[c])]
    shown = [split.test[index] for index in order[:SHOWN]]
    return torch.stack([s["images"] for s in shown]), torch.stack([s["labels"] for s in shown])


def guess_titles(split: Split, labels: Tensor, logits: Tensor) -> list[str]:
    """Return for each image its class, and what it was taken for if that is wrong."""
    names, pairs = split.classes, zip(labels.tolist(), logits.argmax(1).tolist(), strict=True)
    return [
        f"{names[label]}" if label == guess else f"{names[label]}, taken for {names[guess]}"
        for label, guess in pairs
    ]
