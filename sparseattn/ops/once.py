"""First derivatives only, said aloud."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def differentiated_once(op: str, gradients: Gradients, *sources: Tensor | None) -> Gradients:
    """Return gradients that are tied to all they come from, and refuse a derivative of them.

    torch's `once_differentiable` looks at the incoming gradient alone: where that is a constant, a
    gradient penalty would pass for one without a gradient.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return _DifferentiatedOnce.apply(op, gradients, *sources)
    return gradients


class _DifferentiatedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradients: Gradients, *sources: Tensor | None) -> Gradients:
        ctx.op = op
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise RuntimeError(
            f"{ctx.op}: its gradient cannot be differentiated, so no loss may use it twice; "
            "expected first derivatives only (impl='reference' has higher ones)"
        )
