"""SparseContrast: contrastive learning whose attention is trimmed to the most salient tokens.

Reference model that follows the published description; the paper leaves nearly everything open,
and ``SparseContrast`` says what was chosen here.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.models.saliency_backbones import Features, make_backbone
from sparseattn.models.views import two_views

_OP = "SparseContrast"
_WORDS = {
    "pool": ("mean", "class"),
    "trim": ("maps", "tokens"),
    "choose": ("learned", "random"),
    "gradient": ("bias", "none"),
    "contrast": ("nt-xent", "infonce"),
    "quality": ("mse", "cosine"),
}


@dataclass(frozen=True)
class SparseContrastConfig:
    """What the paper leaves open, each with the choice made here.

    backbone       of timm: any of its plain ViTs, such as "vit_small_patch16_224" and
                   "vit_base_patch16_224", or a convolutional net, such as "resnet50", whose map
                   goes through attention pooling
    image_size, channels  of the images, which are square
    patch, dim, depth, heads  of a ViT, where they shall differ from its name's
    pool           what a ViT's features are: the "mean" of the patches that are kept, or the
                   "class" token
    pool_heads     heads of the attention pooling of a convolutional net
    trim           "maps": dropped tokens are no keys any more, and are still computed; "tokens":
                   they are left out of everything that follows
    keep           share of the patch tokens that is kept, at the end of ``schedule``
    start, stages  first block that is trimmed, and how often a predictor chooses, evenly spaced
                   from there. Of several stages that trim tokens, i of n keeps keep ** (i / n)
    choose         "learned" by the predictor, or at "random" as a control
    gradient       how a gradient reaches the predictor: "bias" adds the log of a token's saliency
                   to the logits of attention to it, "none" leaves it to the sparsity loss
    predictor_dim  width of the predictor
    contrast       "nt-xent" (all other views of the batch are negatives) or "infonce" (those of
                   the other kind of view, from either side)
    temperature    of the contrastive loss
    projector_dim  width of the space in which views are compared
    sparsity_weight  of (mean saliency - kept share)^2, a stage
    quality        distance of features to those of the same net untrimmed: "mse" of normalised
                   features, or "cosine"
    quality_weight, quality_share  of that loss, and the share of the steps that compute it
    dense_share    share of the training at the start that trims nothing; then the kept share
                   falls as a cosine over the rest
    crop, degrees, contrast_jitter  of the views: least area of a crop, largest rotation, and
                   largest change of brightness and contrast; they are also flipped
    classes        of ``SparseContrastClassifier``
    """

    backbone: str = "vit_small_patch16_224"
    image_size: int = 224
    channels: int = 1
    patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    pool: Literal["mean", "class"] = "mean"
    pool_heads: int = 32
    trim: Literal["maps", "tokens"] = "tokens"
    keep: float = 0.5
    start: int = 3
    stages: int = 3
    choose: Literal["learned", "random"] = "learned"
    gradient: Literal["bias", "none"] = "bias"
    predictor_dim: int = 64
    contrast: Literal["nt-xent", "infonce"] = "nt-xent"
    temperature: float = 0.1
    projector_dim: int = 128
    sparsity_weight: float = 1.0
    quality: Literal["mse", "cosine"] = "cosine"
    quality_weight: float = 0.5
    quality_share: float = 0.25
    dense_share: float = 0.1
    crop: float = 0.4
    degrees: float = 10.0
    contrast_jitter: float = 0.2
    classes: int = 2

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "pool_heads", "stages", "classes"):
            checks.require_int(_OP, name, getattr(self, name), low=1)
        checks.require_int(_OP, "start", self.start, low=0)
        checks.require_int(_OP, "projector_dim", self.projector_dim, low=1)
        checks.require_int(_OP, "predictor_dim", self.predictor_dim, low=2)
        for name, options in _WORDS.items():
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{_OP}: {name} is {getattr(self, name)!r}; expected {' or '.join(options)}"
                )
        for name in ("keep", "crop"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{_OP}: {name} is {getattr(self, name)}; expected a share in (0, 1]"
                )
        if not 0 <= self.quality_share <= 1:
            raise ValueError(
                f"{_OP}: quality_share is {self.quality_share}; expected a share in [0, 1]"
            )
        for name in ("dense_share", "contrast_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{_OP}: {name} is {getattr(self, name)}; expected a share in [0, 1)"
                )
        if not self.temperature > 0:
            raise ValueError(f"{_OP}: temperature is {self.temperature}; expected more than 0")


class SparseContrastOutput(NamedTuple):
    """What a training step returns.

    loss        contrast_loss + sparsity_weight * sparsity_loss + quality_weight * quality_loss;
                the quality loss is 0 in steps that do not compute it
    features    [2 * B, dim] of the first views, then of the second ones
    kept        share of the patch tokens that the last stage kept
    """

    loss: Tensor
    contrast_loss: Tensor
    sparsity_loss: Tensor
    quality_loss: Tensor
    features: Tensor
    kept: float


class _Trimmed(nn.Module):
    """The backbone, and the share of tokens it keeps: an attribute that is saved with the weights.

    ``keep`` is None where nothing is trimmed.
    """

    def __init__(self, config: SparseContrastConfig) -> None:
        super().__init__()
        self.config = config
        self.keep = config.keep
        self.backbone = make_backbone(config)

    def features(self, images: Tensor) -> Features:
        """Return the features of images [B, channels, image_size, image_size]."""
        checks.require_tensor(_OP, "images", images)
        expected = [self.config.channels, self.config.image_size, self.config.image_size]
        if images.dim() != 4 or list(images.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"{_OP}: images {checks.describe(images)}; expected [B, {sizes}]")
        found: Features = self.backbone(images, self.keep)
        return found

    def sparsity_loss(self, found: Features) -> Tensor:
        """Return (mean saliency - kept share)^2, averaged over the stages."""
        losses = [
            (s.mean() - share) ** 2 for s, share in zip(found.saliency, found.shares, strict=True)
        ]
        return torch.stack(losses).mean()

    def set_progress(self, done: float) -> None:
        """Set the kept share for a share `done` of the training, from 1 down to config.keep."""
        dense = self.config.dense_share
        fall = min(1.0, max(0.0, (done - dense) / (1 - dense)))
        self.keep = self.config.keep + (1 - self.config.keep) * (1 + math.cos(math.pi * fall)) / 2

    def get_extra_state(self) -> Tensor:
        """Return the kept share, for the state_dict."""
        return torch.tensor(self.keep, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the kept share from a state_dict."""
        self.keep = float(state)


class SparseContrast(
    _Trimmed,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "contrastive-learning"],
):
    """Learn features by contrast, with attention to the most salient tokens alone.

    ::

        u, v = two random views of an image
        s = sigmoid(predictor(tokens))                              at every stage
        attention to the k = ceil(keep * N) tokens of highest s, with log s on the logits
        loss = contrast(project(f(u)), project(f(v))) + sparsity_weight * mean (mean s - k / N)^2
               + quality_weight * distance(f(u), f_dense(u))        f_dense without gradient

    The class token is always kept, and with it any register token. All images of a batch keep the
    same number. ``keep`` is an attribute; ``set_progress`` moves it along the schedule.

    Choices. Of the paper little more than the abstract could be read; so these are ours, and
    options of ``SparseContrastConfig`` where a name is given:

    - what is trimmed (trim). Products of queries and keys are a share N / (6 * dim + N) of a
      block's work: with "maps" nothing more can be saved, 8 % for ViT-S at 224 pixels. "tokens"
      also saves projections and MLPs;
    - what the features are (pool). Small ViTs learned sooner from the mean;
    - where, how often and how much (start, stages, keep), and the way there (dense_share);
    - the predictor is that of DynamicViT, narrower: norm, linear, GELU, half of the channels
      replaced by their mean weighted by the latest saliency, then two linear layers;
    - its gradient (gradient): exact, through the softmax. DynamicViT draws with Gumbel noise and
      computes dropped tokens in training;
    - the losses (contrast, temperature, projector_dim, sparsity_weight, quality, quality_weight,
      quality_share) and the views (crop, degrees, contrast_jitter);
    - a convolutional backbone is computed as it is, and its map is read by one query, the mean of
      the map, with multi-head attention (pool_heads) to the tokens kept. There one stage chooses;
      start and stages mean nothing, and trim neither, for one query.

    Deterministic in eval, but for choose="random" and the views; they draw from torch's generator.

    Reference: "SparseContrast", 2026, arXiv 2605.00887; "DynamicViT", 2021, arXiv 2106.02034;
    "A Simple Framework for Contrastive Learning of Visual Representations", 2020, arXiv 2002.05709.
    """

    def __init__(self, config: SparseContrastConfig | None = None) -> None:
        super().__init__(SparseContrastConfig() if config is None else config)
        dim = self.backbone.dim
        self.projector = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, self.config.projector_dim)
        )

    def forward(self, images: Tensor) -> SparseContrastOutput:
        """Compare two views of every image [B, channels, image_size, image_size]; B >= 2."""
        config = self.config
        views = two_views(images, config.crop, config.degrees, config.contrast_jitter)
        found = self.features(views)
        first, second = self.projector(found.pooled).chunk(2)
        compare = nt_xent if config.contrast == "nt-xent" else info_nce
        contrast = compare(first, second, config.temperature)
        sparsity = self.sparsity_loss(found)
        quality = self._quality(views, found.pooled)
        loss = contrast + config.sparsity_weight * sparsity + config.quality_weight * quality
        share = found.shares[-1]
        return SparseContrastOutput(loss, contrast, sparsity, quality, found.pooled, share)

    def _quality(self, views: Tensor, pooled: Tensor) -> Tensor:
        """Return the distance to the features of the untrimmed net, in some of the steps."""
        config = self.config
        computed = float(torch.rand(())) < config.quality_share
        if config.quality_weight == 0 or not computed:
            return pooled.new_zeros(())
        with torch.no_grad():
            dense = F.normalize(self.backbone(views, None).pooled.float(), dim=-1)
        sparse = F.normalize(pooled.float(), dim=-1)
        if config.quality == "mse":
            return F.mse_loss(sparse, dense)
        return (1 - (sparse * dense).sum(-1)).mean()


class SparseContrastClassifierOutput(NamedTuple):
    """Logits [B, classes], and what the last stage chose; losses are None without labels.

    saliency  [B, tokens], of the last stage         tokens  int [B, k], ascending, or None
    """

    loss: Tensor | None
    logits: Tensor
    saliency: Tensor
    tokens: Tensor | None
    task_loss: Tensor | None
    sparsity_loss: Tensor | None


class SparseContrastClassifier(
    _Trimmed,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "image-classification"],
):
    """The backbone of ``SparseContrast``, trimmed as there, and a linear head: fine-tuning.

    loss = CE(head(f(image)), label) + sparsity_weight * mean (mean saliency - kept share)^2.
    """

    def __init__(self, config: SparseContrastConfig | None = None) -> None:
        super().__init__(SparseContrastConfig() if config is None else config)
        self.head = nn.Linear(self.backbone.dim, self.config.classes)

    @classmethod
    def from_contrastive(cls, model: SparseContrast) -> "SparseContrastClassifier":
        """Return a classifier with a copy of a trained backbone, and a new head."""
        classifier = cls(model.config)
        classifier.backbone.load_state_dict(model.backbone.state_dict())
        return classifier.to(next(model.parameters()).device)

    def forward(
        self, images: Tensor, labels: Tensor | None = None
    ) -> SparseContrastClassifierOutput:
        """Classify images; with labels int [B], the losses too."""
        found = self.features(images)
        logits = self.head(found.pooled)
        loss = task = sparsity = None
        if labels is not None:
            task, sparsity = F.cross_entropy(logits.float(), labels), self.sparsity_loss(found)
            loss = task + self.config.sparsity_weight * sparsity
        return SparseContrastClassifierOutput(
            loss, logits, found.saliency[-1], found.tokens, task, sparsity
        )


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the mean of -log softmax of the other view of an image, among all other views.

    first, second: [B, D] of the two views; compared by cosine over the temperature.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=-1)
    batch = len(first)
    logits = (views @ views.mT / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(2 * batch, device=views.device).roll(batch)
    return F.cross_entropy(logits, partner)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the mean of -log softmax of an image's second view among all second views, and back.

    first, second: [B, D] of the two views; compared by cosine over the temperature.
    """
    one, two = (F.normalize(view.float(), dim=-1) for view in (first, second))
    logits = one @ two.mT / temperature
    own = torch.arange(len(first), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
