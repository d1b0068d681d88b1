"""Fine-tuning of Adaptor: its frozen image encoder, the adaptor, and a linear head."""

from typing import NamedTuple

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn.models import encoders
from sparseattn.models.adaptor import (
    Adaptor,
    AdaptorConfig,
    CrossBlock,
    FrozenEncoders,
    new_queries,
    projection,
)


class AdaptorClassifierOutput(NamedTuple):
    """Logits [B, classes]; the loss is None without labels."""

    loss: Tensor | None
    logits: Tensor


class AdaptorClassifier(
    FrozenEncoders,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "image-classification"],
):
    """What the adaptor reads in the features of a frozen image encoder, and a linear head.

    logits = head(mean(blocks(queries, project(frozen encoder(image))))). The encoder stays in eval
    mode and keeps its bits; everything else learns. No text is needed.

    Args:
        config: of the adaptor.
        image_encoder: as that of ``Adaptor``. Default: the one that the config names.
    """

    def __init__(
        self, config: AdaptorConfig | None = None, image_encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        config = AdaptorConfig() if config is None else config
        self.config = config
        self.image_encoder = image_encoder or encoders.image_encoder(config.image_name)
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)
        self.image_project = projection(config.image_width, config.dim)
        self.image_queries = new_queries(config)
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))
        self.head = nn.Linear(config.dim, config.classes)

    @classmethod
    def from_adaptor(cls, model: Adaptor) -> "AdaptorClassifier":
        """Return a classifier with a copy of a trained adaptor, its image encoder, and a new head.

        The encoder is shared: it does not change.
        """
        classifier = cls(model.config, model.image_encoder)
        for name in ("image_project", "blocks"):
            getattr(classifier, name).load_state_dict(getattr(model, name).state_dict())
        classifier.image_queries.data.copy_(model.image_queries.data)
        return classifier.to(model.image_queries.device)

    def forward(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> AdaptorClassifierOutput:
        """Classify images [B, C, H, W], or their features as `encode_images` gives them.

        With labels int [B], the loss too.
        """
        seen = self.image_project(self._image_features(images, image_features))
        logits = self.head(self._read(self.image_queries, seen, None).mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return AdaptorClassifierOutput(loss, logits)
