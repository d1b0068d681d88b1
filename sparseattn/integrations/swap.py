"""Turning a host's attention module into a sparse one, and back.

The module stays the same object with the same parameters; its class changes, and it gains a
submodule ``method``. So optimizers, hooks, state_dicts and references to it go on as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseattn.layers.method import Method, Place

_HOST_CLASS = "_sparseattn_host_class"


class Swapped(nn.Module):
    """Base of the classes that take a host's place; they have the host's forward and attributes."""

    method: Method

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say to mypy that the host's attributes are there."""


def adopt(module: nn.Module, sparse_class: type[nn.Module], method: Method, place: Place) -> None:
    """Turn `module` into a `sparse_class` that attends by `method` there."""
    module.__dict__[_HOST_CLASS] = type(module)
    module.__class__ = sparse_class
    adopt_method(module, method, place)


def adopt_method(module: nn.Module, method: Method, place: Place) -> None:
    """Give `module` a method, on its device and in its mode."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        method.prepare(place)
    else:
        method.to(parameter.device)
        method.prepare(place, parameter.device, parameter.dtype)
    module.method = method.train(module.training)


def saliency_obstacle(method: Method) -> str | None:
    """Return why a module that is called with tokens alone cannot attend by the method, if so."""
    if method.needs_saliency:
        return f"method={method.name!r} needs a saliency in every call, or predictor=True"
    return None


def is_adopted(module: nn.Module) -> bool:
    """Say whether the module was a host's and has been made sparse."""
    return _HOST_CLASS in module.__dict__


def give_back(module: nn.Module) -> None:
    """Make an adopted module what it was."""
    module.__class__ = module.__dict__.pop(_HOST_CLASS)
    del module.method
    if isinstance(module, nn.MultiheadAttention):
        module._qkv_same_embed_dim = module.in_proj_weight is not None


def host_class(module: nn.Module) -> str:
    """Return the full name of the module's class, or of the one it had before it was adopted."""
    kind = module.__dict__.get(_HOST_CLASS, type(module))
    return f"{kind.__module__}.{kind.__qualname__}"


def split_mask(op: str, method: Method, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask in which True takes part into a key mask and a bias of the logits.

    Sparse methods take bool masks [B, 1, 1, Nk] only; the method "dense" takes any that
    broadcasts to [B, H, Nq, Nk].
    """
    if mask is None:
        return None, None
    if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0], None
    if method.takes_attn_bias:
        return None, additive(mask)
    raise NotImplementedError(
        f"{op}: attn_mask has shape {list(mask.shape)} and dtype {mask.dtype}; expected a bool "
        f"mask of keys [B, 1, 1, Nk], method={method.name!r} (method='dense' takes any)"
    )


def additive(mask: Tensor) -> Tensor:
    """Turn a mask in which True takes part into what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), device=mask.device)
    return torch.where(mask, zero, -torch.inf)


def refuse_causal(op: str, is_causal: Any) -> None:
    """Raise if causal attention is asked for."""
    if is_causal:
        raise NotImplementedError(
            f"{op}: is_causal is True; expected False: queries see keys on both sides"
        )
