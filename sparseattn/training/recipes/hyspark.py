"""How HySparK is pre-trained: volumes alone, and pictures in three planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseattn.data.sources import images_alone
from sparseattn.data.split import Split
from sparseattn.data.volumes import nnunet_blocks
from sparseattn.models.hyspark import HySparK, HySparKConfig
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe, data_options
from sparseattn.training.recipes.shared import fullest_volume
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import planes_picture

SMALL = {"width": 4, "heads": 4, "vit_depth": 2, "decoder_width": 64}  # for crops and a CPU


class HySparKRecipe(Recipe):
    """Masked reconstruction of volumes. Their side is that of the examples."""

    name: ClassVar[str] = "hyspark"
    summary: ClassVar[str] = "fill in hidden cells of volumes, computing on the others alone"
    model_type: ClassVar[type[nn.Module]] = HySparK
    config_type: ClassVar[type] = HySparKConfig
    defaults: ClassVar[dict[str, Any]] = {"epochs": 10, "batch_size": 8, "lr": 3e-3}

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return volumes: a sample, or those of a folder of nnU-Net's layout."""
        if options.layout != "nnunet":
            return images_alone(options.data, **data_options(options))
        return nnunet_blocks(options.data, **volume_options(options))

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> HySparKConfig:
        """Take the size from the data; volumes under 96 get a model small enough for a CPU."""
        shape = split.test[0]["images"].shape
        if len(shape) != 4:
            raise ValueError(f"hyspark: images have shape {list(shape)}; expected [C, X, Y, Z]")
        small = SMALL if shape[-1] < HySparKConfig.image_size else {}
        given = {"image_size": shape[-1], "channels": shape[0], **small, **changes}
        return HySparKConfig(**given)

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return the error of each volume."""
        return {"errors": output.errors}

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean square error over the hidden cells, which are normalised."""
        return {"error": float(measured["errors"].mean())}

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Show a test volume in three planes: true, as the encoder sees it, and filled in."""
        volume = fullest_volume(split)["images"][None]
        torch.manual_seed(0)
        net: Any = model
        found = net.reconstruct(volume)._asdict()
        names = {"images": "volume", "seen": "seen", "filled": "filled in"}
        rows = {text: found[name][0].mean(0) for name, text in names.items()}
        return [
            Picture(
                "Three planes",
                f"A test volume; the {self.config.kept} of {self.config.side**3} cells that the "
                "encoder saw; and what the decoder made of the others, each with its true mean. "
                "Slices through the middle of the first, second and third axis.",
                "Three rows of three slices: true, masked, and with the hidden part filled in.",
                planes_picture(rows),
            )
        ]


def volume_options(options: TrainOptions) -> dict[str, Any]:
    """Return what ``nnunet_blocks`` takes besides the source."""
    names = ("seed", "spacing", "window", "cache", "on_error")
    return {"size": options.image_size, **{name: getattr(options, name) for name in names}}
