"""PyTorch itself: `nn.MultiheadAttention`, and F.scaled_dot_product_attention for exploration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseattn.integrations.swap import adopt, split_mask
from sparseattn.layers.method import Method, Place
from sparseattn.layers.registry import make_method
from sparseattn.layers.sparse_attention import SparseAttention, has_extra_keys

HOSTS = ("torch.nn.modules.activation.MultiheadAttention",)


def obstacle(module: Any, method: Method) -> str | None:
    """Return why a layer cannot attend by the method, if so."""
    if has_extra_keys(module) and not method.takes_extra_keys:
        return f"extra keys, which method={method.name!r} does not have"
    return None


def dropout(module: Any) -> float:
    """Return the share of attention weights that the host drops."""
    return module.dropout


def swap(module: Any, method: Method) -> None:
    """Make an nn.MultiheadAttention sparse."""
    adopt(module, SparseAttention, method, Place(module.kdim, module.num_heads, module.head_dim))
    module._qkv_same_embed_dim = False


def set_nested_tensors(model: nn.Module) -> None:
    """Keep every nn.TransformerEncoder with a sparse layer from packing padded batches."""
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        sparse = any(isinstance(module, SparseAttention) for module in encoder.modules())
        before = encoder.__dict__.get(_NESTED)
        if sparse and before is None:
            encoder.__dict__[_NESTED] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
        elif not sparse and before is not None:
            encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)


_NESTED = "_sparseattn_use_nested_tensor"


class patch_sdpa(TorchFunctionMode):
    """Within this context, F.scaled_dot_product_attention attends sparsely. For exploration.

    ::

        with patch_sdpa("topk", keep=0.25) as patch:
            model(x)
        print(patch.calls, patch.passed)

    Calls that a sparse method cannot take (causal, masks other than [B, 1, 1, Nk] bool, head dims
    that differ) pass to torch; ``calls`` counts the others, ``passed`` counts these by reason, both
    in eager mode only. Attention that is not written with that function is not seen: a swap by
    ``convert`` reports what it leaves. Dropout acts on what is attended.
    """

    def __init__(self, method: str = "topk", **options: Any) -> None:
        super().__init__()
        self.method = make_method(method, options, "patch_sdpa")
        if self.method.takes_saliency:
            raise ValueError(
                f"patch_sdpa: method is {method!r}; expected one without saliency, which the "
                "calls do not have"
            )
        if self.method.needs_place:
            raise ValueError(
                f"patch_sdpa: method is {method!r}; expected one without parameters or features "
                "of its own"
            )
        self.calls = 0
        self.passed: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the calls that can be taken."""
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _sdpa_arguments(*args, **kwargs)
        reason = _sdpa_obstacle(self.method, **call)
        if not torch.compiler.is_compiling():
            self._count(reason)
        if reason is not None:
            return func(*args, **kwargs)
        key_mask, attn_bias = split_mask("patch_sdpa", self.method, call["attn_mask"])
        names = ("query", "key", "value")
        return self.method(
            *(call[name] for name in names),
            key_mask=key_mask,
            attn_bias=attn_bias,
            scale=call["scale"],
            dropout=call["dropout_p"],
        )

    def _count(self, reason: str | None) -> None:
        if reason is None:
            self.calls += 1
        else:
            self.passed[reason] = self.passed.get(reason, 0) + 1


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return dict(locals())


def _sdpa_obstacle(method: Method, **call: Any) -> str | None:
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    if any(x.dim() != 4 for x in (q, k, v)) or not q.shape[0] == k.shape[0] == v.shape[0]:
        return "not [B, H, N, D]"
    if call["is_causal"]:
        return "causal"
    if v.shape[3] != k.shape[3]:
        return "values of another head dim"
    if q.shape[1] != k.shape[1] and not call["enable_gqa"]:
        return "heads differ"
    if mask is not None and not method.takes_attn_bias:
        keys = (q.shape[0], 1, 1, k.shape[2])
        if mask.dtype != torch.bool or mask.shape != keys:
            return "mask of pairs"
    return None
