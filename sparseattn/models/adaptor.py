"""Adaptor: a light module that aligns a frozen image encoder with a frozen text encoder.

Reference model that follows the published description; the paper leaves much open, and ``Adaptor``
says what was chosen here.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.models import encoders
from sparseattn.ops.block_sparse_attention import block_sparse_attention
from sparseattn.structures.block_mask import BlockMask

_OP = "Adaptor"
_BLOCK = (16, 16)  # queries are few, and texts are short
_SIZES = ("image_width", "text_width", "dim", "heads", "depth")


@dataclass(frozen=True)
class AdaptorConfig:
    """What the paper leaves open, each with the choice made here.

    image_name, text_name        of the encoders; see `sparseattn.models.encoders`
    image_width, text_width      channels of their features
    dim, heads, depth            width of the adaptor, heads, and blocks that both modalities share
    mlp_ratio                    hidden width of a block's MLP, in units of dim
    queries                      learned tokens of each modality that read its features
    project                      width of the shared space
    fusion                       "late": a modality is pooled without the other. "pairs": besides, a
                                 fused score of all B x B pairs. "own": a sample reads its own
                                 partner before pooling; it leaks, and is here to show that
    temperature                  at the start; it is learned
    classes                      of ``AdaptorClassifier``
    """

    image_name: str = "pixels"
    text_name: str = "words"
    image_width: int = 64
    text_width: int = 64
    dim: int = 512
    heads: int = 8
    depth: int = 2
    mlp_ratio: float = 4.0
    queries: int = 4
    project: int = 256
    fusion: Literal["late", "pairs", "own"] = "late"
    temperature: float = 0.07
    classes: int = 2

    def __post_init__(self) -> None:
        for name in (*_SIZES, "queries", "project", "classes"):
            checks.require_int(_OP, name, getattr(self, name), low=1)
        if self.dim % self.heads:
            raise ValueError(
                f"{_OP}: dim is {self.dim}; expected a multiple of heads, heads={self.heads}"
            )
        if self.fusion not in ("late", "pairs", "own"):
            raise ValueError(f"{_OP}: fusion is {self.fusion!r}; expected late, pairs or own")
        if not self.temperature > 0:
            raise ValueError(f"{_OP}: temperature is {self.temperature}; expected more than 0")


class AdaptorOutput(NamedTuple):
    """What the model returns.

    loss           symmetric contrastive loss        similarity    [B, B] logits, images by texts
    image_vectors  [B, project], of length 1         text_vectors  [B, project], of length 1
    """

    loss: Tensor
    similarity: Tensor
    image_vectors: Tensor
    text_vectors: Tensor


class FrozenEncoders(nn.Module):
    """Learned queries that read what frozen encoders see: modules whose name ends in _encoder."""

    config: AdaptorConfig
    image_encoder: nn.Module
    blocks: nn.ModuleList

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the encoders."""
        return [p for encoder in self._encoders() for p in encoder.parameters()]

    def trainable_share(self) -> float:
        """Return the parameters that learn, as a share of all."""
        learn = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return learn / sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> "FrozenEncoders":
        """Set the mode of what learns; the encoders stay in eval."""
        super().train(mode)
        for encoder in self._encoders():
            encoder.eval()
        return self

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the frozen features [B, N, image_width] of images [B, C, H, W]."""
        return self._checked(encoders.image_features(self.image_encoder, images), "image_width")

    def _image_features(self, images: Tensor | None, features: Tensor | None) -> Tensor:
        """Return the features as given, or those of the images."""
        if features is not None:
            return features
        if images is None:
            raise TypeError(f"{_OP}: images and image_features are None; expected one of them")
        return self.encode_images(images)

    def _read(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        state = queries.expand(len(tokens), -1, -1)
        for block in self.blocks:
            state = block(state, tokens, mask)
        return state

    def _encoders(self) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name.endswith("_encoder")]

    def _checked(self, features: Tensor, name: str) -> Tensor:
        width = getattr(self.config, name)
        if features.shape[-1] != width:
            raise ValueError(
                f"{_OP}: {name} is {width}; expected that of the encoder, "
                f"{features.shape[-1]} (from features of shape {list(features.shape)})"
            )
        return features


class Adaptor(
    FrozenEncoders,
    PyTorchModelHubMixin,
    library_name="sparseattn",
    tags=["sparse-attention", "vision-language"],
):
    """Align frozen encoders of images and texts; the adaptor alone learns.

    ::

        F = project(frozen encoder(x))                  tokens of either modality, dim wide
        z = blocks(Q, F)                                Q: learned queries; cross-attention and MLP,
                                                        pre-norm, the same blocks for both
        v = normalise(linear(mean z))
        s_ij = exp(t) * v_i . w_j                       images i by texts j
        loss = (CE(s, diagonal) + CE(s^T, diagonal)) / 2

    Cross-attention goes through ``block_sparse_attention``: padded words are not read, and key
    blocks of padding alone cost nothing. With ``fusion="pairs"`` one more block lets the queries of
    image i read text j and those of text j read image i, for all pairs alike, and a linear map of
    the result is added to s_ij.

    Leakage. Where a sample's vector has read its own partner before the loss compares it with the
    others, matching is trivial: the pair brings its answer along. ``fusion="own"`` does that.
    Trained on pairs that are shuffled at every step, an honest loss stays at ln B; with "own" it
    falls to 0. ``sparseattn validate`` shows both.

    Frozen. The encoders run without gradient and in eval mode whatever mode the model is in, so
    BatchNorm's statistics do not move. Features can be computed once: ``encode_images`` and
    ``encode_texts`` give them, and ``forward`` takes them in place of images and words.

    Choices. The paper's method could be read in summaries only, so these are ours, and options of
    ``AdaptorConfig``: the widths and depth, learned queries in place of one pooled token, blocks
    shared by both modalities, unimodal pooling (fusion), temperature. Fine-tuning:
    ``AdaptorClassifier``. Negatives are those of one
    process's batch.

    Args:
        config: of the adaptor.
        image_encoder: any module that returns tokens [B, N, C] or a map [B, C, h, w]; timm's and
            Hugging Face's do. Default: the one that the config names.
        text_encoder: any module that takes input_ids and attention_mask and returns [B, N, C].

    Reference: "Freeze the Backbones: A Parameter-Efficient Contrastive Approach to Robust Medical
    Vision-Language Pre-training", 2024, arXiv 2401.01179.
    """

    def __init__(
        self,
        config: AdaptorConfig | None = None,
        image_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        config = AdaptorConfig() if config is None else config
        self.config = config
        self.image_encoder = image_encoder or encoders.image_encoder(config.image_name)
        self.text_encoder = text_encoder or encoders.text_encoder(config.text_name)
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)
        dim = config.dim
        self.image_project = projection(config.image_width, dim)
        self.text_project = projection(config.text_width, dim)
        self.image_queries = new_queries(config)
        self.text_queries = new_queries(config)
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))
        self.fuse = None if config.fusion == "late" else CrossBlock(config)
        self.pair_score = nn.Linear(dim, 1) if config.fusion == "pairs" else None
        self.image_head = nn.Linear(dim, config.project)
        self.text_head = nn.Linear(dim, config.project)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    @torch.no_grad()
    def encode_texts(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """Return the frozen features [B, N, text_width] of words int [B, N], mask bool [B, N]."""
        found = encoders.text_features(self.text_encoder, words, word_mask)
        return self._checked(found, "text_width")

    def forward(
        self,
        images: Tensor | None = None,
        words: Tensor | None = None,
        word_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
    ) -> AdaptorOutput:
        """Compare B images with B texts; pair i is image i and text i.

        Args:
            images: [B, C, H, W], or give image_features.
            words: int [B, N], or give text_features.
            word_mask: bool [B, N]; False is padding, whose features may hold NaN.
            image_features: [B, M, image_width], as `encode_images` gives.
            text_features: [B, N, text_width], as `encode_texts` gives.
        """
        if word_mask is None or word_mask.dtype != torch.bool:
            what = "None" if word_mask is None else str(word_mask.dtype)
            raise TypeError(f"{_OP}: word_mask is {what}; expected bool [B, N]")
        image_features = self._image_features(images, image_features)
        if text_features is None:
            if words is None:
                raise TypeError(f"{_OP}: words and text_features are None; expected one of them")
            text_features = self.encode_texts(words, word_mask)
        seen = self.image_project(image_features)
        shown = word_mask[..., None]
        read = self.text_project(text_features.masked_fill(~shown, 0)).masked_fill(~shown, 0)
        image = self._read(self.image_queries, seen, None)
        text = self._read(self.text_queries, read, word_mask)
        if self.fuse is not None and self.config.fusion == "own":
            image, text = self.fuse(image, read, word_mask), self.fuse(text, seen, None)
        image_vectors = F.normalize(self.image_head(image.mean(1)).float(), dim=-1)
        text_vectors = F.normalize(self.text_head(text.mean(1)).float(), dim=-1)
        scale = self.log_scale.exp().clamp(max=100)
        similarity = scale * image_vectors @ text_vectors.T
        if self.pair_score is not None:
            similarity = similarity + self._fused(image, text, seen, read, word_mask)
        target = torch.arange(len(similarity), device=similarity.device)
        loss = F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)
        return AdaptorOutput(loss / 2, similarity, image_vectors, text_vectors)

    def _fused(
        self, image: Tensor, text: Tensor, seen: Tensor, read: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the fused score of every pair, [B, B]: images by texts."""
        fuse: Any = self.fuse
        score: Any = self.pair_score
        batch, count, _ = image.shape

        def all_with_each(queries: Tensor, tokens: Tensor, shown: Tensor | None) -> Tensor:
            """Scores [tokens' batch, queries' batch]: all queries read the tokens of each."""
            every = queries.flatten(0, 1).expand(batch, -1, -1)
            out = fuse(every, tokens, shown).unflatten(1, (batch, count)).mean(2)
            found: Tensor = score(out)[..., 0].float()
            return found

        return all_with_each(image, read, mask).T + all_with_each(text, seen, None)


def projection(width: int, dim: int) -> nn.Module:
    """Return the map from an encoder's features to the width of the adaptor."""
    return nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))


def new_queries(config: AdaptorConfig) -> nn.Parameter:
    """Return the learned queries [queries, dim] of one modality."""
    return nn.Parameter(torch.randn(config.queries, config.dim) * 0.02)


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP: queries [B, M, dim] read tokens [B, N, dim]."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
        self.heads = config.heads
        self.query_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Attend and think; mask bool [B, N], False is padding, which is skipped."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = heads(self.to_q(self.query_norm(queries)))
        k, v = (heads(x) for x in self.to_kv(tokens).chunk(2, -1))
        if mask is None:
            mask = torch.ones(1, tokens.shape[1], dtype=torch.bool, device=tokens.device)
        shown = BlockMask.from_token_mask(mask, _BLOCK, q_len=queries.shape[1])
        attended = block_sparse_attention(q, k, v, shown)
        queries = queries + self.to_out(attended.transpose(1, 2).flatten(2))
        thought: Tensor = queries + self.mlp(self.mlp_norm(queries))
        return thought
