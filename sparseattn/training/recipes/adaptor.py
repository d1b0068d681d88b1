"""How Adaptor is trained: pictures with texts, a contrastive loss, and retrieval as its measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sparseattn.data.pairs import image_texts
from sparseattn.data.split import Split, count
from sparseattn.models.adaptor import Adaptor, AdaptorConfig
from sparseattn.training.metrics import retrieval_metrics
from sparseattn.training.options import TrainOptions
from sparseattn.training.recipe import History, Recipe
from sparseattn.training.recipes.shared import history_picture
from sparseattn.viz.report import Picture
from sparseattn.viz.run_page import matrix_picture

SHOWN = 32  # test pairs on the page


class AdaptorRecipe(Recipe):
    """Symmetric contrastive loss of whole batches; the encoders are frozen."""

    name: ClassVar[str] = "adaptor"
    summary: ClassVar[str] = "align a frozen image encoder with a frozen text encoder"
    model_type: ClassVar[type[nn.Module]] = Adaptor
    config_type: ClassVar[type] = AdaptorConfig
    defaults: ClassVar[dict[str, Any]] = {"epochs": 20, "batch_size": 64, "lr": 2e-3}
    drop_last: ClassVar[bool] = True  # the loss of a batch depends on its size

    @classmethod
    def load(cls, options: TrainOptions) -> Split:
        """Return pictures and the words of their texts."""
        return image_texts(
            options.data,
            seed=options.seed,
            table=options.table,
            size=options.image_size,
            on_error=options.on_error,
            check=options.check,
        )

    @classmethod
    def configure(cls, split: Split, changes: Mapping[str, Any]) -> AdaptorConfig:
        """Make the adaptor as small as the tiny encoders, unless other encoders are named."""
        text = changes.get("text_name", "words")
        if text != "words":
            raise ValueError(
                f"adaptor: text_name is {text!r}; expected words: here words are numbered by a "
                "hash, and an encoder with a tokenizer of its own is trained from Python"
            )
        tiny = "image_name" not in changes
        small = {"dim": 64, "heads": 4, "queries": 8, "project": 64} if tiny else {}
        return AdaptorConfig(**{**small, **changes})

    def measured(self, batch: Mapping[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Return the vectors of images and texts."""
        return {
            "image": output.image_vectors,
            "text": output.text_vectors,
            "words": batch["words"],
        }

    def metrics(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Recall of the right text among all test texts; equal texts are equally right."""
        same = (measured["words"][:, None] == measured["words"]).all(-1)
        return retrieval_metrics(measured["image"] @ measured["text"].T, same)

    def pictures(self, model: nn.Module, split: Split, history: History) -> list[Picture]:
        """Similarity of a few test images and texts, and retrieval over the epochs."""
        shown = [split.test[index] for index in range(min(SHOWN, count(split.test)))]
        with torch.no_grad():
            output = model(**default_collate(shown))
        cosine = output.image_vectors @ output.text_vectors.T
        found = [
            Picture(
                "Similarity of images and texts",
                f"Cosine of the vectors of {len(shown)} test images and their texts. True pairs "
                "lie on the diagonal.",
                "Square heat map; a bright diagonal means that pairs are found.",
                matrix_picture(cosine, "text", "image"),
            )
        ]
        return found + history_picture(
            history,
            {name: name for name in ("recall_at_1", "recall_at_5", "recall_at_1_by_chance")},
            "Retrieval",
            "Share of test images whose text is among the 1 or 5 nearest of all.",
            "Curves of the recall over the epochs.",
        )
