"""MONAI: `SABlock`, the self-attention of ViT, UNETR, ViTAutoEnc and others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparseattn.integrations.swap import Swapped, adopt, saliency_obstacle
from sparseattn.layers.method import Method, Place

HOSTS = ("monai.networks.blocks.selfattention.SABlock",)


class MonaiSABlock(Swapped):
    """MONAI's `SABlock`, attending sparsely. Parameters and submodules are the host's.

    The dropout of weights acts on what is attended (with the method "dense" on the weights), and
    in training only; a host with `use_flash_attention` drops in eval too.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend; x [B, N, C], attn_mask [B, N], nonzero = take part."""
        if self.use_combined_linear:
            q, k, v = self.input_rearrange(self.qkv(x))
        else:
            q, k, v = (self.input_rearrange(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        if attn_mask is not None and attn_mask.shape != x.shape[:2]:
            raise ValueError(
                f"SABlock: attn_mask has shape {list(attn_mask.shape)}; "
                f"expected [B, N]={list(x.shape[:2])} (from x)"
            )
        key_mask = None if attn_mask is None else attn_mask != 0
        out = self.method(
            q,
            k,
            v,
            key_mask=key_mask,
            query_mask=key_mask,
            scale=self.scale,
            dropout=self.drop_weights.p if self.training else 0.0,
            saliency=self.method.predict(x),
        )
        return self.drop_output(self.out_proj(self.out_rearrange(out)))


def obstacle(module: Any, method: Method) -> str | None:
    """Return why an SABlock cannot attend by the method, if so."""
    reasons = {
        "causal attention": module.causal,
        "relative position embedding": module.rel_positional_embedding is not None,
        "save_attn keeps the whole attention matrix": module.save_attn,
        "attention_dtype": module.attention_dtype is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return ", ".join(found) or saliency_obstacle(method)


def dropout(module: Any) -> float:
    """Return the share of attention weights that the host drops."""
    return module.drop_weights.p


def swap(module: Any, method: Method) -> None:
    """Make an SABlock sparse."""
    project = module.qkv if module.use_combined_linear else module.to_q
    place = Place(project.in_features, module.num_heads, module.dim_head)
    adopt(module, MonaiSABlock, method, place)
