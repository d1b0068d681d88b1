"""Telling torch.utils.flop_counter how many operations our operators take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_registered: set[Any] = set()


def register(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Register formulas once the counter is loaded; loading it here would load Triton.

    A counter that is already running took its copy of the formulas when it was made.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for op, formula in formulas.items():
        if op in _registered:
            continue
        _registered.add(op)
        module.register_flop_formula(op)(formula)
        for mode in _get_current_dispatch_mode_stack():
            running = getattr(mode, "counter", mode)
            if isinstance(running, module.FlopCounterMode):
                running.flop_registry[op] = module.flop_registry[op]
