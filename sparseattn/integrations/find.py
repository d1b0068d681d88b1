"""Finding the attention modules of a model, and the host library of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from sparseattn.integrations import monai, timm, torch, transformers
from sparseattn.integrations.swap import host_class
from sparseattn.layers.method import Method
from sparseattn.layers.registry import METHODS, make_method
from sparseattn.layers.sparse_attention import SparseAttention

_NAMED_ATTENTION = re.compile(r"attention|attn|sablock", re.IGNORECASE)


class Host(Protocol):
    """What the file of a host library offers."""

    def obstacle(self, module: Any, method: Method) -> str | None:
        """Return why a module cannot attend by the method, if so."""

    def dropout(self, module: Any) -> float:
        """Return the share of attention weights that the host drops."""

    def swap(self, module: Any, method: Method) -> None:
        """Make a module sparse."""


@dataclass(frozen=True)
class Found:
    """An attention module of a model. `host` is None for one that no file here knows."""

    name: str
    module: nn.Module
    host: Host | None
    unknown: str  # why host is None
    prefix: int  # class and register tokens of the model around it

    @property
    def host_class(self) -> str:
        """Full name of its class in the host library."""
        return host_class(self.module)

    def obstacle(self, method: Method) -> str | None:
        """Return why it cannot attend by the method, if so."""
        if self.host is None:
            return self.unknown
        return self.host.obstacle(self.module, method)

    def remark(self, method: Method) -> str:
        """Return what a user should know of the swap."""
        remarks = []
        dropout = 0.0 if self.host is None else self.host.dropout(self.module)
        if dropout and not method.takes_attn_bias:
            remarks.append(f"dropout {dropout:g} acts on what is attended, not on weights")
        if method.approximates:
            remarks.append("no softmax attention: train the model with it")
        if method.needs_saliency:
            remarks.append("its calls must give saliency=")
        return ", ".join(remarks)

    def swap(self, method: str, options: dict[str, Any]) -> None:
        """Make it sparse."""
        if self.host is not None:
            takes_prefix = "prefix" in METHODS[method].options
            own = {"prefix": self.prefix, **options} if takes_prefix else options
            self.host.swap(self.module, make_method(method, own, "convert"))


def find_attention(model: nn.Module) -> list[Found]:
    """Return the attention modules of `model` in order of their names."""
    modules = dict(model.named_modules())
    models = dict(transformers.models_in(model))
    known: dict[str, Host] = {}
    for name, module in modules.items():
        host = _host(module, any(_below(name, outer) for outer in models))
        if host is not None:
            known[name] = host
    named = [
        name
        for name, module in modules.items()
        if name not in known and _NAMED_ATTENTION.search(type(module).__name__)
    ]
    found = {
        name: Found(name, modules[name], host, "", _prefix(modules, name))
        for name, host in known.items()
    }
    for name in named:
        inner = any(_below(other, name) and other != name for other in [*known, *named])
        if not inner and not any(_below(name, other) for other in known):
            found[name] = Found(name, modules[name], None, _unknown(name, modules, models), 0)
    return [found[name] for name in modules if name in found]


def _host(module: nn.Module, in_transformers: bool) -> Host | None:
    name = host_class(module)
    for host in (torch, timm, monai):
        if name in host.HOSTS:
            return host
    if in_transformers and transformers.calls_interface(module):
        return transformers
    return None


def _below(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _unknown(name: str, modules: dict[str, nn.Module], models: dict[str, Any]) -> str:
    if isinstance(modules[name], SparseAttention):
        return "sparse already"
    if any(_below(name, outer) for outer in models):
        return "it does not call AttentionInterface"
    return "no conversion for this class"


def _prefix(modules: dict[str, nn.Module], name: str) -> int:
    """Count the class and register tokens, where a model around the module tells them."""
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        around: Any = modules.get(".".join(parts[:depth]))
        if isinstance(getattr(around, "num_prefix_tokens", None), int):  # timm
            return around.num_prefix_tokens
        if isinstance(getattr(around, "cls_token", None), nn.Parameter):  # MONAI
            return 1
        inside = getattr(around, "embeddings", None)  # transformers
        tokens = [getattr(inside, f"{kind}_token", None) for kind in ("cls", "distillation")]
        tokens.append(getattr(inside, "register_tokens", None))
        counts = [token.shape[1] for token in tokens if isinstance(token, nn.Parameter)]
        if counts:
            return sum(counts)
    return 0
