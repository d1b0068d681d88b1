"""Fine-tuning of HySparK: its encoder on whole volumes, and its decoder with classes."""

from typing import NamedTuple

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn.models.hyspark import (
    HySparK,
    HySparKConfig,
    HySparKDecoder,
    HySparKEncoder,
    check_images,
    projections,
)
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask


class HySparKSegmenterOutput(NamedTuple):
    """Logits [B, classes, X, Y, Z]; the losses are None without labels."""

    loss: Tensor | None
    logits: Tensor
    cross_entropy_loss: Tensor | None
    dice_loss: Tensor | None


class HySparKSegmenter(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-convolution", "image-segmentation"],
):
    """The encoder of ``HySparK`` on whole volumes, and its decoder with classes: fine-tuning.

    loss = cross-entropy + 1 - mean over classes of 2 |p l| / (|p| + |l|), with p the softmax.
    """

    def __init__(self, config: HySparKConfig | None = None) -> None:
        super().__init__()
        config = HySparKConfig() if config is None else config
        self.config = config
        self.encoder = HySparKEncoder(config)
        self.decoder = HySparKDecoder(config, config.classes)
        levels = self.encoder.widths[::-1]
        self.used = len(levels) if config.full_skip else len(levels) - 1
        self.project = nn.ModuleList(projections(config, levels)[: self.used])

    @classmethod
    def from_pretrained_model(cls, model: HySparK) -> "HySparKSegmenter":
        """Return a segmenter with a copy of a trained encoder; the rest is new."""
        segmenter = cls(model.config)
        segmenter.encoder.load_state_dict(model.encoder.state_dict())
        return segmenter.to(next(model.parameters()).device)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> HySparKSegmenterOutput:
        """Segment volumes; with labels int [B, X, Y, Z], the losses too."""
        check_images(images, self.config)
        everywhere = images.new_ones((len(images), *[self.config.side] * 3))
        mask = PatchMask.from_scores(everywhere, self.config.side**3)
        maps = self.encoder(PatchGrid.from_dense(images, mask))[::-1][: self.used]
        logits = self.decoder(
            [project(x.to_dense()) for x, project in zip(maps, self.project, strict=True)]
        )
        loss = entropy = dice = None
        if labels is not None:
            entropy = F.cross_entropy(logits.float(), labels)
            shares = logits.float().softmax(1)
            truth = F.one_hot(labels, self.config.classes).movedim(-1, 1).to(shares.dtype)
            both = (shares * truth).sum((0, 2, 3, 4))
            sizes = (shares + truth).sum((0, 2, 3, 4))
            dice = 1 - (2 * both / sizes.clamp_min(1e-6)).mean()
            loss = entropy + dice
        return HySparKSegmenterOutput(loss, logits, entropy, dice)
