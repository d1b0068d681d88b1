"""Backbones of timm that attend to salient tokens: ViTs, and convolutional nets with a pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.models.encoders import import_timm
from sparseattn.models.transformer import sincos_positions, take
from sparseattn.ops.saliency_attention import saliency_attention
from sparseattn.ops.token_selection import keep_capacity, select_tokens

if TYPE_CHECKING:
    from sparseattn.models.sparsecontrast import SparseContrastConfig

_OP = "SparseContrast"
_TINY = torch.finfo(torch.float32).tiny


class Features(NamedTuple):
    """What a backbone found. Without trimming there are no saliencies, shares and tokens.

    pooled    [B, dim]
    saliency  [B, tokens] in (0, 1) of each stage, of the tokens that were there
    shares    of those tokens, how many each stage kept
    tokens    int [B, k], ascending: patches that the last stage kept
    """

    pooled: Tensor
    saliency: list[Tensor]
    shares: list[float]
    tokens: Tensor | None


class SaliencyPredictor(nn.Module):
    """One value in (0, 1) a token, from the token and from the mean of all tokens."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.local = width // 2
        self.read = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU())
        narrow = nn.Linear(width, width // 2)
        self.decide = nn.Sequential(narrow, nn.GELU(), nn.Linear(width // 2, 1))

    def forward(self, tokens: Tensor, weight: Tensor | None) -> Tensor:
        """Return the saliency [B, N] of tokens [B, N, dim], in float32.

        weight: [B, N], of the tokens in the mean; None: all the same.
        """
        read = self.read(tokens)
        own, shared = read[..., self.local :], read[..., : self.local]
        if weight is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = weight.detach().to(shared.dtype)[..., None]
            mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        joined = torch.cat([own, mean.expand(-1, own.shape[1], -1)], -1)
        return self.decide(joined).squeeze(-1).float().sigmoid().clamp_min(_TINY)


def make_backbone(config: SparseContrastConfig) -> SparseViT | PooledConvNet:
    """Return a backbone with new weights.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: the backbone is not one that can be trimmed.
    """
    timm = import_timm()
    given: dict[str, Any] = {"in_chans": config.channels, "num_classes": 0, "pretrained": False}
    if not config.backbone.startswith(("vit_", "deit")):
        return PooledConvNet(timm.create_model(config.backbone, **given), config)
    names = {"patch": "patch_size", "dim": "embed_dim", "depth": "depth", "heads": "num_heads"}
    given |= {b: getattr(config, a) for a, b in names.items() if getattr(config, a) is not None}
    given |= {"img_size": config.image_size}
    given |= {"global_pool": "avg" if config.pool == "mean" else "token"}
    vit = timm.create_model(config.backbone, **given)
    kinds = timm.models.vision_transformer
    plain = type(vit) is kinds.VisionTransformer and all(type(b) is kinds.Block for b in vit.blocks)
    if not plain or vit.attn_pool is not None:
        raise ValueError(
            f"{_OP}: backbone is {config.backbone!r}; expected a plain ViT of timm, or a "
            "convolutional net"
        )
    if config.start >= len(vit.blocks) or config.stages > len(vit.blocks) - config.start:
        raise ValueError(
            f"{_OP}: start is {config.start} and stages is {config.stages}; expected a block for "
            f"every stage, depth={len(vit.blocks)} (from backbone)"
        )
    return SparseViT(vit, config)


class SparseViT(nn.Module):
    """A ViT of timm whose attention, from some block on, is to the most salient tokens."""

    def __init__(self, vit: Any, config: SparseContrastConfig) -> None:
        super().__init__()
        self.vit, self.config = vit, config
        self.dim: int = vit.embed_dim
        self.prefix: int = vit.num_prefix_tokens
        after = len(vit.blocks) - config.start
        self.places = [config.start + i * after // config.stages for i in range(config.stages)]
        learned = self.places if config.choose == "learned" else []
        self.predictors = nn.ModuleList(
            SaliencyPredictor(self.dim, config.predictor_dim) for _ in learned
        )

    def forward(self, images: Tensor, keep: float | None) -> Features:
        """Return features; with a share of patch tokens to keep, or None for plain attention."""
        vit, config = self.vit, self.config
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        count = x.shape[1] - self.prefix
        saliency, tokens, kept = None, None, count
        saliencies: list[Tensor] = []
        shares: list[float] = []
        for i, block in enumerate(vit.blocks):
            if keep is not None and i in self.places:
                stage = self.places.index(i)
                patches = x[:, self.prefix :]
                saliency = self._saliency(stage, patches, saliency)
                power = (stage + 1) / len(self.places) if config.trim == "tokens" else 1.0
                kept = _count(keep**power, count)
                saliencies.append(saliency)
                shares.append(kept / patches.shape[1])
                chosen = select_tokens(saliency[:, None], kept).tokens[:, 0].long()
                if config.trim == "maps":
                    tokens = chosen
                else:
                    tokens = chosen if tokens is None else tokens.gather(1, chosen)
                    x = torch.cat([x[:, : self.prefix], take(patches, chosen)], 1)
                    saliency = saliency.gather(1, chosen)
            x = self._block(block, x, saliency, kept)
        return Features(self._pool(vit.norm(x), tokens), saliencies, shares, tokens)

    def _saliency(self, stage: int, patches: Tensor, before: Tensor | None) -> Tensor:
        if self.config.choose == "random":
            return _drawn(patches)
        found: Tensor = self.predictors[stage](patches, before)
        return found

    def _block(self, block: Any, x: Tensor, saliency: Tensor | None, kept: int) -> Tensor:
        """Do what timm's block does, with attention to the kept tokens."""
        attention = block.attn
        seen = block.norm1(x)
        qkv = attention.qkv(seen).unflatten(2, (3, attention.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        q, k = attention.q_norm(q), attention.k_norm(k)
        if saliency is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        else:
            out = saliency_attention(
                q, k, v, F.pad(saliency, (self.prefix, 0), value=1.0), self.prefix + kept,
                always=self.prefix, scale=attention.scale, log_bias=_biased(self.config),
            )  # fmt: skip
        out = attention.norm(out.transpose(1, 2).flatten(2))
        out = attention.proj_drop(attention.proj(out))
        x = x + block.drop_path1(block.ls1(out))
        more: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return more

    def _pool(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Return the class token, or the mean of the kept patches."""
        if self.config.pool == "class":
            return x[:, 0]
        patches = x[:, self.prefix :]
        if tokens is not None and self.config.trim == "maps":
            patches = take(patches, tokens)
        pooled: Tensor = self.vit.fc_norm(patches.mean(1))
        return pooled


class PooledConvNet(nn.Module):
    """A convolutional net of timm, and attention of one query to the salient places of its map."""

    def __init__(self, net: Any, config: SparseContrastConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.dim: int = net.num_features
        self.heads = config.pool_heads
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"{_OP}: pool_heads is {self.heads}; expected a divisor of the map's channels, "
                f"channels={self.dim} (from backbone)"
            )
        self.predictor = None
        if config.choose == "learned":
            self.predictor = SaliencyPredictor(self.dim, config.predictor_dim)
        self.query, self.key = (nn.Linear(self.dim, self.dim) for _ in range(2))
        self.value, self.out = (nn.Linear(self.dim, self.dim) for _ in range(2))

    def forward(self, images: Tensor, keep: float | None) -> Features:
        """Return features; with a share of the map's places to keep, or None for all of them."""
        found = self.net.forward_features(images)  # [B, C, h, w]
        places = sincos_positions(found.shape[2:], self.dim).to(found.device, found.dtype)
        x = found.flatten(2).mT + places
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in (
                (self.query, x.mean(1, keepdim=True)), (self.key, x), (self.value, x)
            )
        )  # fmt: skip
        if keep is None:
            out = F.scaled_dot_product_attention(q, k, v)
            return Features(self.out(out.flatten(1)), [], [], None)
        saliency = _drawn(x) if self.predictor is None else self.predictor(x, None)
        kept = _count(keep, x.shape[1])
        out, tokens = saliency_attention(
            q, k, v, saliency, kept, log_bias=_biased(self.config), return_indices=True
        )
        shares = [kept / x.shape[1]]
        return Features(self.out(out.flatten(1)), [saliency], shares, tokens[:, 0].long())


def _drawn(tokens: Tensor) -> Tensor:
    return torch.rand(tokens.shape[:2], device=tokens.device).clamp_min(_TINY)


def _biased(config: SparseContrastConfig) -> bool:
    return config.gradient == "bias" and config.choose == "learned"


def _count(share: float, tokens: int) -> int:
    """Return how many of the tokens that share is, rounded up."""
    return keep_capacity(checks.keep_share(_OP, share), tokens)
