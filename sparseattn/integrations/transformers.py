"""Hugging Face transformers: attention functions and mask functions by name.

A model whose attention implementation is ``"sparseattn"`` calls ``attention`` below for every
attention module. Modules that have a ``method`` attend by it; the others attend densely.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparseattn.integrations.swap import (
    adopt_method,
    refuse_causal,
    saliency_obstacle,
    split_mask,
)
from sparseattn.layers.method import Method, Place

NAME = "sparseattn"
_OP = "transformers attention"
_SELF_ATTENTION = "_sparseattn_self_attention"
_BEFORE = "_sparseattn_implementation_before"

_OTHER_TOKENS = {"encoder_hidden_states", "key_value_states", "context"}

# What a model may hand its attention, that a sparse method does not compute.
_REFUSED = {
    "softcap": "soft-capped logits",
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "head_mask": "a head mask",
    "sliding_window": "a sliding window",
    "cu_seq_lens_q": "packed sequences",
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as an AttentionInterface function does; the result is [B, Nq, H, D].

    Raises NotImplementedError for what a sparse method does not compute: causal attention, masks
    of pairs, soft-capping, position biases, sinks, caches, packed sequences and weights.
    """
    method = getattr(module, "method", None)
    if not isinstance(method, Method):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{_OP}: {name} is given; expected none: no method has {what}"
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"{_OP}: output_attentions is True; expected False: weights are not formed"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:  # otherwise the mask says it
        refuse_causal(_OP, causal and query.shape[2] > 1)
    key_mask, attn_bias = split_mask(_OP, method, attention_mask)
    out = method(
        query,
        key,
        value,
        key_mask=key_mask,
        query_mask=key_mask if module.__dict__.get(_SELF_ATTENTION) else None,
        attn_bias=attn_bias,
        scale=scaling,
        dropout=dropout,
        saliency=kwargs.get("saliency"),
    )
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make masks as an AttentionMaskInterface function does.

    Padding alone stays a mask of keys, bool [B, 1, 1, Nk], True = take part, or None. Other masks
    are those of ``sdpa``; sparse methods refuse them.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function and kv_offset == 0:
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] == kv_length:
            return attention_mask[:, None, None].bool()
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        **kwargs,
    )  # fmt: skip
    return mask


def register() -> str:
    """Make "sparseattn" known to transformers and return that name. May be called again.

    It is needed by hand in one case: to run an unpickled converted model in a new process.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    return NAME


def models_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost Hugging Face models inside `model` with their names."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if not inside and hasattr(module, "set_attn_implementation"):
            found.append(name)
            yield name, module


def calls_interface(module: nn.Module) -> bool:
    """Say whether the module's forward looks its attention function up by name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def obstacle(module: Any, method: Method) -> str | None:
    """Return why an attention module cannot attend by the method, if so."""
    code = inspect.unwrap(type(module).forward).__code__
    words = {word for const in code.co_consts if isinstance(const, tuple) for word in const}
    for name in ("position_bias", "s_aux"):  # passed in every call
        if name in words:
            return _REFUSED[name]
    if getattr(module, "is_causal", True):
        return "causal attention"
    if method.takes_saliency:
        reason = saliency_obstacle(method) or _token_obstacle(module)
        if reason is not None:
            return reason
    return method.obstacle(_place(module))


def _token_obstacle(module: nn.Module) -> str | None:
    """Return why a predictor of saliency cannot read what the module attends to, if so."""
    arguments = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    if not _OTHER_TOKENS.isdisjoint(arguments):
        return "cross attention, whose saliency no predictor makes"
    passes_on = any(each.kind is each.VAR_KEYWORD for each in arguments.values())
    if "hidden_states" not in arguments or not passes_on or _first_linear(module) is None:
        return "its forward does not pass a saliency on to its attention function"
    return None


def _first_linear(module: nn.Module) -> nn.Linear | None:
    return next((child for child in module.children() if isinstance(child, nn.Linear)), None)


def _predict(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add the predicted saliency to a call, which passes it on to ``attention``. A hook."""
    tokens = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "saliency": module.method.predict(tokens)}


def dropout(module: Any) -> float:
    """Return the share of attention weights that the host drops, where it says so."""
    share = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    return share.p if isinstance(share, nn.Dropout) else float(share or 0.0)


def swap(module: Any, method: Method) -> None:
    """Give an attention module a method."""
    arguments = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    module.__dict__[_SELF_ATTENTION] = _OTHER_TOKENS.isdisjoint(arguments)
    adopt_method(module, method, _place(module))
    if method.takes_saliency:
        module.register_forward_pre_hook(_predict, with_kwargs=True)


def _place(module: Any) -> Place:
    """Return what the module tells of its heads, by the names that models of the library use."""

    def first(*names: str) -> int | None:
        found = (getattr(module, name, None) for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    project = _first_linear(module)
    heads = first("num_key_value_heads", "num_heads", "num_attention_heads")
    width = None if project is None else project.in_features
    return Place(width, heads, first("head_dim", "attention_head_size"))


def select(model: Any) -> None:
    """Make a Hugging Face model with swapped modules use the function above."""
    swapped = [module for module in model.modules() if _SELF_ATTENTION in module.__dict__]
    if not swapped:
        return
    model.__dict__[_BEFORE] = model.config._attn_implementation
    model.set_attn_implementation(register())
    if any(module.config._attn_implementation != NAME for module in swapped):
        raise NotImplementedError(
            f"convert: {type(model).__name__} is of a class whose attention implementation "
            "transformers does not set; expected a class of its own or of an importable file"
        )


def deselect(model: Any) -> None:
    """Make a Hugging Face model use what it used before."""
    if _BEFORE in model.__dict__:
        model.set_attn_implementation(model.__dict__.pop(_BEFORE))
        for module in list(model.modules()):
            if _SELF_ATTENTION in module.__dict__:
                del module.method, module.__dict__[_SELF_ATTENTION]
                for key in [k for k, h in module._forward_pre_hooks.items() if h is _predict]:
                    del module._forward_pre_hooks[key]
                    del module._forward_pre_hooks_with_kwargs[key]
