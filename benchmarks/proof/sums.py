"""What a result is summed of, for ops whose results all are sums of products: convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proof.case import Arguments

NAMES = ("features", "weight", "bias")
Sent = dict[str, Tensor]


def sizes(reference: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Return `Case.magnitudes`: what the reference makes of squares, rooted."""

    def found(arguments: Arguments, sent: Sent, *_: Any) -> dict[str, Tensor]:
        sums = results(reference, arguments, sent, torch.square)
        return {name: squares.sqrt() for name, squares in sums.items()}

    return found


def terms(reference: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Return `Case.terms`: what the reference makes of ones."""

    def found(arguments: Arguments, sent: Sent) -> dict[str, Tensor]:
        return results(reference, arguments, sent, torch.ones_like)

    return found


def results(
    reference: Callable[..., Tensor], arguments: Arguments, sent: Sent,
    change: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Return y and every gradient with each tensor changed."""
    names = [name for name in NAMES if arguments[name] is not None]
    leaves = {name: change(arguments[name].detach()).requires_grad_() for name in names}
    y = reference(**(arguments | leaves))
    gradients = torch.autograd.grad(y, list(leaves.values()), change(sent["y"]))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
