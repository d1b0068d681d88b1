"""How MIRAM is pre-trained: images alone, and pictures of both scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseattn.data.sources import images_alone
from sparseattn.data.split import Split
from sparseattn.models.miram import MIRAM, MIRAMConfig
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe, data_options
from sparseattn.training.recipes.shared import shown_images
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import rows_picture

SHOWN = 4  # images on the page
GRID = 8  # patches a side of a small image
SMALL = {  # a model that a CPU trains on small crops, where nothing else is asked for
    "dim": 96, "depth": 4, "heads": 3, "low_dim": 64, "low_depth": 2, "low_heads": 2,
    "high_dim": 64, "high_depth": 2, "high_heads": 2, "features": 64, "projected_keys": 64,
}  # fmt: skip


class MIRAMRecipe(Recipe):
    """Masked autoencoding at two scales. The side of the images is that of the examples."""

    name: ClassVar[str] = "miram"
    summary: ClassVar[str] = "fill in hidden patches at two scales"
    model_type: ClassVar[type[nn.Module]] = MIRAM
    config_type: ClassVar[type] = MIRAMConfig
    defaults: ClassVar[dict[str, Any]] = {"epochs": 40, "batch_size": 32, "lr": 1.5e-3}

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return images."""
        return images_alone(options.data, **data_options(options))

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> MIRAMConfig:
        """Take the size from the data; images under 224 get a model small enough for a CPU."""
        side = split.test[0]["images"].shape[-1]
        scale = changes.get("scale", MIRAMConfig.scale)
        if side % scale:
            raise ValueError(
                f"miram: images are {side} pixels wide; expected a multiple of scale, scale={scale}"
            )
        small = {}
        if side < MIRAMConfig.image_size:
            small = {"patch": max(2, side // scale // GRID), **SMALL}
        given = {"image_size": side // scale, "channels": split.channels, **small, **changes}
        return MIRAMConfig(**given)

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return the errors of each image at both scales."""
        return {"low": output.low_errors, "high": output.high_errors}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean square error over the hidden patches, at both scales."""
        return {f"{name}_error": float(values.mean()) for name, values in measured.items()}

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Show a few test images as they are, as the encoder sees them, and reconstructed."""
        images = shown_images(split, SHOWN)
        torch.manual_seed(0)
        net: Any = model
        found = net.reconstruct(images)._asdict()
        known = " Normalised: each patch has its true mean." if self.config.normalise else ""
        pictures = []
        for scale, side in (("low", self.config.image_size), ("high", images.shape[-1])):
            rows = {
                "image": found[scale].mean(1),
                "seen": found[f"{scale}_seen"].mean(1),
                "filled in": found[f"{scale}_filled"].mean(1),
            }
            pictures.append(
                Picture(
                    f"{scale.title()} resolution",
                    f"Test images of {side} x {side} pixels; what the encoder saw of them; and "
                    f"what the {scale}-resolution decoder made of it.{known}",
                    "Three rows of images: true, masked, and with the hidden part filled in.",
                    rows_picture(rows),
                )
            )
        return pictures
