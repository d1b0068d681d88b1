"""What a training knows of one model: its data, its metrics, what follows an epoch, its pictures.

A recipe is a file in `recipes/` with a class that derives from `Recipe`, named in `RECIPES`. The
loop, checkpoints, logs and pages are the same for all of them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sparseattn import checks
from sparseattn.data.split import Split
from sparseattn.training.options import TrainOptions
from sparseattn.viz.report import Picture

History = Sequence[Mapping[str, float]]  # a row an epoch: what epochs.csv holds


class Recipe(ABC):
    """How one model is trained.

    The model is called with a batch by name, `model(**batch)`, and returns a NamedTuple: its
    field `loss` is what is minimised, and fields whose name ends in `loss` are logged. It takes
    its config, saves itself with `save_pretrained`, and loads with `from_pretrained`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    model_type: ClassVar[type[nn.Module]]
    config_type: ClassVar[type]
    defaults: ClassVar[dict[str, Any]] = {}  # options that differ from those of TrainOptions
    drop_last: ClassVar[bool] = False  # whether a smaller batch at the end of an epoch is left out
    begins_with: ClassVar[str] = ""  # the model from whose run a training may begin (`--from`)

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return the examples; `options.data` is a folder or the name of a sample."""

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> Any:
        """Return the model's config for these examples, with the changes the user asked for."""
        return cls.config_type(**changes)

    def build(self) -> nn.Module:
        """Return a new model."""
        return self.model_type(self.config)

    def begin(self, model: nn.Module, trained: nn.Module) -> None:
        """Copy into a new model what it takes over from one of `begins_with`."""
        raise NotImplementedError(f"{self.name}: begins_with is {self.begins_with!r}")

    @abstractmethod
    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return what the metrics need of a test batch: tensors [B, ...], a row an example."""

    @abstractmethod
    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics of all test examples; `measured` is on the CPU."""

    def after_epoch(
        self, model: nn.Module, losses: Mapping[str, float], options: TrainOptions
    ) -> dict[str, float]:
        """Change the model by what the epoch showed; return what is logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what `after_epoch` remembers, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if state:
            raise NotImplementedError(f"{self.name}: state_dict is not empty, so this must take it")

    @abstractmethod
    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Return what the run's page shows of a trained model (on the CPU, in eval)."""


RECIPES = {  # name: module and class, imported when it is asked for
    "hyspark": ("sparseattn.training.recipes.hyspark", "HySparKRecipe"),
    "hyspark-segmenter": ("sparseattn.training.recipes.segmenter", "HySparKSegmenterRecipe"),
    "miram": ("sparseattn.training.recipes.miram", "MIRAMRecipe"),
    "miram-classifier": ("sparseattn.training.recipes.classifiers", "MIRAMClassifierRecipe"),
    "adaptor": ("sparseattn.training.recipes.adaptor", "AdaptorRecipe"),
    "adaptor-classifier": ("sparseattn.training.recipes.classifiers", "AdaptorClassifierRecipe"),
    "sparseattnnet": ("sparseattn.training.recipes.sparseattnnet", "SparseAttnNetRecipe"),
    "sparsecontrast": ("sparseattn.training.recipes.sparsecontrast", "SparseContrastRecipe"),
    "sparsecontrast-classifier": (
        "sparseattn.training.recipes.classifiers",
        "SparseContrastClassifierRecipe",
    ),
}


def recipe_type(name: str) -> type[Recipe]:
    """Return the recipe of a model.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(
            f"train: model {checks.describe(name)}; expected one of {', '.join(RECIPES)}"
        )
    module, attribute = RECIPES[name]
    found: type[Recipe] = getattr(importlib.import_module(module), attribute)
    return found


def data_options(options: TrainOptions) -> dict[str, Any]:
    """Return what ``image_classes`` takes besides the source."""
    names = ("seed", "layout", "table", "target", "uncertain", "on_error", "check")
    return {"size": options.image_size, **{name: getattr(options, name) for name in names}}
