"""The methods by name."""

from __future__ import annotations

import inspect
from typing import Any

from sparseattn.layers.linear import Linear
from sparseattn.layers.linformer import Linformer
from sparseattn.layers.method import Dense, Method
from sparseattn.layers.nystrom import Nystrom
from sparseattn.layers.performer import Performer
from sparseattn.layers.saliency import Saliency
from sparseattn.layers.topk import TopK
from sparseattn.layers.window import Window

_KINDS = (Dense, TopK, Saliency, Window, Performer, Nystrom, Linformer, Linear)
METHODS: dict[str, type[Method]] = {method.name: method for method in _KINDS}


def make_method(name: Any, options: dict[str, Any], op: str) -> Method:
    """Return a new method of that name; `op` is who asks, for errors."""
    kind = METHODS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(repr(each) for each in METHODS)
        raise ValueError(f"{op}: method is {name!r}; expected one of {known}")
    known_options = tuple(inspect.signature(kind).parameters)
    for option in options:
        if option not in known_options:
            raise TypeError(
                f"{op}: {option} is no option of method {name!r}; "
                f"expected one of {', '.join(known_options) or 'none'}"
            )
    required = [
        parameter.name
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.default is parameter.empty and parameter.name not in options
    ]
    if required:
        raise TypeError(f"{op}: method {name!r} is given no {required[0]}; expected it by name")
    return kind(**options)
