"""timm: `Attention` (ViT, DeiT, DINOv2, ...), `AttentionRope` and `EvaAttention` (EVA, DINOv3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseattn.integrations.swap import (
    Swapped,
    adopt,
    refuse_causal,
    saliency_obstacle,
    split_mask,
)
from sparseattn.layers.method import Method, Place
from sparseattn.layers.registry import make_method

HOSTS = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
)


class TimmAttention(Swapped):
    """timm's `Attention`, attending sparsely. Parameters and submodules are the host's.

    attn_drop acts on what is attended, in front of proj (with the method "dense" on the weights).
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend; x [B, N, C]. attn_mask: see ``split_mask``."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self._attend(x, self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        refuse_causal("timm attention", is_causal)
        key_mask, attn_bias = split_mask("timm attention", self.method, attn_mask)
        out = self.method(
            q,
            k,
            v,
            key_mask=key_mask,
            query_mask=key_mask,
            attn_bias=attn_bias,
            scale=self.scale,
            dropout=self.attn_drop.p if self.training else 0.0,
            saliency=self.method.predict(x),
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class TimmRopeAttention(TimmAttention):
    """timm's `AttentionRope` and `EvaAttention`, attending sparsely.

    Rotary positions turn q and k of the patches; prefix tokens are not turned. Grouped keys are
    not repeated.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; x [B, N, C], rope as timm makes it. attn_mask: see ``split_mask``."""
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turn(q, rope).type_as(v), self._turn(k, rope).type_as(v)
        return self._attend(x, q, k, v, attn_mask, is_causal)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            heads = (-1, self.head_dim)
            return tuple(p(x).unflatten(2, heads).transpose(1, 2) for p in projections)
        bias = self.qkv.bias
        if getattr(self, "q_bias", None) is not None:  # EVA has no bias of its keys
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _turn(self, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        half = getattr(self, "rotate_half", False)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


def obstacle(module: Any, method: Method) -> str | None:
    """Return why an attention module cannot attend by the method, if so."""
    return saliency_obstacle(method)


def dropout(module: Any) -> float:
    """Return the share of attention weights that the host drops."""
    return module.attn_drop.p


def swap(module: Any, method: Method) -> None:
    """Make an attention module of timm sparse."""
    kind = TimmRopeAttention if hasattr(module, "num_prefix_tokens") else TimmAttention
    project = module.q_proj if module.qkv is None else module.qkv
    heads = getattr(module, "num_kv_heads", module.num_heads)
    adopt(module, kind, method, Place(project.in_features, heads, module.head_dim))


def attn_layer(method: str = "topk", **options: Any) -> type[nn.Module]:
    """Return a class for timm's `attn_layer=`, which builds a model with sparse attention.

    ``timm.create_model("vit_small_patch16_224", attn_layer=attn_layer("topk", keep=0.25))``, or by
    name after ``timm.models.vision_transformer.ATTN_LAYERS["topk"] = attn_layer("topk")``.
    """
    from timm.layers import Attention

    reason = saliency_obstacle(make_method(method, options, "attn_layer"))
    if reason is not None:  # errors here, not inside timm
        raise ValueError(f"attn_layer: predictor is False; expected True: {reason}")

    class SparseLayer(Attention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.__class__ = Attention  # type: ignore[assignment]
            swap(self, make_method(method, options, "attn_layer"))

    return SparseLayer
