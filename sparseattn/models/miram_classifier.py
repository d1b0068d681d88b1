"""Fine-tuning of MIRAM: its encoder on all patches, and a linear head."""

from typing import NamedTuple

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn.models.miram import MIRAM, MIRAMConfig, MIRAMEncoder, check_images, shrink
from sparseattn.models.transformer import draw_weights


class MIRAMClassifierOutput(NamedTuple):
    """Logits [B, classes]; the loss is None without labels."""

    loss: Tensor | None
    logits: Tensor


class MIRAMClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "image-classification"],
):
    """The encoder of ``MIRAM`` on all patches, and a linear head: fine-tuning.

    logits = head(norm(pool(encoder(image)))). Images of the high resolution are averaged to the
    low one, which is what the encoder was trained on.
    """

    def __init__(self, config: MIRAMConfig | None = None) -> None:
        super().__init__()
        config = MIRAMConfig() if config is None else config
        self.config = config
        self.encoder = MIRAMEncoder(config)
        self.head = nn.Linear(config.dim, config.classes)
        draw_weights(self)

    @classmethod
    def from_autoencoder(cls, model: MIRAM) -> "MIRAMClassifier":
        """Return a classifier with a copy of a trained encoder, and a new head."""
        classifier = cls(model.config)
        classifier.encoder.load_state_dict(model.encoder.state_dict())
        return classifier.to(model.encoder.class_token.device)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> MIRAMClassifierOutput:
        """Classify images of either resolution; with labels int [B], the loss too."""
        check_images(images, self.config, low_too=True)
        tokens = self.encoder(shrink(images, self.config), None)
        pooled = tokens[:, 0] if self.config.pool == "class" else tokens[:, 1:].mean(1)
        logits = self.head(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MIRAMClassifierOutput(loss, logits)
