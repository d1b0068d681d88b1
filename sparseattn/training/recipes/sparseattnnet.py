"""How SparseAttnNet is trained: classification, with a share of pixels that follows the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn

from sparseattn.data.split import Split
from sparseattn.models.keep_rule import KeepRule
from sparseattn.models.sparseattnnet import SparseAttnNet, SparseAttnNetConfig
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History
from sparseattn.training.recipes.shared import (
    Classification,
    first_of_each_class,
    guess_titles,
    history_picture,
)
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import images_picture


class SparseAttnNetRecipe(Classification):
    """Cross-entropy and distillation; `KeepRule` changes the share of pixels after an epoch.

    With `keep=1.0` in the config all pixels are seen all the time.
    """

    name: ClassVar[str] = "sparseattnnet"
    summary: ClassVar[str] = "classify images from their few most salient pixels"
    model_type: ClassVar[type[nn.Module]] = SparseAttnNet
    config_type: ClassVar[type] = SparseAttnNetConfig
    defaults: ClassVar[dict[str, Any]] = {"epochs": 40, "batch_size": 64, "lr": 3e-3}

    def __init__(self, config: SparseAttnNetConfig) -> None:
        super().__init__(config)
        numbers = {
            field.name.removeprefix("rule_"): getattr(config, field.name)
            for field in fields(config)
            if field.name.startswith("rule_")
        }
        self.rule = None if config.keep == 1 else KeepRule(config.keep, **numbers)

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> SparseAttnNetConfig:
        """Take the number of classes and channels from the data."""
        return SparseAttnNetConfig(
            **{"classes": len(split.classes), "channels": split.channels, **changes}
        )

    def after_epoch(
        self, model: nn.Module, losses: Mapping[str, float], options: TrainOptions
    ) -> dict[str, float]:
        """Let the trend of the task's loss change the share of pixels; explore less."""
        net: Any = model
        seen = net.keep
        if self.rule is not None:
            net.keep = self.rule.update(losses["task_loss"], options.epochs)
            done = self.rule.epochs / (options.epochs * (1 - self.rule.freeze))
            net.explore = self.config.explore * max(0.0, 1 - done)
        return {"keep": seen}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule."""
        return {} if self.rule is None else self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the rule as it was."""
        if self.rule is not None:
            self.rule.load_state_dict(state)

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Chosen pixels and coarse maps of a few test images, and the trace of k."""
        images, labels = first_of_each_class(split)
        with torch.no_grad():
            output = model(images)
        titles = guess_titles(split, labels, output.logits)
        seen = output.chosen.shape[1]
        pixels = images[0, 0].numel()
        found = [
            Picture(
                "Chosen pixels",
                f"Orange: the {seen} of {pixels} pixels ({seen / pixels:.1%}) that attention sees, "
                "chosen by the coarse map, which is below each image. Test images.",
                "Row of images with the chosen pixels tinted orange, above their coarse maps.",
                images_picture(images.mean(1), titles, marked=output.chosen, heat=output.coarse),
            )
        ]
        return found + history_picture(
            history,
            {"keep": "share of pixels seen", "accuracy": "accuracy on test images"},
            "Share of pixels",
            "The share of pixels follows the trend of the training loss and is frozen at the end.",
            "Two curves over the epochs: the share of pixels falls, the accuracy rises.",
        )
